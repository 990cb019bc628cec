"""A gate that keeps refusing does not lose batch after batch."""

import logging
import threading
from functools import partial

import pytest

from learner import lineage, rejections
from learner.rejections import RejectionPause, rejected_in_a_row
from nextstate.records import PolicyVersion, VersionState
from nextstate.training_status import read_training_status
from tests.learner.running_stage import FakeEngine, train
from tests.learner.test_lineage import reject_all
from tests.learner.test_tiny_model import Recorded, save_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recorded(tmp_path, model_path) -> Recorded:
    return Recorded(tmp_path / "state", model_path)


class Looks(threading.Event):
    """Told to stop once the learner has found nothing to do so often."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def wait(self, timeout: float | None = None) -> bool:
        self._left -= 1
        if self._left <= 0:
            self.set()
        return self.is_set()


def run(recorded: Recorded, model_path: str, looks: int = 5) -> FakeEngine:
    engine = FakeEngine(recorded.store, 99)
    engine.stop = Looks(looks)
    train(recorded, model_path, engine)
    return engine


def test_after_some_rejections_in_a_row_batches_wait_and_status_says_so(
    recorded, model_path, monkeypatch, caplog
):
    reject_all(monkeypatch)
    recorded.add_mixed(16 * 8)
    run(recorded, model_path)
    assert recorded.states() == {"dropped": 64, "ready": 64}
    said = read_training_status(recorded.store.dir, ["main", "alice"])
    assert list(said) == ["main"]
    assert said["main"].startswith("paused: 4 versions in a row were rejected")
    assert "pauses for 10 min" in said["main"]
    assert "the last reason: it was told to" in said["main"]
    assert [r.levelno for r in caplog.records if "in a row" in r.getMessage()] == [
        logging.ERROR, logging.ERROR,
    ]  # fmt: skip


def test_a_restart_tries_once_and_then_pauses_longer(recorded, model_path, monkeypatch):
    reject_all(monkeypatch)
    recorded.add_mixed(16 * 8)
    run(recorded, model_path)
    run(recorded, model_path)
    assert recorded.states() == {"dropped": 80, "ready": 48}
    assert "pauses for 20 min" in read_training_status(recorded.store.dir, ["main"])["main"]


def test_what_passes_ends_the_pause_and_its_notice(recorded, model_path, monkeypatch):
    reject_all(monkeypatch, 1, 2, 3, 4)
    now = [0.0]
    paused = partial(RejectionPause, clock=lambda: now[0])
    monkeypatch.setattr(lineage, "RejectionPause", paused)
    recorded.add_mixed(16 * 6)
    engine = FakeEngine(recorded.store, 2)
    looks = []

    def wait(_: float | None = None) -> bool:
        looks.append(recorded.states())
        now[0] += 599.0 if len(looks) == 1 else 1.0
        return engine.stop.is_set()

    engine.stop.wait = wait
    train(recorded, model_path, engine)
    assert looks[:2] == [{"dropped": 64, "ready": 32}] * 2
    assert engine.published == [5, 6]
    assert read_training_status(recorded.store.dir, ["main"]) == {}


def test_another_version_put_into_service_ends_the_pause(recorded, model_path, monkeypatch):
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    reject_all(monkeypatch, 1, 2, 3, 4)
    recorded.add_mixed(16 * 5)
    engine = FakeEngine(recorded.store)

    def roll_back(_: float | None = None) -> bool:
        recorded.store.versions.set_serving("main", 0)
        return engine.stop.is_set()

    engine.stop.wait = roll_back
    train(recorded, model_path, engine)
    newest = recorded.store.versions.all("main")[-1]
    assert (newest.number, newest.parent) == (6, 0)


def test_pauses_grow_up_to_a_bound():
    now = [0.0]
    waiting = RejectionPause(clock=lambda: now[0])
    found = [waiting.rejected() for _ in range(12)]
    assert found[:6] == [(1, 0), (2, 0), (3, 0), (4, 600), (5, 1200), (6, 2400)]
    assert found[-1] == (12, rejections.LONGEST_PAUSE_S)
    assert not waiting.is_over()
    now[0] = rejections.LONGEST_PAUSE_S
    assert waiting.is_over()
    assert RejectionPause(10**9).rejected()[1] == rejections.LONGEST_PAUSE_S
    assert RejectionPause(10**9).is_over()


def test_only_what_the_gate_rejected_last_counts():
    def version(state: VersionState, path: str | None = None) -> PolicyVersion:
        return PolicyVersion("main", 1, 0, path, path and "ff", 1, state)

    refused = version(VersionState.REJECTED)
    withdrawn = version(VersionState.REJECTED, "/a")
    serving = version(VersionState.SERVING, "/a")
    assert rejected_in_a_row([]) == 0
    assert rejected_in_a_row([refused, serving, refused, refused]) == 2
    assert rejected_in_a_row([refused, withdrawn]) == 0
