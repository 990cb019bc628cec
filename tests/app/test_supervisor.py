"""Child processes are restarted, explained and ended, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nextstate.app.child_states import read_child_states, write_child_states
from nextstate.app.supervisor import Backoff, Child, Supervisor, Timing, end, start
from nextstate.engine.process import cause_of_death
from nextstate.errors import StartError

FAST = Timing(first_pause_s=0.01, poll_s=0.01)


def child_of(tmp_path: Path, code: str, log_file: Path | None = None, **more: object) -> Child:
    argv = [sys.executable, "-c", code]
    log_file = log_file or tmp_path / "child.log"
    return Child("child", argv, log_file, **more)  # pyright: ignore[reportArgumentType]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


SLEEP = "import time; print('up', flush=True); time.sleep(600)"
WITH_WORKER = (
    "import subprocess, sys, signal, time\n"
    "worker = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'])\n"
    "print(worker.pid, flush=True)\n"
    "time.sleep(600)"
)


def test_a_killed_child_is_restarted(tmp_path: Path) -> None:
    async def run() -> None:
        child = child_of(tmp_path, SLEEP)
        keeper = Supervisor([child])
        running = asyncio.create_task(keeper.run())
        for times in (1, 2, 3):
            await until(lambda times=times: text(child.log_file).count("up") == times)
            assert child.process is not None
            if times < 3:
                os.kill(child.process.pid, signal.SIGKILL)
        assert child.starts == 3
        keeper.stopping.set()
        await running
        assert child.process.returncode is not None

    asyncio.run(run())


def test_ending_a_child_ends_its_workers(tmp_path: Path) -> None:
    async def run() -> None:
        child = child_of(tmp_path, WITH_WORKER)
        await start(child)
        await until(lambda: "\n" in text(child.log_file))
        worker = psutil.Process(int(text(child.log_file)))
        await end(child, grace_s=5)
        await until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)

    asyncio.run(run())


def test_a_child_is_restarted_without_its_log_and_after_a_failed_start(tmp_path: Path) -> None:
    async def run() -> None:
        child = child_of(tmp_path, SLEEP, tmp_path / "logs" / "child.log", was_ready=True)
        states: list[str] = []
        keeper = Supervisor([child], lambda: states.append(child.state), timing=FAST)
        running = asyncio.create_task(keeper.run())
        await until(lambda: "up" in text(child.log_file))
        child.log_file.unlink()
        child.log_file.parent.rmdir()
        child.log_file.parent.write_text("a file where the folder was")
        assert child.process is not None
        os.kill(child.process.pid, signal.SIGKILL)
        await until(lambda: any("child cannot be started: [Errno" in state for state in states))
        child.log_file.parent.unlink()
        await until(lambda: "up" in text(child.log_file))
        keeper.stopping.set()
        await running

    asyncio.run(run())


def test_a_child_without_a_log_says_why_it_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    child = child_of(tmp_path, SLEEP, tmp_path / "logs" / "child.log")
    with pytest.raises(StartError, match=r"child cannot be started: .*logs"):
        asyncio.run(Supervisor([child]).run())


def test_a_child_that_cannot_start_ends_everything_with_its_message(tmp_path: Path) -> None:
    async def run() -> None:
        other = child_of(tmp_path, SLEEP)
        other.log_file = tmp_path / "other.log"
        code = (
            "import sys; print('nextstate: [proxy] port is in use', file=sys.stderr); sys.exit(2)"
        )
        with pytest.raises(StartError, match=r"^\[proxy\] port is in use$"):
            await Supervisor([other, child_of(tmp_path, code)]).run()
        assert other.process is not None
        assert other.process.returncode is not None

    asyncio.run(run())


REFUSE = (
    "import sys; print('refused', flush=True);"
    "print('nextstate: [learner] drift_limit is too small', file=sys.stderr); sys.exit(2)"
)


def test_a_child_that_needs_a_person_is_paused_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "nextstate.toml"
    config.write_text("")

    async def run() -> None:
        other = child_of(tmp_path, SLEEP, log_file=tmp_path / "other.log", was_ready=True)
        refusing = child_of(tmp_path, REFUSE, was_ready=True, retry_on_change=[config])
        states: list[str] = []
        keeper = Supervisor([other, refusing], lambda: states.append(refusing.state), timing=FAST)
        running = asyncio.create_task(keeper.run())
        await until(lambda: refusing.state.startswith("stopped"))
        assert "[learner] drift_limit is too small; tried again when" in refusing.state
        assert refusing.state.endswith("nextstate.toml changes, or in 10 min")
        assert states[-1] == refusing.state
        await until(lambda: "up" in text(other.log_file))
        assert (refusing.starts, other.starts, other.state) == (1, 1, "up")
        config.write_text("[learner]\ndrift_limit = 0.2\n")
        await until(lambda: refusing.starts == 2)
        await until(lambda: refusing.state.startswith("stopped"))
        assert refusing.state.endswith("or in 20 min")
        keeper.stopping.set()
        await running

    asyncio.run(run())
    assert sum("stopped, the others go on" in r.getMessage() for r in caplog.records) == 2


def test_one_that_ran_before_ends_nobody_when_it_cannot_start_again(tmp_path: Path) -> None:
    """As a proxy's worker that crashes after the configuration was spoilt."""
    spoilt = tmp_path / "spoilt"
    code = f"""
import os, sys, time
if os.path.exists({str(spoilt)!r}):
    print("nextstate: port is a text", file=sys.stderr)
    sys.exit(2)
{SLEEP}
"""

    async def run() -> None:
        other = child_of(tmp_path, SLEEP, log_file=tmp_path / "other.log")
        worker = child_of(tmp_path, code, retry_on_change=[spoilt])
        keeper = Supervisor([other, worker], timing=FAST)
        running = asyncio.create_task(keeper.run())
        await until(lambda: "up" in text(worker.log_file) and "up" in text(other.log_file))
        spoilt.touch()
        assert worker.process is not None
        os.kill(worker.process.pid, signal.SIGKILL)
        await until(lambda: worker.state.startswith("stopped: port is a text") or running.done())
        assert not running.done()
        assert (other.starts, other.state) == (1, "up")
        spoilt.unlink()
        await until(lambda: text(worker.log_file).count("up") == 2)
        keeper.stopping.set()
        await running

    asyncio.run(run())


def test_a_paused_child_is_started_when_the_engine_restarts(tmp_path: Path) -> None:
    async def run() -> None:
        engine = child_of(tmp_path, SLEEP, log_file=tmp_path / "engine.log", was_ready=True)
        engine.name = "engine"
        refusing = child_of(tmp_path, REFUSE, was_ready=True, retry_with=["engine"])
        keeper = Supervisor([engine, refusing], timing=FAST)
        running = asyncio.create_task(keeper.run())
        await until(lambda: refusing.state.startswith("stopped"))
        await until(lambda: "up" in text(engine.log_file))
        assert refusing.starts == 1
        assert engine.process is not None
        os.kill(engine.process.pid, signal.SIGKILL)
        await until(lambda: refusing.starts == 2)
        keeper.stopping.set()
        await running

    asyncio.run(run())


def test_pauses_double_up_to_the_longest_and_start_over_after_a_long_run() -> None:
    refusals = Backoff(600, 6 * 3600)
    pauses = [refusals.pause_s(1) for _ in range(8)]
    assert pauses == [600, 1200, 2400, 4800, 9600, 19200, 21600, 21600]
    assert [refusals.pause_s(ran_s) for ran_s in (21600, 21601, 1)] == [21600, 600, 1200]
    restarts = Backoff(1, 30, steady_s=60)
    assert [restarts.pause_s(ran_s) for ran_s in (1, 59, 60, 61, 1)] == [1, 2, 4, 1, 2]


def test_states_are_shown_only_while_the_supervisor_lives(tmp_path: Path) -> None:
    assert read_child_states(tmp_path) == {}
    write_child_states(tmp_path, {"learner": "stopped: why"})
    assert read_child_states(tmp_path) == {"learner": "stopped: why"}
    for broken in (
        '{"supervisor": 4194305, "children": {"learner": "up"}}',
        "{",
        '{"supervisor": "x"}',
        "[]",
        "",
    ):
        (tmp_path / "children.json").write_text(broken)
        assert read_child_states(tmp_path) == {}


def test_an_engine_that_dies_at_start_is_explained_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "child.log").write_text("ValueError: of an earlier run\n")

    async def run() -> None:
        child = child_of(
            tmp_path,
            "raise ValueError('no such model')",
            explain=lambda log: f"vLLM ended: {cause_of_death(log)}",
        )
        with pytest.raises(StartError, match=r"vLLM ended: ValueError: no such model; .*child.log"):
            await Supervisor([child]).run()

    asyncio.run(run())


def test_an_engine_that_dies_after_it_served_did_not_fail_at_its_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        child = child_of(
            tmp_path,
            "print('OSError: long ago'); raise SystemExit(3)",
            explain=lambda log: f"vLLM ended before it could serve: {cause_of_death(log)}",
            was_ready=True,
        )
        keeper = Supervisor([child])
        running = asyncio.create_task(keeper.run())
        await until(lambda: child.state.startswith("restarting"))
        keeper.stopping.set()
        await running

    asyncio.run(run())
    assert "child ended, restarting in 1 s: child ended with code 3; the whole log" in caplog.text
