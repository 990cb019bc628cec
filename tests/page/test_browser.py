"""The page in a real Chromium: its buttons work, nothing breaks its own rules or the width."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nextstate.episodes import Episode, EpisodeStatus, Reward, RewardKind
from nextstate.records import Feedback, PolicyVersion, Timings, VersionState
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.page.chromium import chromium, needs_browser
from tests.page.running_page import Site, png, site
from tests.proxy.running_proxy import add_version
from tests.store.test_records import add, judge, turn

PROCESSES = subprocess  # this file starts browsers
KEY = "the-proxy-key"
SHOWN = (
    *("/", "/page/turns", "/page/turns/turn_3", "/page/sessions", "/page/session?name=agent-3"),
    *("/page/turns/turn_3/forget", "/page/session/forget?name=agent-3"),
    *("/page/episodes", "/page/episodes/words-1-0", "/page/versions", "/page/versions/main/1"),
    *("/page/versions/main/1/rollback", "/page/lineages/main/pause", "/page/running"),
    *("/page/lineages/main/resume", "/page/export?what=sft", "/page/nothing"),
)
NAME = re.compile(r"[^a-z0-9]+")
AXE = Path(__file__).parents[2] / ".browser" / "node_modules" / "axe-core" / "axe.min.js"
WIDTHS = (390, 1100)
SCHEMES = {"light": "rgb(251, 251, 250)", "dark": "rgb(20, 23, 27)"}
"""The background of a page by what a person's system prefers."""
VIOLATIONS = "axe.run({resultTypes: ['violations']}).then(r => r.violations)"
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
    for number in range(26):
        add(store, turn(500 + number, session=f"short-{number}", index=0), next_state=None)
    fill_episodes(store)
    store.reviewing.give(Feedback("turn_3", -1, "Say it in one sentence.", "a note"), OWNER)
    add_version(store, tmp_path, 1)
    why = "KL to the base 0.81 is above its limit of 0.5, and 3 of 16 canaries lost sense"
    metrics = {"score/mean": -0.25, "step/kl": 0.0191, "gate/kl_base": 0.81, "gate/rank": -0.002}
    store.versions.add(
        PolicyVersion("main", 2, 1, None, None, 16, VersionState.REJECTED, metrics, why), None
    )


def fill_episodes(store: Store) -> None:
    """Two attempts at a task with steps, rewards and screenshots, and one that was dropped."""
    task = "Find the longest word of the page and say how many letters it has."
    for number, outcome in enumerate((1.0, 0.0)):
        name = f"words-1-{number}"
        store.episodes.open([Episode(name, "main", "words", task, "words-1", max_calls=8)], 2)
        for step in range(3):
            told = f"step{number}{step}"
            reply = {"role": "assistant", "content": f"I click on word {step}."}
            values = {"id": told, "session": name, "episode": name, "step": step, "reply": reply}
            add(store, turn(step, **values), next_state="The page shows 12 words.")
            reward = Reward(name, "progress", RewardKind.PROCESS, 0.25 * step, told, "checker")
            store.episodes.reward([reward])
            file = store.dir / "pictures" / name / f"{step}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(320, 180, (60 + 60 * step, 120, 160)))
        store.episodes.close(name, EpisodeStatus.DONE, outcome, None)
    store.episodes.open([Episode("broken-1", "main", "terminal", "Build it.")], None)
    store.episodes.close("broken-1", EpisodeStatus.FAILED, None, None)


needs_axe = pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: make gui")


@asynccontextmanager
async def browsing(
    store: Store, tmp_path: Path, width: int
) -> AsyncGenerator[tuple[Site, Any, list[str]]]:
    """A site with content, a tab that is logged in there, and what the browser complains of."""
    fill(store, tmp_path)
    async with site(store, tmp_path, KEY) as page, chromium(width) as tab:
        complaints: list[str] = []
        tab.on("console", lambda said: complaints.append(said.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        await tab.goto(page.url)
        assert await tab.evaluate("location.pathname") == "/page/login"
        await picture(f"login-{width}", tab)
        await tab.fill("#key", KEY)
        await click(tab, "main button")
        assert await tab.evaluate("location.pathname") == "/"
        yield page, tab, complaints


async def click(tab: Any, selector: str) -> None:
    """Presses what the selector finds first, and waits for the page that this loads."""
    async with tab.expect_navigation():
        await tab.click(selector)


@needs_browser
@needs_axe
@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_too_wide_breaks_its_rules_or_shuts_people_out(
    store: Store, tmp_path: Path, width: int
) -> None:
    async def run() -> None:
        axe = await asyncio.to_thread(AXE.read_text)
        async with browsing(store, tmp_path, width) as (page, tab, complaints):
            for path in SHOWN:
                await tab.goto(page.url + path)
                await tab.evaluate(f"{axe};0")
                for scheme, background in SCHEMES.items():
                    await tab.emulate_media(color_scheme=scheme)
                    assert await tab.evaluate(OVERFLOW) <= 0, (path, width)
                    colour = await tab.evaluate("getComputedStyle(document.body).backgroundColor")
                    assert colour == background, "the stylesheet holds"
                    await picture(f"{NAME.sub('-', path)}-{width}-{scheme}", tab)
                    found = await tab.evaluate(VIOLATIONS)
                    bad = [one for one in found if one["impact"] in ("serious", "critical")]
                    assert bad == [], (path, scheme)
            assert [one for one in complaints if "404" not in one] == []

    asyncio.run(run())


@needs_browser
def test_every_button_works(store: Store, tmp_path: Path) -> None:
    pressed: set[str] = set()
    buttons = "[...document.querySelectorAll('button, a.button')].map(b => b.innerText)"

    async def run() -> None:
        async with browsing(store, tmp_path, 390) as (page, tab, _):
            pressed.add("Log in")

            async def press(path: str, selector: str, *, says: str) -> None:
                """Presses a button of a page and reads what the next page says."""
                if path:
                    await tab.goto(page.url + path)
                text = await tab.inner_text(selector)
                pressed.add(text)
                await click(tab, selector)
                assert says in await tab.inner_text("body"), (path, text)

            turn = "/page/turns/turn_5"
            await press(turn, ".feedback button.good", says="Kept: +1.")
            await press(turn, ".feedback button[value='0']", says="Kept: +0.")
            await tab.goto(page.url + turn)
            await tab.fill("#hint", "Be brief.")
            await press("", ".feedback button.bad", says="Kept: -1.")
            assert store.judging.feedback("turn_5") == Feedback("turn_5", -1, "Be brief.")
            await press("", "main a.button", says="Conversation")
            await press("/page/turns/turn_0", "a[href$='/forget']", says="cannot be undone")
            await press("", "main button", says="forgot 1 turn")
            assert store.turns.get("turn_0") is None
            await press("/page/session?name=short-2", "a[href*='/forget']", says="1 turn:")
            await press("", "main button", says="forgot 1 turn")
            assert store.turns.of_session("short-2", ["main"], 9) == []
            await press("/", "a[href$='/pause']", says="takes no batch any more until")
            await press("", "main button", says="main takes no batch any more.")
            assert store.versions.decisions("main").pause is not None
            await press("/page/versions", "a[href$='/resume']", says="Let main go on?")
            await press("", "main button", says="trains again")
            assert store.versions.decisions("main").pause is None
            await press("/page/versions/main/1", "a.button", says="Serve version 1?")
            await press("", "main button", says="Version 1 serves main now.")
            assert store.versions.serving("main").number == 1
            for path, word in (("/page/turns", "Turns"), ("/page/sessions", "Sessions")):
                await press(path, "a[rel=next]", says=word)
                assert "before=" in await tab.evaluate("location.search")
                await press("", ".pager a", says=word)
            await press("/page/turns", ".filters button", says="Turns")
            await tab.goto(f"{page.url}/page/episodes")
            await tab.select_option("select", "failed")
            await press("", ".filters button", says="words-1-1")
            assert "words-1-0" not in await tab.inner_text("main")
            await press("/page/export", ".filters button", says="nextstate export sft --out")
            button = "main form[method=post] button"
            pressed.add(await tab.inner_text(button))
            async with tab.expect_download() as coming:
                await tab.click(button)
            download = await coming.value
            assert download.suggested_filename == "main-sft.jsonl"
            saved = await asyncio.to_thread(Path(await download.path()).read_text)
            assert "The cache was cold" in saved.splitlines()[0]
            known: set[str] = set()
            for path in SHOWN:
                await tab.goto(page.url + path)
                known |= set(await tab.evaluate(buttons))
            await press("/", "header button", says="Log in")
            assert known <= pressed, known - pressed

    asyncio.run(run())


@needs_browser
def test_a_page_shows_what_happens_without_being_loaded_again(store: Store, tmp_path: Path) -> None:
    async def run() -> None:
        async with browsing(store, tmp_path, 1100) as (page, tab, complaints):
            await tab.goto(page.url)
            await tab.evaluate("document.querySelector('details').open = true")
            await tab.evaluate("window.same = document.querySelector('summary'); same.focus()")
            await asyncio.to_thread(store.versions.pause, "main", "ann")
            await tab.wait_for_selector("text=Let it go on")
            assert await tab.evaluate("document.querySelector('details').open")
            assert await tab.evaluate("document.activeElement === same")
            await tab.goto(f"{page.url}/page/turns")
            await tab.focus("#turn_525 a")
            await tab.evaluate("window.mark = 1")
            messages = [{"role": "user", "content": "Is it <b>live</b>?"}]
            new = turn(900, request={"messages": messages}, session="agent-3")
            await asyncio.to_thread(add, store, new)
            await tab.wait_for_selector("article >> nth=0 >> css=:scope#turn_900")
            assert "Is it <b>live</b>?" in await tab.inner_text("body")
            assert await tab.evaluate("document.activeElement.closest('article').id") == "turn_525"
            assert await tab.evaluate("window.mark") == 1
            assert complaints == []

    asyncio.run(run())


@needs_browser
def test_the_keyboard_reaches_everything_and_shows_where_it_is(
    store: Store, tmp_path: Path
) -> None:
    async def run() -> None:
        async with browsing(store, tmp_path, 1100) as (page, tab, _):
            for path in ("/", "/page/turns/turn_3", "/page/episodes", "/page/running"):
                await reach_everything(tab, page.url + path)

    asyncio.run(run())


async def reach_everything(tab: Any, url: str) -> None:
    """Goes through a page with the Tab key."""
    await tab.goto(url)
    await tab.keyboard.press("Tab")
    assert await tab.evaluate("document.activeElement.className") == "skip", url
    assert await tab.evaluate("document.activeElement.getBoundingClientRect().x") >= 0, url
    wanted = await tab.evaluate(
        "window.wanted = [...document.querySelectorAll('a, button, input, select, textarea,"
        " summary, [tabindex]')].filter(e => e.type !== 'hidden' && e.getClientRects()"
        ".length); wanted.length"
    )
    reached = {0}
    for _ in range(wanted):
        await tab.keyboard.press("Tab")
        place = await tab.evaluate("wanted.indexOf(document.activeElement)")
        if place >= 0:
            style = "getComputedStyle(document.activeElement).outlineStyle"
            assert await tab.evaluate(style) == "solid", (url, place)
            reached.add(place)
    missed = sorted({*range(wanted)} - reached)
    html = [await tab.evaluate(f"wanted[{place}].outerHTML") for place in missed]
    assert html == [], url
    await tab.goto(url)
    for key in ("Tab", "Enter", "Tab"):
        await tab.keyboard.press(key)
    assert await tab.evaluate("document.activeElement.closest('main') !== null"), url


async def picture(name: str, tab: Any) -> None:
    if PICTURES is not None:
        await tab.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)
