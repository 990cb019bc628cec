"""Parts are restarted, explained and ended without leaving anything behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nextstate.app import supervisor
from nextstate.app.parts import read_parts, write_parts
from nextstate.app.supervisor import Part, Supervisor, end, start
from nextstate.config import EngineConfig
from nextstate.engine.process import cause_of_death, command, environment, free_port, port_is_free
from nextstate.errors import StartError


def part(tmp_path: Path, code: str, log_file: Path | None = None, **more: object) -> Part:
    argv = [sys.executable, "-c", code]
    log_file = log_file or tmp_path / "part.log"
    return Part("part", argv, log_file, **more)  # pyright: ignore[reportArgumentType]


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


def test_a_killed_part_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)

    async def run() -> None:
        child = part(tmp_path, SLEEP)
        keeper = Supervisor([child])
        running = asyncio.create_task(keeper.run())
        for times in (1, 2, 3):
            await until(lambda times=times: text(child.log_file).count("up") == times)
            assert child.process is not None
            if times < 3:
                os.kill(child.process.pid, signal.SIGKILL)
        assert child.restarts == 2
        keeper.stop()
        await running
        assert not child.running

    asyncio.run(run())


def test_ending_a_part_ends_the_workers_it_left(tmp_path: Path) -> None:
    async def run() -> None:
        child = part(tmp_path, WITH_WORKER)
        await start(child)
        await until(lambda: "\n" in text(child.log_file))
        worker = psutil.Process(int(text(child.log_file)))
        await end(child, grace_s=5)
        await until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)

    asyncio.run(run())


def test_a_part_comes_back_though_its_log_was_removed_or_it_cannot_be_started_for_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)

    async def run() -> None:
        child = part(tmp_path, SLEEP, tmp_path / "logs" / "part.log", was_ready=True)
        states: list[str] = []
        keeper = Supervisor([child], lambda: states.append(child.state))
        running = asyncio.create_task(keeper.run())
        await until(lambda: "up" in text(child.log_file))
        child.log_file.unlink()
        child.log_file.parent.rmdir()
        child.log_file.parent.write_text("a file where the folder was")
        assert child.process is not None
        os.kill(child.process.pid, signal.SIGKILL)
        await until(lambda: any("part cannot be started: [Errno" in state for state in states))
        child.log_file.parent.unlink()
        await until(lambda: "up" in text(child.log_file))
        keeper.stop()
        await running

    asyncio.run(run())


def test_a_part_that_cannot_even_be_started_says_why(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    child = part(tmp_path, SLEEP, tmp_path / "logs" / "part.log")
    with pytest.raises(StartError, match=r"part cannot be started: .*logs"):
        asyncio.run(Supervisor([child]).run())


def test_a_part_that_cannot_start_ends_everything_with_its_own_words(tmp_path: Path) -> None:
    async def run() -> None:
        other = part(tmp_path, SLEEP)
        other.log_file = tmp_path / "other.log"
        code = (
            "import sys; print('nextstate: [proxy] port is in use', file=sys.stderr); sys.exit(2)"
        )
        with pytest.raises(StartError, match=r"^\[proxy\] port is in use$"):
            await Supervisor([other, part(tmp_path, code)]).run()
        assert not other.running

    asyncio.run(run())


REFUSE = (
    "import sys; print('refused', flush=True);"
    "print('nextstate: [learner] drift_limit is too small', file=sys.stderr); sys.exit(2)"
)


def test_a_part_that_only_a_person_can_help_rests_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.01)
    config = tmp_path / "nextstate.toml"
    config.write_text("")

    async def run() -> None:
        other = part(tmp_path, SLEEP, log_file=tmp_path / "other.log", was_ready=True)
        refusing = part(tmp_path, REFUSE, was_ready=True, watched=[config])
        said: list[str] = []
        keeper = Supervisor([other, refusing], lambda: said.append(refusing.state))
        running = asyncio.create_task(keeper.run())
        await until(lambda: refusing.state.startswith("stopped"))
        assert "[learner] drift_limit is too small; tried again when" in refusing.state
        assert refusing.state.endswith("nextstate.toml changes, or in 10 min")
        assert said[-1] == refusing.state
        await until(lambda: "up" in text(other.log_file))
        assert (refusing.starts, other.running, other.state) == (1, True, "up")
        config.write_text("[learner]\ndrift_limit = 0.2\n")
        await until(lambda: refusing.starts == 2)
        await until(lambda: refusing.state.startswith("stopped"))
        assert refusing.state.endswith("or in 20 min")
        keeper.stop()
        await running

    asyncio.run(run())
    assert sum("stopped, the others go on" in r.getMessage() for r in caplog.records) == 2


def test_a_part_rests_no_longer_once_what_it_follows_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.01)

    async def run() -> None:
        engine = part(tmp_path, SLEEP, log_file=tmp_path / "engine.log", was_ready=True)
        engine.name = "engine"
        refusing = part(tmp_path, REFUSE, was_ready=True, follows=["engine"])
        keeper = Supervisor([engine, refusing])
        running = asyncio.create_task(keeper.run())
        await until(lambda: refusing.state.startswith("stopped"))
        await until(lambda: "up" in text(engine.log_file))
        assert refusing.starts == 1
        assert engine.process is not None
        os.kill(engine.process.pid, signal.SIGKILL)
        await until(lambda: refusing.starts == 2)
        keeper.stop()
        await running

    asyncio.run(run())


def test_a_rest_ends_by_itself_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []

    async def note(_: Supervisor, part: Part, signs: object, rest_s: float) -> None:
        rests.append(rest_s)
        if len(rests) == 8:
            keeper.stop()

    monkeypatch.setattr(Supervisor, "_rest", note)
    keeper = Supervisor([part(tmp_path, "raise SystemExit(2)", was_ready=True)])
    asyncio.run(keeper.run())
    assert rests == [600, 1200, 2400, 4800, 9600, 19200, 21600, 21600]


def test_what_parts_do_is_told_only_while_the_supervisor_lives(tmp_path: Path) -> None:
    assert read_parts(tmp_path) == {}
    write_parts(tmp_path, {"learner": "stopped: why"})
    assert read_parts(tmp_path) == {"learner": "stopped: why"}
    for broken in ('{"pid": 4194305, "parts": {"learner": "up"}}', "{", '{"pid": "x"}', "[]", ""):
        (tmp_path / "parts.json").write_text(broken)
        assert read_parts(tmp_path) == {}


def test_an_engine_that_dies_at_start_is_explained_and_names_its_log(tmp_path: Path) -> None:
    (tmp_path / "part.log").write_text("ValueError: of an earlier run\n")

    async def run() -> None:
        child = part(
            tmp_path,
            "raise ValueError('no such model')",
            must_become_ready=True,
            explain=lambda log: f"vLLM ended: {cause_of_death(log)}",
        )
        with pytest.raises(StartError, match=r"vLLM ended: ValueError: no such model; .*part.log"):
            await Supervisor([child]).run()

    asyncio.run(run())


def test_an_engine_that_dies_once_it_has_served_is_not_said_to_have_failed_at_its_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        child = part(
            tmp_path,
            "print('OSError: long ago'); raise SystemExit(3)",
            must_become_ready=True,
            explain=lambda log: f"vLLM ended before it could serve: {cause_of_death(log)}",
            was_ready=True,
        )
        supervisor = Supervisor([child])
        running = asyncio.create_task(supervisor.run())
        await until(lambda: child.restarts > 0)
        supervisor.stop()
        await running

    asyncio.run(run())
    assert "part ended, restarting in 1 s: part ended with code 3; the whole log" in caplog.text


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("INFO ok\napi_server.py: error: unrecognized arguments: --x\n", "unrecognized arguments"),
        (
            "(EngineCore pid=1) ERROR 11-22 10:00:00 [core.py:1] ValueError: head size 7\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: head size 7",
        ),
        (
            "(APIServer pid=1) WARNING 11-27 12:00:00 [utils.py:2] fd errors like `OSError: [Errno "
            "24] Too many open files`. Consider increasing\nRuntimeError: no memory\n"
            "(APIServer pid=1) INFO 11-27 12:00:01 [launcher.py:3] error: none\n",
            "RuntimeError: no memory",
        ),
        ("", "its log is empty"),
        ("just words\n", "just words"),
    ],
)
def test_the_cause_of_death_is_the_most_telling_line(log: str, expected: str) -> None:
    found = cause_of_death(log)
    assert expected in found
    assert "pid=" not in found


def test_the_engine_is_started_neutrally(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tmp_path), served_model_name="m", env={"X": "1"})
    argv = command(config, 5)
    assert argv[1:4] == ["-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert "--enable-lora" in argv
    assert argv[argv.index("--generation-config") + 1] == "vllm"
    own = EngineConfig(model="m", args=("--generation-config", "auto"))
    assert command(own, 5).count("--generation-config") == 1
    env = environment(config, {"PATH": "/bin"})
    assert env["PYTHONSAFEPATH"] == env["X"] == env["HF_HUB_OFFLINE"] == "1"
    assert env["PATH"] == "/bin"


def test_a_port_in_use_is_noticed() -> None:
    async def run() -> None:
        port = free_port()
        assert port_is_free("127.0.0.1", port)
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", port)
        assert not port_is_free("127.0.0.1", port)
        server.close()
        await server.wait_closed()

    asyncio.run(run())
