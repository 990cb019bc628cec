"""Where an update's metrics can be looked at, and that looking never ends training."""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from learner.config import LearnerConfig
from learner.metric_writers import open_writers
from nextstate.errors import StartError

QUIET = LearnerConfig(tensorboard=False)
FAKE_WANDB = """
import json, pathlib
FILE = pathlib.Path(__file__).parent / "calls.jsonl"
def note(*call):
    with FILE.open("a") as file:
        file.write(json.dumps(call) + "\\n")
class Run:
    def log(self, metrics, step):
        note("log", metrics, step)
        if "bad" in metrics:
            raise OSError("offline")
    def finish(self):
        note("finish")
def init(**options):
    note("init", options)
    return Run()
"""


@pytest.fixture
def wandb_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that looks like wandb and writes down its calls, in the file returned."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "package")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return tmp_path / "package/calls.jsonl"


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Every (tag, step) and its value in the folder's event files, read as records of a length, a
    checksum, that many bytes and another checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[tuple[str, int], float] = {}
    for file in folder.glob("events.out.tfevents.*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event = Event.FromString(data[12 : 12 + length])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            data = data[16 + length :]
    return found


def test_one_line_a_version_is_always_written(tmp_path: Path) -> None:
    writers = open_writers(QUIET, tmp_path, "main")
    writers.write(1, {"loss": 0.5})
    writers.write(2, {"loss": 0.25, "grad/norm": 1.0})
    writers.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [
        {"version": 1, "loss": 0.5},
        {"version": 2, "loss": 0.25, "grad/norm": 1.0},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_has_every_metric_under_its_version(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    for version in (1, 2):  # a learner that was restarted in between
        writers = open_writers(LearnerConfig(), tmp_path, "main")
        writers.write(version, {"loss": 0.5 * version, "grad/norm": 2.0})
        writers.close()
    assert scalars(tmp_path / "tensorboard") == {
        ("loss", 1): 0.5,
        ("grad/norm", 1): 2.0,
        ("loss", 2): 1.0,
        ("grad/norm", 2): 2.0,
    }


def test_without_tensorboards_package_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    open_writers(LearnerConfig(), tmp_path, "main").close()
    assert "make env" in caplog.text


def test_wandb_gets_every_version_of_a_run_that_a_restart_goes_on_with(
    tmp_path: Path, wandb_calls: Path
) -> None:
    writers = open_writers(replace(QUIET, wandb="p"), tmp_path, "alice")
    writers.write(3, {"loss": 0.5})
    writers.close()
    calls = [json.loads(line) for line in wandb_calls.read_text().splitlines()]
    options = {"project": "p", "name": "alice", "id": "p-alice", "dir": str(tmp_path)}
    assert calls == [
        ["init", options | {"resume": "allow", "reinit": "create_new"}],
        ["log", {"loss": 0.5}, 3],
        ["finish"],
    ]


def test_a_writer_that_fails_loses_its_metrics_and_nothing_else(
    tmp_path: Path, wandb_calls: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writers = open_writers(replace(QUIET, wandb="p"), tmp_path, "main")
    writers.write(1, {"bad": 1.0})
    writers.write(2, {"loss": 1.0})
    assert "to=WeightsAndBiases version=1" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_costs_lines_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "metrics.jsonl"
    writers = open_writers(QUIET, tmp_path, "main")
    writers.write(1, {"loss": 0.5})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in (9, 0):  # for a part of the line, for none of it
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + room, limits[1]))
            writers.write(2, {"loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    writers.write(3, {"loss": 0.125})
    writers.close()
    written = [json.loads(line)["version"] for line in file.read_text().splitlines()]
    assert written == [1, 3]
    assert caplog.text.count("metrics not written to=JsonLines version=2") == 2


def test_a_folder_that_has_gone_does_not_end_training(tmp_path: Path) -> None:
    open_writers(QUIET, tmp_path / "absent", "main").write(1, {"loss": 1.0})


def test_wandb_that_is_not_installed_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"\[learner\] wandb = 'p' .*pip install wandb"):
        open_writers(replace(QUIET, wandb="p"), tmp_path, "main")
