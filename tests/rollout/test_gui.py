"""plugins/environments/gui.py: the pages in a real Chromium, and what breaks or attacks it."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.episodes import Split
from nextstate.errors import ConfigError, RolloutError, StartError
from nextstate.hooks import Acted
from nextstate.store import Store
from plugins.environments import browsers
from plugins.environments.browsers import Limits
from plugins.environments.gui import HOW, MOST_SHOWN, PageKind, Settings, action_of, create, shown
from plugins.environments.gui_tasks import PAGES, UNSEEN, pages, solution, task
from rollout.pictures import Pictures
from rollout.runner import Plan, run
from rollout.tasks import Task
from tests.proxy.running_proxy import Running, both, until
from tests.rollout.machine import needs_chromium
from tests.rollout.test_runner import client
from tests.scripted_engine import Script, ScriptedEngine

PROCESSES = subprocess  # this file starts processes
ONE = Limits(browsers=1)
FLOORS = {"click-button": 0.7, "click-link": 0.6, "click-option": 0.6, "choose-list": 0.4}
"""What random actions solve at most: these pages have few elements, and some end at the first."""
MOST_CALLS = 6


def fields(page: str, split: str, number: int) -> dict[str, Any]:
    """What the environment reads of a task."""
    made = task(page, split, number)
    return {name: made[name] for name in ("page", "seed", "words")}


async def attempt(
    kind: PageKind, page: str, split: str, number: int, act: Callable[[str, str], str] | None = None
) -> float:
    """The outcome of an episode, by the task's solution or an agent: of (first, last shown)."""
    made, environment = fields(page, split, number), kind.make()
    kind.check_task(made)
    try:
        first = last = await environment.reset(made, 0)
        for reply in solution(page, first) if act is None else [None] * MOST_CALLS:
            acted = await environment.step(reply or act(first, last))  # type: ignore[misc]
            assert act is not None or acted.reward == 0.0, (first, reply, acted)
            last = acted.observation
            if acted.done:
                break
        return (await environment.score()).outcome
    finally:
        await environment.close()


def guesser(draw: random.Random) -> Callable[[str, str], str]:
    """Does something possible with any element; what it types is a word of the task."""

    def act(first: str, last: str) -> str:
        found = draw.choice(re.findall(r"^(\d+) (\w+)(.*)$", last, re.MULTILINE))
        if found[1] in ("input", "password"):
            words = re.findall(r"\w+", first.splitlines()[0])
            return f"type {found[0]} {draw.choice(words)}"
        if found[1] == "list":
            options = re.findall(r'"([^"]*)"', found[2])
            return f"select {found[0]} {draw.choice(options)}"
        return f"click {found[0]}"

    return act


async def outcomes(kind: PageKind, page: str, split: str, count: int, seed: int | None) -> float:
    """The share of tasks that the solution solves, or random actions if there is a seed."""
    draws = [None if seed is None else guesser(random.Random(seed + at)) for at in range(count)]
    tries = (attempt(kind, page, split, at, draw) for at, draw in enumerate(draws))
    return sum([outcome >= 1 for outcome in await asyncio.gather(*tries)]) / count


@needs_chromium
def test_the_oracle_solves_each_page_and_random_actions_few() -> None:
    async def test(kind: PageKind) -> None:
        for page in PAGES:
            assert await outcomes(kind, page, "eval", 1, None) == 1.0
        guessed = [await outcomes(kind, page, "eval", 2, 0) for page in PAGES]
        assert sum(guessed) / len(guessed) <= 0.4

    in_browser(test, Settings(ONE))


@needs_chromium
@pytest.mark.soak
@pytest.mark.parametrize("page", PAGES)
def test_the_oracle_solves_every_task_and_random_actions_reach_the_floor(page: str) -> None:
    async def test(kind: PageKind) -> None:
        for split in ("train", "eval"):
            if page in pages(split):
                assert await outcomes(kind, page, split, 20, None) == 1.0
        assert await outcomes(kind, page, "eval", 20, 0) <= FLOORS.get(page, 0.2)

    in_browser(test, Settings())


def in_browser(test: Callable[[PageKind], Awaitable[None]], settings: Settings) -> None:
    async def run() -> None:
        kind = create(settings)
        try:
            await test(kind)
        finally:
            await kind.release()

    asyncio.run(run())


@needs_chromium
def test_a_task_is_the_same_each_time_and_its_words_are_those_of_its_split() -> None:
    async def test(kind: PageKind) -> None:
        async def names(seed: int, words: str | None) -> str:
            page = kind.make()
            try:
                task = {"page": "choose-list", "seed": seed, "words": words}
                return (await page.reset(task, 0)).partition('"Submit"')[0]
            finally:
                await page.close()

        assert await names(1, "train") == await names(1, "train") != await names(2, "train")
        train, held_out = [
            set(re.findall(r'"([^"]*)"', "".join([await names(seed, split) for seed in range(4)])))
            for split in ("train", "eval")
        ]
        assert not train & held_out
        assert min(len(train), len(held_out)) > 10

    in_browser(test, Settings(ONE))


async def play(kind: PageKind, page: str, *replies: str) -> list[Acted]:
    environment = kind.make()
    try:
        await environment.reset({"page": page, "seed": 1}, 0)
        return [await environment.step(reply) for reply in replies]
    finally:
        await environment.close()


@needs_chromium
def test_a_mistake_is_told_and_costs() -> None:
    async def test(kind: PageKind) -> None:
        acted = await play(
            kind,
            "login-user",
            *("I log in.", "click 9", "type 3 Ida", "select 1 Ida", "click 0", "type 1 Ida"),
        )
        begins = [one.observation.split("\n", 1)[0] for one in acted]
        assert begins == [
            f"error: this is no action. {HOW}",
            "error: there is no such element",
            "error: nothing can be typed into it",
            "error: it is no list",
            "error: there is no such element",
            'text "Username"',
        ]
        assert [one.reward for one in acted] == [-1.0] * 5 + [0.0]
        assert '1 input holds "Ida"' in acted[-1].observation
        (wrong,) = await play(kind, "choose-list", "select 1 Nobody")
        assert wrong.observation.startswith("error: it has no such option")

    in_browser(test, Settings(ONE))


PAGE = """<!DOCTYPE html><script>
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
      const told = [], tell = (text) => document.getElementById("said").append(text + " ");
      for (const address of ["{url}/image", "file:///usr/share/doc/bash/copyright"]) {{
        fetch(address).then(() => tell("read"), () => tell("refused"));
        const frame = document.createElement("iframe");
        frame.src = address;
        frame.width = frame.height = 1;
        document.body.append(frame);
      }}
      new WebSocket("{url.replace("http", "ws")}/socket").onerror = () => tell("refused");
      window.open("{url}/window");
      alert("wait for me");
    </script><button onclick="location = '{url}/page'">go</button>"""

    async def test(kind: PageKind) -> None:
        page = kind.make()
        try:
            shown = await page.reset({"page": "hostile", "seed": 0}, 0)
            while shown.count("refused") < 3:
                shown = (await page.step("click 9")).observation
            assert "read" not in shown
            for _ in range(3):
                assert (await page.step("click 1")).reward == 0.0  # it stays where it is
        finally:
            await page.close()

    try:
        in_browser(test, hostile(tmp_path, area))
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
        async def one(number: int) -> None:
            nonlocal most
            page = kind.make()
            await page.reset({"page": "hostile", "seed": 0}, 0)
            playing.add(number)
            most = max(most, len(playing))
            assert len(processes(folder)) <= 2  # bwrap and its child
            await page.step("click 2")
            playing.remove(number)
            await page.close()

        await asyncio.gather(*map(one, range(5)))

    # Two browsers one after the other
    in_browser(test, Settings(Limits(browsers=1, tabs=2, episodes=3), folder))
    assert most == 2


ENDS = """<button onclick='WOB_DONE_GLOBAL = true; WOB_RAW_REWARD_GLOBAL = 1'>end</button>
<button onclick='while (true);'>hang</button>"""


@needs_chromium
def test_the_runner_keeps_pictures_tells_hung_pages_from_failures_and_ends_its_browsers(
    store: Store, tmp_path: Path
) -> None:
    settings = hostile(tmp_path, ENDS, limits=Limits(browsers=1, answer_s=8.0))
    assert settings.pages is not None
    folder = settings.pages

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += [Script((text,)) for text in ("click 9", "click 1", "click 2")]
        given = [Task(name, Split.TRAIN, {"page": "hostile", "seed": 0}) for name in ("a", "b")]
        async with client(p) as proxy:
            pictures = Pictures(tmp_path / "pictures")
            plan = Plan("gui", parallel=1, group_size=1, deadline_s=60)
            solved, hung = await run(plan, given, create(settings), proxy, lambda _: None, pictures)
        assert (solved.status, solved.outcome, solved.calls) == ("done", 1.0, 2)
        assert (hung.status, hung.outcome) == ("failed", None)
        kept = tmp_path / "pictures" / solved.episode
        assert sorted(path.name for path in kept.iterdir()) == ["0.jpg", "1.jpg"]
        assert (kept / "0.jpg").read_bytes().startswith(b"\xff\xd8")
        assert processes(folder) == []

    both(test, store, tmp_path)


@given(st.text() | st.from_regex(r"(click|type|select) [0-9]{1,4}.*"))
def test_any_reply_is_an_action_or_none(reply: str) -> None:
    found = action_of(reply)
    assert found is None or {*found} == {"verb", "number", "text"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
)
_LINES = st.lists(
    st.dictionaries(st.sampled_from(["kind", "name", "value", "on", "options", "number"]), _JSON)
)


@given(st.fixed_dictionaries({"lines": _LINES | _JSON, "more": _JSON}))
def test_whatever_a_page_answers_the_observation_is_printable_and_bounded(answer: Any) -> None:
    text = shown(answer)
    assert len(text) <= MOST_SHOWN + 20
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"page": "../core/core"}, "page = '../core/core': expected a name such as click-button"),
        ({"page": None}, "page = None: expected a name"),
        ({"seed": -1}, "seed = -1: expected a whole number, 0 to 2147483647"),
        ({"seed": True}, "seed = True: expected a whole number"),
        ({"words": "all"}, "words = 'all': expected train or eval, or none"),
        ({"url": "x"}, "unknown field 'url': known are page, seed, words"),
    ],
)
def test_a_wrong_task_is_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        create(None).check_task({"page": UNSEEN, "seed": 1, **given})
    assert str(error.value).startswith(told)


@needs_chromium
def test_an_unknown_page_is_named() -> None:
    with pytest.raises(ConfigError, match=r"page = 'click-all': MiniWoB\+\+ has no such page"):
        create(None).check_task({"page": "click-all", "seed": 1})


def test_a_missing_program_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browsers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartError) as error:
        asyncio.run(create(None).check_machine())
    assert str(error.value).startswith(
        "playwright and miniwob and chromium and bubblewrap not found: run `make gui`"
    )
