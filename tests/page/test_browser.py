"""The page in a real Chromium: its buttons work, nothing breaks its own rules or the width."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from nextstate.records import Feedback, PolicyVersion, Timings, VersionState
from nextstate.store import Store
from tests.page.chromium import PROGRAM, Tab, chromium
from tests.page.running_page import site
from tests.proxy.running_proxy import add_version
from tests.store.test_records import add, judge, turn

PROCESSES = subprocess  # this file starts processes
KEY = "the-proxy-key"
SHOWN = (
    *("/", "/page/turns", "/page/turns/turn_3", "/page/versions", "/page/versions/main/1"),
    *("/page/versions/main/1/rollback", "/page/nothing"),
)
SIZES = ((390, False), (390, True), (1100, False), (1100, True))
PICTURES = os.environ.get("NEXTSTATE_PICTURES")
"""A folder for pictures of each page, to look at."""
ASKED = "Find out why the build is slow.\nIt took three minutes <b>yesterday</b>. \u202ereversed"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def fill(store: Store, tmp_path: Path) -> None:
    """Turns of three versions in enough sessions for intervals, and a rejected version."""
    for back in reversed(range(12)):  # of the days before
        for one in range(1 + back % 5):
            name = f"turn_{int(1000 * (time.time() - 86400 * back)):012x}{one:08x}"
            add(store, turn(100 + one, id=name, session=f"old-{back}"), next_state=None)
    number = 0
    for version, goods in ((0, 3), (1, 6), (2, 10)):
        for session in range(10):
            call = {"id": "c", "function": {"name": "exec", "arguments": '{"command":"ls"}'}}
            messages = [
                {"role": "system", "content": "You are a careful agent with a shell. " * 40},
                {"role": "user", "content": ASKED},
                {"role": "assistant", "content": "I look.", "tool_calls": [call]},
                {"role": "tool", "content": "total 48\ndrwxr-xr-x 2 build build\n" * 4},
            ]
            add(
                store,
                turn(
                    number,
                    session=f"agent-{session}",
                    policy_version=version,
                    request={"messages": messages},
                    reply={"content": "The cache was cold: " + "w" * 120},
                    timings=Timings(time.time(), 0.1, 0.2),
                    untrainable="the client asked for a grammar" if session == 9 else None,
                ),
                next_state="thanks" if session < goods else "no, too long",
            )
            if session != 9:
                judge(store, number, 1 if session < goods else -1, "Answer in one sentence.")
            number += 1
    store.judging.give_feedback(Feedback("turn_3", -1, "Say it in one sentence.", "a note"))
    add_version(store, tmp_path, 1)
    why = "KL to the base 0.81 is above its limit of 0.5, and 3 of 16 canaries lost sense"
    metrics = {"score/mean": -0.25, "step/kl": 0.0191, "gate/kl_base": 0.81, "gate/rank": -0.002}
    store.versions.add(
        PolicyVersion("main", 2, 1, None, None, 16, VersionState.REJECTED, metrics, why), None
    )


@pytest.mark.skipif(PROGRAM is None, reason="needs chromium (Debian: apt install chromium)")
def test_every_page_and_button_works_in_a_real_browser(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path)

    async def run() -> None:
        async with (
            site(store, tmp_path, KEY) as page,
            chromium(tmp_path / "profile") as tab,
        ):
            await tab.look(390, dark=False)
            await tab.open(page.url)
            assert await tab.value("location.pathname") == "/page/login"
            await picture("login", tab)
            await tab.value(f"document.querySelector('#key').value = {KEY!r}")
            await tab.click("main button")
            assert await tab.value("location.pathname") == "/"
            assert await tab.value("document.cookie") == ""  # no script can read it
            for width, dark in SIZES:
                await tab.look(width, dark)
                for path in SHOWN:
                    await tab.open(page.url + path)
                    assert await tab.value(OVERFLOW) <= 0, (path, width)
                    colour = await tab.value("getComputedStyle(document.body).backgroundColor")
                    assert (colour == "rgb(20, 23, 27)") == dark, "the stylesheet holds"
                    await picture(f"{path.strip('/').replace('/', '-')}-{width}-{dark}", tab)
            await tab.open(f"{page.url}/page/turns/turn_5")
            await tab.value("document.querySelector('#hint').value = 'Be brief.'")
            await tab.click(".feedback button.bad")
            assert "Kept: -1." in await tab.value("document.body.innerText")
            assert store.judging.feedback("turn_5") == Feedback("turn_5", -1, "Be brief.")
            await tab.open(f"{page.url}/page/turns")
            await tab.click("a[rel=next]")
            assert "before=" in await tab.value("location.search")
            await tab.open(f"{page.url}/page/versions/main/1")
            await tab.click("a.button")
            await tab.click("main button")
            assert store.versions.serving("main").number == 1
            assert [one for one in tab.complaints if "404" not in one] == []
            await tab.click("header button")
            assert await tab.value("location.pathname") == "/page/login"

    asyncio.run(run())


async def picture(name: str, tab: Tab) -> None:
    if PICTURES is not None:
        await tab.picture(Path(PICTURES) / f"{name}.png")
