"""`nextstate rollout` as a process beside a running proxy: its output, and how it ends."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from asyncio import subprocess
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.episodes import EpisodeStatus
from nextstate.store import Store
from nextstate.store.episodes import Choice
from tests.proxy.running_proxy import Running, both, until
from tests.rollout.machine import needs_bubblewrap
from tests.rollout.test_runner import says
from tests.scripted_engine import MODEL, ScriptedEngine

ROOT = Path(__file__).parents[2]
SUM = {"service": "calculator", "instruction": "Work out (1 + 2) - 3.", "goal": 0}
COUNT = {"instruction": "count", "files": {"a.txt": "x\ny\n"}, "check": "test $(cat n.txt) = 2"}


def configured(tmp_path: Path, port: int = 1) -> Path:
    """A configuration file for a proxy on this port, and `tasks.jsonl` beside it."""
    file = tmp_path / "nextstate.toml"
    file.write_text(
        f'[store]\ndir = "{tmp_path}/other"\n[proxy]\nport = {port}\n'
        f'[engine]\nmode = "external"\nurl = "http://127.0.0.1:1"\nmodel = "{MODEL}"\n'
    )
    tasks = [{"id": "t-1", "split": "train", **COUNT}, {"id": "e-1", "split": "eval", **COUNT}]
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(task) for task in tasks))
    return file


async def start(
    p: Running, tmp_path: Path, *arguments: str, environment: str = "terminal"
) -> subprocess.Process:
    config = configured(tmp_path, int(p.url.rpartition(":")[2]))
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "nextstate", "rollout", environment, "--config", str(config)),
        *("--tasks", str(tmp_path / "tasks.jsonl"), *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )


@needs_bubblewrap
def test_it_plays_the_tasks_that_train_and_prints_a_line_for_each(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += says("echo 2 > n.txt", "submit", "submit")
        process = await start(p, tmp_path, "--group-size", "2", "--parallel", "1", "--seed", "3")
        out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
        *lines, solved, spent = out.decode().splitlines()
        ends = [line.split("  ", 1)[1] for line in lines]
        assert ends == ["t-1  done  outcome 1  2 calls", "t-1  done  outcome 0  1 calls"]
        assert re.fullmatch(
            r"2 episodes in [\d.]+ s: solved 1 of 2 \(50%; with 90 % confidence .* to .*\)", solved
        )
        assert re.fullmatch(r"an episode waits .* s for the model, .* s for its environment", spent)
        found = store.episodes.get_all(store.episodes.ids(Choice()))
        assert [(one.task, one.split, one.seed) for one in found] == [("t-1", "train", 3)] * 2
        assert {one.task for one in found} == {"t-1"}

    both(test, store, tmp_path)


def test_an_environment_without_a_sandbox_needs_none(store: Store, tmp_path: Path) -> None:
    """Also on a network of its own: tests/whole/test_nothing_leaves.py runs it there."""

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += says("I do not know.")
        tasks = tmp_path / "sums.jsonl"
        tasks.write_text(json.dumps({"id": "t-1", "split": "train", **SUM}))
        more = ("--tasks", str(tasks), "--group-size", "1", "--max-calls", "1")
        process = await start(p, tmp_path, *more, environment="tools")
        out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
        assert b"t-1  truncated" in out

    both(test, store, tmp_path)


@needs_bubblewrap
def test_eval_plays_the_held_out_tasks_once(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += says("echo 2 > n.txt", "submit")
        process = await start(p, tmp_path, "--eval", "--json")
        out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
        (row,) = [json.loads(line) for line in out.splitlines()]
        assert row.pop("model_s") > 0
        assert row.pop("environment_s") > 0
        (episode,) = store.episodes.get_all(store.episodes.ids(Choice()))
        assert episode.split == "eval"
        assert row == {
            "episode": episode.id,
            "task": "e-1",
            "split": "eval",
            "status": "done",
            "outcome": 1.0,
            "calls": 2,
            "reason": None,
        }

    both(test, store, tmp_path)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("sent", "code", "status"),
    [
        (signal.SIGTERM, 143, EpisodeStatus.ABORTED),
        (signal.SIGINT, 130, EpisodeStatus.ABORTED),
        (signal.SIGKILL, -9, None),
    ],
)
def test_a_stopped_run_aborts_its_episodes_and_a_killed_one_leaves_them_open(
    store: Store, tmp_path: Path, sent: signal.Signals, code: int, status: EpisodeStatus | None
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        name = f"marked-{sent.name}"
        engine.script = says(f"exec -a {name} sleep 25")[0]
        process = await start(p, tmp_path, "--group-size", "2", "--deadline", "30")
        await until(lambda: running(name) == 2)
        process.send_signal(sent)
        await process.communicate()
        assert process.returncode == code
        await until(lambda: running(name) == 0)
        found = store.episodes.get_all(store.episodes.ids(Choice()))
        assert [one.status for one in found] == [status] * 2
        assert all(one.deadline_s for one in found)

    both(test, store, tmp_path)


@needs_bubblewrap
def test_a_killed_run_goes_on(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        arguments = ("--run", "night", "--group-size", "3", "--parallel", "1")
        engine.queue += says("submit", "exec -a marked-night sleep 25")
        process = await start(p, tmp_path, *arguments)
        await until(lambda: running("marked-night") == 1)
        process.kill()
        await process.communicate()
        engine.queue += says("submit")
        process = await start(p, tmp_path, *arguments)
        out, _ = await process.communicate()
        assert [line.split()[0] for line in out.decode().splitlines()[:-2]] == ["night-0-2"]
        found = {one.id: one.status for one in store.episodes.get_all(store.episodes.ids(Choice()))}
        assert found == {"night-0-0": "done", "night-0-1": "aborted", "night-0-2": "done"}

    both(test, store, tmp_path)


@needs_bubblewrap
def test_two_processes_do_not_play_a_run_of_one_name(store: Store, tmp_path: Path) -> None:
    """They would take each other's episodes: the steps of both would get one outcome."""

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script = says("exec -a marked-twice sleep 25")[0]
        process = await start(p, tmp_path, "--run", "twice")
        await until(lambda: running("marked-twice") > 0)
        second = await start(p, tmp_path, "--run", "twice")
        _, err = await second.communicate()
        assert second.returncode == 2
        assert f"--run twice is played by process {process.pid}: end it, or" in err.decode()
        process.terminate()
        await process.communicate()
        found = store.episodes.get_all(store.episodes.ids(Choice()))
        assert {one.calls for one in found} == {1}

    both(test, store, tmp_path)


def running(name: str) -> int:
    """How many processes have this name as their first argument."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            count += (folder / "cmdline").read_bytes().startswith(name.encode())
        except OSError:
            continue
    return count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--tasks", "tasks.jsonl"], "there is no plugin 'none' in plugins/environments/"),
        (["terminal", "--tasks", "none.jsonl"], "--tasks none.jsonl: No such file or directory"),
        (["terminal", "--tasks", "x.jsonl", "--eval"], "none of its 1 tasks is for eval"),
        (["terminal", "--tasks", "bad.jsonl"], "bad.jsonl, line 1: check is missing"),
        (["terminal", "--tasks", "tasks.jsonl", "--parallel", "0"], "numbers of at least 1"),
        (["terminal", "--tasks", "tasks.jsonl", "--run", "a/b"], "--run 'a/b': expected 1 to 100"),
        (["terminal", "--tasks", "tasks.jsonl", "--parallel", "999"], "--parallel up to 256"),
    ],
)
def test_a_wrong_argument_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    config = configured(tmp_path)
    line = json.dumps({"id": "t-1", "split": "train", **COUNT})
    (tmp_path / "x.jsonl").write_text(line)
    (tmp_path / "bad.jsonl").write_text('{"id": "b", "instruction": "go"}')
    monkeypatch.chdir(tmp_path)
    assert main(["rollout", "--config", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err


@needs_bubblewrap
def test_a_proxy_that_is_away_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = str(tmp_path / "tasks.jsonl")
    config = str(configured(tmp_path))
    assert main(["rollout", "terminal", "--tasks", tasks, "--config", config]) == 2
    assert "no answer from the proxy at http://127.0.0.1:1/v1" in capsys.readouterr().err
