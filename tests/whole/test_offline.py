"""No process asks the internet for anything, whatever its shell says, and errors keep secrets."""

from __future__ import annotations

import os
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

from nextstate.app.settings import Settings
from nextstate.app.stages import stage_process
from nextstate.config import EngineConfig
from nextstate.engine.process import environment, free_port
from nextstate.errors import StoreError
from nextstate.offline import SWITCHES, switches
from nextstate.records import Feedback
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.learner.test_tiny_model import Recorded, save_tiny_model
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


def test_every_child_gets_the_offline_switches_over_the_shells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*SWITCHES, "WANDB_MODE"):
        monkeypatch.setenv(name, "0")
    settings = Settings.read(overrides={"store": {"dir": str(tmp_path)}})
    for stage in ("proxy", "judge", "learner"):
        env = stage_process(settings, stage, stage).env
        assert env is not None
        assert env.items() >= switches(sends_metrics=False).items()
        assert env["WANDB_MODE"] == "disabled"
    allowed = {
        "learner": {"wandb": "p"},
        "privacy": {"allow_hosts": ["api.wandb.ai"]},
        "store": {"dir": str(tmp_path)},
    }
    env = stage_process(Settings.read(overrides=allowed), "learner", "learner").env
    assert env is not None
    assert env["WANDB_MODE"] == "0"
    assert environment(EngineConfig(), os.environ).items() >= SWITCHES.items()
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
