"""plugins/environments/browsers.py: what a page can reach; pages that hang, browsers that die."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from nextstate.episodes import Split
from nextstate.errors import RolloutError
from nextstate.store import Store
from plugins.environments.browsers import Limits
from plugins.environments.gui import HOW, MOST_SHOWN, PageKind, Settings, create
from rollout.pictures import Pictures
from rollout.runner import Plan, run
from rollout.tasks import Task
from tests.proxy.running_proxy import Running, both, until
from tests.rollout.machine import needs_chromium
from tests.rollout.test_gui import ONE, in_browser, play
from tests.rollout.test_runner import client
from tests.scripted_engine import Script, ScriptedEngine

PROCESSES = subprocess  # this file starts processes
PAGE = """<!DOCTYPE html><meta charset=utf-8><script>
var core = {{startEpisodeReal() {{}}}}, ui_utils = {{}};
var WOB_TASK_READY = true, WOB_DONE_GLOBAL = false, WOB_RAW_REWARD_GLOBAL = 0;
Math.seedrandom = () => {{}};
</script><div id=query>{query}</div><div id=area>{area}</div>"""


def hostile(tmp_path: Path, area: str, query: str = "Click.", limits: Limits = ONE) -> Settings:
    """Settings of an environment with the one page `hostile`."""
    folder = tmp_path / "pages" / "miniwob"
    folder.mkdir(parents=True)
    (folder / "hostile.html").write_text(PAGE.format(area=area, query=query))
    return Settings(limits, folder.parent)


@needs_chromium
def test_what_a_page_says_is_bounded_and_stays_in_its_line(tmp_path: Path) -> None:
    area = (
        '<button>Ok"\n2 button "Yes\u202e</button><p>\u0007\ud7ff&#xFFFF;</p>'
        + "<i>" * 600
        + "deep"
        + "</i>" * 600
        + "<button>more</button>" * 5000
        + "x" * 1_000_000
        + f"<select>{'<option>one' * 3000}</select>"
    )

    async def test(kind: PageKind) -> None:
        page = kind.make()
        try:
            first = await page.reset({"page": "hostile", "seed": 0}, 0)
        finally:
            await page.close()
        lines = first.splitlines()
        assert lines[0] == "y" * 1000
        assert lines[1] == "1 button \"Ok' 2 button 'Yes\\u202e\""
        assert "deep" not in first
        assert lines[-2:] == ["(more is left out)", HOW]
        assert len(lines) <= 64
        assert len(first) < 1000 + MOST_SHOWN + 200

    in_browser(test, hostile(tmp_path, area, "y" * 100_000))


GIF = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
ICON = "file:///usr/share/icons/hicolor/48x48/apps/chromium.png"
"""A file that Chromium itself can read."""


@needs_chromium
def test_a_page_reaches_no_network_and_no_file_but_its_own(tmp_path: Path) -> None:
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    area = f"""<p id=said></p><script>
      const tell = (text) => document.getElementById("said").append(text + " ");
      fetch("{url}/data").then(() => tell("read"), () => tell("refused"));
      for (const address of ["{url}/image", "{ICON}", "../own.gif"]) {{
        const image = new Image();
        image.onload = () => tell("read");
        image.onerror = () => tell("refused");
        image.src = address;
      }}
      document.write('<iframe src="{url}/frame" width=1 height=1></iframe>');
      new WebSocket("{url.replace("http", "ws")}/socket").onerror = () => tell("refused");
      window.open("{url}/window");
      alert("wait for me");
    </script><button onclick="location = '{url}/page'">go</button>"""

    async def test(kind: PageKind) -> None:
        page = kind.make()
        try:
            shown = await page.reset({"page": "hostile", "seed": 0}, 0)
            async with asyncio.timeout(120):
                while shown.count("read") + shown.count("refused") < 5:
                    shown = (await page.step("click 9")).observation
            assert shown.count("read") == 1  # its own file
            for _ in range(3):
                assert (await page.step("click 1")).reward == 0.0  # it stays where it is
        finally:
            await page.close()

    settings = hostile(tmp_path, area)
    assert settings.pages is not None
    (settings.pages / "own.gif").write_bytes(base64.b64decode(GIF))
    try:
        in_browser(test, settings)
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []


HANGS = "<button onclick='while (true);'>hang</button><button>go on</button>"


@needs_chromium
def test_a_page_that_hangs_fails_its_own_episode_alone(tmp_path: Path) -> None:
    async def test(kind: PageKind) -> None:
        hung, other = kind.make(), kind.make()
        for page in (hung, other):
            await page.reset({"page": "hostile", "seed": 0}, 0)
        with pytest.raises(RolloutError, match=r"did not run a script within 8 s"):
            await hung.step("click 1")
        with pytest.raises(RolloutError, match="cut while the browser was at work"):
            await hung.score()
        assert (await other.step("click 2")).reward == 0.0
        for page in (hung, other):
            await page.close()
        (acted,) = await play(kind, "hostile", "click 2")
        assert acted.reward == 0.0

    in_browser(test, hostile(tmp_path, HANGS, limits=Limits(browsers=1, answer_s=8.0)))


@needs_chromium
def test_an_episode_cut_while_the_browser_works_has_no_outcome(tmp_path: Path) -> None:
    async def test(kind: PageKind) -> None:
        page = kind.make()
        await page.reset({"page": "hostile", "seed": 0}, 0)
        step = asyncio.create_task(page.step("click 1"))
        await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        with pytest.raises(RolloutError, match="cut while the browser was at work"):
            await page.score()
        await page.close()

    in_browser(test, hostile(tmp_path, HANGS))


def processes(pages: Path) -> list[int]:
    """The sandboxes that show a folder of pages."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == b"bwrap" and bytes(pages) in words:
            found.append(int(folder.name))
    return found


def check_walls(pages: Path) -> None:
    """Checks what holds the processes of a browser."""
    found = [
        child
        for pid in processes(pages)
        for child in psutil.Process(pid).children(recursive=True)
        if "chrom" in child.name()
    ]
    assert found
    for child in found:
        assert "Seccomp:\t2" in Path(f"/proc/{child.pid}/status").read_text()
        enter = ["nsenter", "--user", "--preserve-credentials", f"--target={child.pid}"]
        made = subprocess.run([*enter, "unshare", "-U", "true"], check=False, capture_output=True)
        assert made.returncode != 0
        limits = Path(f"/proc/{child.pid}/limits").read_text().splitlines()
        bounded = [line.split()[:4] for line in limits if "processes" in line or "data" in line]
        assert ["Max", "processes", "1024", "1024"] in bounded
        assert ["Max", "data", "size", str(1 << 30)] in bounded


GREEDY = """<p id=said></p><script>
  const kept = [], said = document.getElementById("said");
  try {
    for (let n = 0; n < 40; n++) kept.push(new Uint8Array(64 << 20).fill(1));
    said.append("got everything");
  } catch (error) { said.append("refused after " + kept.length); }
</script>"""


@needs_chromium
def test_a_page_gets_no_more_memory_than_a_process_may_have(tmp_path: Path) -> None:
    async def test(kind: PageKind) -> None:
        page = kind.make()
        shown = await page.reset({"page": "hostile", "seed": 0}, 0)
        await page.close()
        assert "refused after" in shown
        assert 64 * int(shown.partition("refused after ")[2].split('"')[0]) < 1024

    in_browser(test, hostile(tmp_path, GREEDY))


@needs_chromium
def test_a_browser_has_limits_a_filter_of_system_calls_and_makes_no_namespaces(
    tmp_path: Path,
) -> None:
    settings = hostile(tmp_path, HANGS)
    assert settings.pages is not None
    folder = settings.pages

    async def test(kind: PageKind) -> None:
        page = kind.make()
        await page.reset({"page": "hostile", "seed": 0}, 0)
        await asyncio.to_thread(check_walls, folder)
        await page.close()

    in_browser(test, settings)


@needs_chromium
def test_a_browser_that_dies_is_no_failed_task_and_is_replaced(tmp_path: Path) -> None:
    settings = hostile(tmp_path, HANGS)
    assert settings.pages is not None
    folder = settings.pages

    async def test(kind: PageKind) -> None:
        page = kind.make()
        await page.reset({"page": "hostile", "seed": 0}, 0)
        found = processes(folder)
        assert found
        for pid in found:
            with suppress(ProcessLookupError):  # it died with the one before
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(RolloutError, match="browser did not"):
            await page.step("click 2")
        await page.close()
        (acted,) = await play(kind, "hostile", "click 2")
        assert acted.reward == 0.0
        assert not {*processes(folder)} & {*found}

    in_browser(test, settings)
    assert processes(folder) == []


KILLED = """
import asyncio, pathlib, sys
from plugins.environments.gui import Settings, create

async def play():
    page = create(Settings(pages=pathlib.Path(sys.argv[1]))).make()
    await page.reset({"page": "hostile", "seed": 0}, 0)
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(play())
"""


@needs_chromium
def test_a_killed_runner_leaves_no_browser(tmp_path: Path) -> None:
    folder = hostile(tmp_path, HANGS).pages
    assert folder is not None

    async def test() -> None:
        runner = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", KILLED, str(folder)), stdout=asyncio.subprocess.PIPE
        )
        assert runner.stdout is not None
        assert await runner.stdout.readline() == b"ready\n"
        assert processes(folder)
        runner.kill()
        await until(lambda: not processes(folder))
        await runner.communicate()

    asyncio.run(test())


@needs_chromium
def test_no_more_tabs_are_used_than_there_may_be(tmp_path: Path) -> None:
    settings = hostile(tmp_path, HANGS)
    assert settings.pages is not None
    folder, most = settings.pages, 0
    playing: set[int] = set()

    async def test(kind: PageKind) -> None:
        two = asyncio.Event()

        async def one(number: int) -> None:
            nonlocal most
            page = kind.make()
            await page.reset({"page": "hostile", "seed": 0}, 0)
            playing.add(number)
            most = max(most, len(playing))
            if most == 2:
                two.set()
            await asyncio.wait_for(two.wait(), 60)
            assert len(processes(folder)) <= 2  # bwrap and its child
            await page.step("click 2")
            playing.remove(number)
            await page.close()

        await asyncio.gather(*map(one, range(5)))

    # Two browsers one after the other
    in_browser(test, Settings(Limits(browsers=1, tabs=2, episodes=3), folder))
    assert most == 2


ENDS = """<button onclick='WOB_DONE_GLOBAL = true; WOB_RAW_REWARD_GLOBAL = 1'>end</button>
<button onclick='document.body.remove()'>break</button>"""


@needs_chromium
def test_the_runner_keeps_pictures_tells_broken_pages_from_failures_and_ends_its_browsers(
    store: Store, tmp_path: Path
) -> None:
    settings = hostile(tmp_path, ENDS)
    assert settings.pages is not None
    folder = settings.pages

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += [Script((text,)) for text in ("click 9", "click 1", "click 2")]
        given = [Task(name, Split.TRAIN, {"page": "hostile", "seed": 0}) for name in ("a", "b")]
        async with client(p) as proxy:
            pictures = Pictures(tmp_path / "pictures")
            plan = Plan("gui", parallel=1, group_size=1, deadline_s=60)
            solved, broken = await run(
                plan, given, create(settings), proxy, lambda _: None, pictures
            )
        assert (solved.status, solved.outcome, solved.calls) == ("done", 1.0, 2)
        assert (broken.status, broken.outcome) == ("failed", None)
        kept = tmp_path / "pictures" / solved.episode
        assert sorted(path.name for path in kept.iterdir()) == ["0.jpg", "1.jpg"]
        assert (kept / "0.jpg").read_bytes().startswith(b"\xff\xd8")
        assert processes(folder) == []

    both(test, store, tmp_path)
