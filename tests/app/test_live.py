"""What `nextstate up` shows while the loop runs, on a terminal and elsewhere."""

from __future__ import annotations

import asyncio
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from nextstate.app.child_states import write_child_states
from nextstate.app.cli.up import draw
from nextstate.app.first_file import OTHER_AGENT
from nextstate.app.live import OwnLog, Seen, Watcher, news
from nextstate.app.live_screen import Frame, marks_for, screen
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.records import Json, PolicyVersion, VersionState
from nextstate.store import Store
from tests.store.test_records import add, judge, turn

UP = {"engine": "up", "proxy": "up", "judge": "up", "learner": "up"}
HEALTHY: Json = {"engine": "up"}
ESC = "\x1b[2J\x1b]0;title\x07"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    lineages = '[lineages.alice]\nmodel = "alice"\n'
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n{lineages}')
    return Settings.read(file)


@pytest.fixture
def seen(settings: Settings) -> Seen:
    """A loop with three judged turns of two versions, in eight sessions each."""
    store = Store(settings.store)
    store.versions.add(PolicyVersion("main", 1, 0, "/a", "ff", 16, VersionState.CANDIDATE), None)
    for number in range(16):
        served = turn(number, session=f"s{number}", policy_version=number // 8)
        add(store, served)
        judge(store, number, 1 if number >= 8 else -1)
    store.versions.set_serving("main", 1)
    (store.dir / "logs").mkdir()
    found = Watcher(settings, store).look(UP, HEALTHY)
    store.close()
    return found


def drawn(seen: Seen, width: int = 100, height: int = 40, encoding: str = "utf-8") -> str:
    frame = Frame("http://127.0.0.1:8080", "next", 0.0, width, height, marks_for(encoding))
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=output, width=width, height=height, force_terminal=False)
    console.print(screen(seen, frame, 3720.0))
    output.seek(0)
    return output.read()


def test_the_screen_shows_parts_turns_verdicts_versions_and_what_is_waited_for(seen: Seen) -> None:
    found = " ".join(drawn(seen).split())
    for text in (
        "NextState  ·  http://127.0.0.1:8080/v1  ·  up 1 h 2 min",
        "● engine  ● proxy  ● judge  ● learner",
        "16; 16 can train",
        "8 good  0 neither  8 bad",
        "version 1 serves",
        "from -1.00 (version 0) to +1.00 (version 1), more than chance explains",
        "16 judged turns are ready; an update takes 16.",
        "alice",
        "Last error  none",
    ):
        assert " ".join(text.split()) in found, text


@pytest.mark.parametrize("height", [12, 24, 60])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_screen_keeps_within_the_terminal(seen: Seen, width: int, height: int) -> None:
    lines = drawn(replace(seen, lineages=seen.lineages * 9), width, height).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= height or width < 80 or height < 24


def test_a_terminal_without_unicode_gets_a_screen_in_ascii(seen: Seen) -> None:
    assert "* engine  * proxy" in drawn(seen, encoding="ascii")


def test_text_from_elsewhere_cannot_control_the_terminal_or_fill_it(
    settings: Settings, seen: Seen
) -> None:
    folder = settings.store.path / "learner" / "main"
    folder.mkdir(parents=True)
    (folder / "problem").write_text(ESC + "[bold]drift[/bold] " * 500)
    store = Store(settings.store)
    watcher = Watcher(settings, store)
    watcher.note("judge", ESC + "x\n" * 5000)
    found = drawn(watcher.look({**UP, "judge": f"restarting: {ESC}"}, HEALTHY))
    store.close()
    assert "\x1b" not in found
    assert "\x07" not in found
    assert "[bold]drift[/bold]" in found
    assert "● judge (restarting)" in found
    assert len(found.splitlines()) < 45


def test_the_newest_error_of_any_log_is_shown_with_its_part(settings: Settings) -> None:
    store = Store(settings.store)
    logs = store.dir / "logs"
    logs.mkdir()
    (logs / "judge.log").write_text("2026-01-01 10:00:00,0 ERROR judge.stage an old one\n")
    watcher = Watcher(settings, store, clock=lambda: 5.0)
    assert watcher.look(UP, HEALTHY).last_error is None
    with (logs / "judge.log").open("a") as log:
        log.write("2026-01-01 10:00:01,0 WARNING judge.stage no ERROR yet\n")
        log.write("2026-01-01 10:00:02,0 ERROR judge.stage turn=turn_1 has no votes\n")
        log.write("2026-01-01 10:00:03,0 INFO judge.stage goes on\n")
    (logs / "engine.log").write_text("")
    error = watcher.look(UP, HEALTHY).last_error
    assert error is not None
    assert (error.at, error.part) == (5.0, "judge")
    assert error.text == "judge.stage turn=turn_1 has no votes"
    with (logs / "engine.log").open("a") as log:
        log.write("(EngineCore pid=1) ERROR 11-29 18:38:11 [core.py:1] out of memory\n")
    error = watcher.look(UP, HEALTHY).last_error
    assert error is not None
    assert (error.part, error.text) == ("engine", "11-29 18:38:11 [core.py:1] out of memory")
    store.close()


def test_lines_say_what_has_changed_and_nothing_twice(seen: Seen, settings: Settings) -> None:
    first = news(None, seen)
    assert first[:4] == ["engine: up", "proxy: up", "judge: up", "learner: up"]
    assert first[4].startswith("main: version 1 serves; It looks so: the score went from -1.00")
    assert news(seen, seen) == []
    waiting = [replace(seen, problems=[f"{count} turns wait for the store"]) for count in (3, 8)]
    assert news(seen, waiting[0]) == ["3 turns wait for the store"]
    assert news(*waiting) == []
    assert news(waiting[1], seen) == ["nothing is wrong any more"]
    served = replace(seen.lineages[0], serving=2, answer="Not clear yet")
    changed = replace(
        seen, parts={**UP, "judge": "stopped: no key"}, lineages=(served, *seen.lineages[1:])
    )
    assert news(seen, changed) == [
        "judge: stopped: no key",
        "main: version 2 serves; Not clear yet",
    ]


def test_processes_that_are_well_are_no_problem_and_others_are(settings: Settings) -> None:
    store = Store(settings.store)
    write_child_states(store.dir, UP)
    watcher = Watcher(settings, store)
    assert watcher.look(UP, HEALTHY).problems == []
    write_child_states(store.dir, {**UP, "judge": "stopped: no key"})
    assert watcher.look(UP, HEALTHY).problems == ["The part judge: stopped: no key"]
    store.close()


def test_own_warnings_are_printed_until_a_screen_takes_them(settings: Settings) -> None:
    store, printed = Store(settings.store), list[str]()
    watcher, handler = Watcher(settings, store), OwnLog(printed.append)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning("judge ended, restarting in %.0f s", 1)
    handler.watcher = watcher
    logger.info("not a warning")
    logger.warning("learner ended")
    assert printed == ["judge ended, restarting in 1 s"]
    error = watcher.look(UP, HEALTHY).last_error
    assert error is not None
    assert (error.part, error.text) == ("up", "learner ended")
    store.close()


def drawn_until_it_ends(settings: Settings, agent: str | None) -> str:
    """All that `draw` writes to a terminal."""
    store, stopping = Store(settings.store), asyncio.Event()

    class Loop:
        """Stands for a `Stack` whose second look finds it ending."""

        def __init__(self) -> None:
            self.settings = settings
            self.stopping = stopping

        def states(self) -> dict[str, str]:
            return UP

        async def health(self) -> Json:
            stopping.set()
            return HEALTHY

    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80, height=24)
    asyncio.run(draw(cast(Stack, Loop()), console, Watcher(settings, store), agent))
    store.close()
    return output.getvalue()


def test_the_screen_lasts_until_the_loop_ends_and_leaves_the_terminal_as_it_was(
    settings: Settings,
) -> None:
    written = drawn_until_it_ends(settings, "openclaw")
    assert "nextstate connect openclaw" in written
    assert written.rindex("\x1b[?1049l") > written.rindex("\x1b[?1049h")
    assert written.endswith("ending\n")


@pytest.mark.parametrize("agent", [None, OTHER_AGENT])
def test_the_screen_names_no_agent_that_connect_does_not_know(
    settings: Settings, agent: str | None
) -> None:
    assert "nextstate connect AGENT" in drawn_until_it_ends(settings, agent)
