"""The real OpenClaw and a real small model: a correction makes a version, which the page shows.

OpenClaw has no other settings than those that `nextstate connect openclaw` writes. `make soak` runs
it; `make clients` installs OpenClaw.
"""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import smollm2
from nextstate.app.first_file import file_text, usual
from nextstate.engine.process import free_port
from tests.app.connect.openclaw_gateway import PROGRAM, environment
from tests.running_loop import Loop, run, wait_for

ASKED = "Tom has 3 apples and gets 4 more. How many has he?"
CORRECTION = "No, that is wrong. You should answer with one short sentence."

pytestmark = [
    pytest.mark.engine,
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PROGRAM.exists(), reason="OpenClaw is not installed: `make clients`"),
]


@pytest.fixture
def small_loop(tmp_path: Path) -> Iterator[Loop]:
    """`nextstate up` with SmolLM2 and the file that `up --yes` writes, but for folder and port."""
    config, port = tmp_path / "nextstate.toml", free_port()
    text = file_text(usual(0, smollm2.fetch()), gpus=[])
    config.write_text(
        text.replace('"~/.nextstate"', f'"{tmp_path}/state"').replace(
            "port = 8080", f"port = {port}"
        )
    )
    assert config.read_text().count(str(tmp_path)) == config.read_text().count(f" = {port}") == 1
    started = Loop(config, port)
    try:
        wait_for(lambda: "ready: " in started.log() or started.process.poll() is not None, 900)
        assert started.process.poll() is None, started.log()
        yield started
    finally:
        started.close()


def say(text: str, home: Path) -> str:
    """What OpenClaw answers in its one conversation."""
    argv = [str(PROGRAM), "agent", "--local", "--session-id", "talk", "--message", text]
    done = subprocess.run(
        argv,
        env=environment(home),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def page(loop: Loop, path: str) -> str:
    with urllib.request.urlopen(f"{loop.url}{path}", timeout=60) as answer:
        return answer.read().decode()


def test_a_correction_in_openclaw_makes_a_version_that_the_page_shows(
    small_loop: Loop, tmp_path: Path
) -> None:
    file = tmp_path / ".openclaw/openclaw.json"
    file.parent.mkdir()
    before = "// mine\n{}\n"
    file.write_text(before)
    command = ("connect", "openclaw", "--file", str(file), "--config", str(small_loop.config))
    connected = run(*command)
    assert connected.returncode == 0, connected.stderr
    print(connected.stdout, connected.stderr)

    print(say(ASKED, tmp_path))
    print(say(CORRECTION, tmp_path))
    turns = [turn for turn in small_loop.turns() if turn["kind"] == "main"]
    first = turns[0]
    print(f"{first}")
    assert [one["text"] for one in first["next_state"]] == [CORRECTION]
    wait_for(lambda: [v for v in small_loop.versions() if v["state"] == "serving"], 1800)
    (version,) = [v for v in small_loop.versions() if v["state"] == "serving"]
    assert version["number"] >= 1
    (first,) = [turn for turn in small_loop.turns() if turn["turn"] == first["turn"]]
    assert first["verdict"]["score"] == -1

    shown = page(small_loop, f"/page/versions/main/{version['number']}")
    assert first["turn"] in shown, "the page names the turns that made the version"
    assert f"/page/versions/main/{version['number']}" in page(small_loop, "/")
    if pictures := os.environ.get("NEXTSTATE_PICTURES"):
        _take_pictures(small_loop, version["number"], Path(pictures))

    assert run(*command, "--undo").returncode == 0
    assert file.read_text() == before


def _take_pictures(loop: Loop, version: int, folder: Path) -> None:
    import asyncio

    from tests.page.chromium import chromium

    async def take() -> None:
        async with chromium(1200) as tab:
            for name, path in (("home", "/"), ("version", f"/page/versions/main/{version}")):
                await tab.goto(loop.url + path)
                await tab.screenshot(path=folder / f"openclaw-{name}.png", full_page=True)

    asyncio.run(take())
