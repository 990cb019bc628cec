"""No process asks the internet for anything, whatever its shell says, and errors keep secrets."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from nextstate.app.ray_part import without_ray
from nextstate.app.settings import Settings
from nextstate.app.stack import engine_process
from nextstate.app.stages import stage_process
from nextstate.app.supervisor import Child, end, start
from nextstate.config import EngineConfig
from nextstate.engine.process import environment, free_port, not_passed
from nextstate.errors import StoreError
from nextstate.records import Feedback
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.app.test_part_environment import settings
from tests.learner.test_tiny_model import Recorded, save_tiny_model
from tests.scripted_engine import scripted_engine
from tests.store.test_records import add, turn
from tests.whole.alone import WATCH, alone

_CONFIG = """
[store]
dir = "{state}"

[engine]
mode = "external"
url = "http://127.0.0.1:{port}"
model = "{model}"

[learner]
batch_size = 4
lora_rank = 4
epochs = 1
dtype = "float32"
threads = 1
gradient_checkpointing = false
"""
_SHELL = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "0"}


class Watched:
    """A command with its own hub cache; its look-ups and connections are logged."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.hub = folder / "hf" / "hub"
        self._log = folder / "watched"
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(WATCH)
        config = _CONFIG.format(state=self.state, port=free_port(), model=model)
        (folder / "nextstate.toml").write_text(config)

    def start(self, *arguments: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        """`before` stands before the command."""
        command = [*before, sys.executable, "-P", "-m", "nextstate", *arguments]
        paths = [str(self.folder / "site"), str(Path(__file__).parents[2])]
        env = os.environ | _SHELL | {
            "PYTHONPATH": os.pathsep.join(paths),
            "WATCHED": str(self._log),
            "HF_HOME": str(self.folder / "hf"),
        }  # fmt: skip
        command += ["--config", str(self.folder / "nextstate.toml")]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    @property
    def noted(self) -> set[str]:
        return set(self._log.read_text().splitlines())


def test_the_learner_loads_a_hub_model_trains_and_saves_without_a_look_up_or_a_packet(
    tmp_path: Path,
) -> None:
    packets = tmp_path / "packets"
    watched = Watched(tmp_path, "someone/tiny")
    model_path = save_tiny_model(tmp_path / "model")
    cached = watched.hub / "models--someone--tiny"
    shutil.copytree(model_path, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    recorded = Recorded(watched.state, model_path)
    recorded.add_mixed(4)
    before = alone(packets)  # without namespaces only look-ups and connections are seen
    with watched.start("learner", before=before) as learner:
        assert learner.stderr is not None
        said: list[str] = []
        for line in learner.stderr:
            said.append(line)
            if "publishing failed" in line:  # nothing listens there: the version is made and kept
                process = psutil.Process(learner.pid)
                (process.children() if before else [process])[0].send_signal(signal.SIGTERM)
        assert learner.wait() == 0, said
    assert recorded.states() == {"trained": 4}
    assert watched.noted == {"armed"}
    assert not before or packets.read_text() == ""


@pytest.mark.parametrize("command", ["learner", "doctor"])
def test_a_missing_model_is_not_looked_up_on_the_internet(tmp_path: Path, command: str) -> None:
    watched = Watched(tmp_path, "someone/absent")
    with watched.start(command) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait() == 2
    if command == "learner":
        assert "[engine] model = 'someone/absent' is neither" in said
        assert "`nextstate fetch someone/absent` once" in said
    assert watched.noted == {"armed"}


SILENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL reports by it too
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_MODE": "disabled",
}
"""What each library's own documentation names."""


def child_of(settings: Settings, part: str) -> Child:
    """A child of `nextstate up`, with a program in the place of vLLM."""
    if part != "engine":
        return stage_process(settings, part, part)
    child = engine_process(settings, part, 0, free_port(), "a-key")
    child.argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    return child


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("part", ["proxy", "writer", "judge", "learner", "rollout", "engine"])
def test_every_child_gets_the_offline_switches_over_the_shells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    for name in SILENT:
        monkeypatch.setenv(name, "by the shell")

    async def test() -> None:
        async with scripted_engine() as engine:
            found = settings(tmp_path, engine.url)
            child = child_of(found, "proxy" if part == "writer" else part)
            process = await start(child)
            try:
                seen = psutil.Process(process.pid)
                if part == "writer":
                    async with asyncio.timeout(60):
                        while not (below := seen.children()):
                            assert process.returncode is None, child.log_file.read_text()
                            await asyncio.sleep(0.1)
                    (seen,) = below
                    async with asyncio.timeout(10):
                        while "proxy.writer" not in seen.cmdline():
                            await asyncio.sleep(0.05)
                given = seen.environ()
                assert {name: given.get(name) for name in SILENT} == SILENT
            finally:
                await end(child)

    for name in ("CLIENTS", "ALICE", "ENGINE"):
        monkeypatch.setenv(name, secrets.token_hex(16))
    asyncio.run(test())


def test_an_actor_of_ray_and_what_it_starts_get_the_switches_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SILENT:
        monkeypatch.setenv(name, "by the shell")
    child = stage_process(settings(tmp_path), "judge", "judge")
    assert child.env is not None
    assert without_ray(child.env).items() >= SILENT.items()
    code = "from nextstate.egress import guard; guard(()); import os, json; "
    code += "print(json.dumps(dict(os.environ)))"  # as `rollout.nodes.Actor` does
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parents[2], check=True
    )
    assert json.loads(found.stdout).items() >= SILENT.items()


def test_only_a_person_lets_something_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    allowed = {
        "learner": {"wandb": "p"},
        "privacy": {"allow_hosts": ["api.wandb.ai"]},
        "store": {"dir": str(tmp_path)},
    }
    env = stage_process(Settings.read(overrides=allowed), "learner", "learner").env
    assert env is not None
    assert env["WANDB_MODE"] == "offline"
    assert not_passed(EngineConfig(), SILENT) == []  # vLLM gets ours, so nobody is warned
    own = EngineConfig(env={"HF_HUB_OFFLINE": "0"})
    assert environment(own, os.environ)["HF_HUB_OFFLINE"] == "0"


def test_importing_the_learner_is_enough_to_be_offline() -> None:
    code = "import learner, os; print(os.environ['HF_HUB_OFFLINE'])"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | _SHELL, capture_output=True, text=True,
        cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    assert found.stdout == "1\n"


@pytest.mark.parametrize("broken", ["DROP TABLE feedback", "CREATE UNIQUE INDEX no ON feedback(1)"])
def test_a_database_error_quotes_nobody(store: Store, broken: str) -> None:
    add(store, turn(0), turn(1))
    store.reviewing.give(Feedback("turn_0", 1, "kept before", "kept before"), OWNER)
    with closing(sqlite3.connect(store.dir / "nextstate.sqlite3")) as file:
        file.execute(broken)
    secret = Feedback("turn_1", 1, "My hint 4711.", "My comment 4712.")
    with pytest.raises(StoreError) as caught:
        store.reviewing.give(secret, OWNER)
    error: BaseException | None = caught.value
    while error is not None:
        for text in (str(error), repr(error)):
            assert "4711" not in text
            assert "4712" not in text
        error = error.__cause__
