"""A gate that keeps refusing does not lose batch after batch."""

import logging
import threading

import pytest

from learner.lineage import Lineage
from learner.rejections import rejected_in_a_row
from learner.trainer import PolicyTrainer
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


def test_after_three_rejections_the_lineage_pauses_keeps_its_samples_and_says_what_to_do(
    recorded, model_path, monkeypatch, caplog
):
    reject_all(monkeypatch)
    recorded.add_mixed(16 * 5)
    run(recorded, model_path)
    assert len(recorded.store.versions.all("main")) == 3
    assert recorded.states() == {"ready": 80}
    said = read_training_status(recorded.store.dir, ["main", "alice"])
    assert list(said) == ["main"]
    assert said["main"].startswith("paused: the gate rejected versions 1, 2, 3 in a row")
    assert "the last reason: it was told to" in said["main"]
    assert "nextstate resume main" in said["main"]
    assert "nextstate rollback NUMBER --lineage main" in said["main"]
    (logged,) = (r for r in caplog.records if "in a row" in r.getMessage())
    assert (logged.levelno, logged.getMessage()) == (
        logging.ERROR,
        f"lineage=main {said['main']}",
    )


def test_a_pause_outlasts_the_learner_and_ends_with_resume(recorded, model_path, monkeypatch):
    reject_all(monkeypatch, 1, 2, 3)
    recorded.add_mixed(16 * 3)
    run(recorded, model_path)
    run(recorded, model_path)
    assert recorded.states() == {"ready": 48}
    assert read_training_status(recorded.store.dir, ["main"])["main"].startswith("paused")
    recorded.store.versions.resume("main")
    assert run(recorded, model_path).published == [4, 5, 6]
    assert recorded.states() == {"trained": 48}
    assert read_training_status(recorded.store.dir, ["main"]) == {}


def test_a_lineage_that_a_person_has_paused_takes_no_batch_until_it_is_resumed(
    recorded, model_path
):
    recorded.add_mixed(16 * 2)
    recorded.store.versions.pause("main", "ada")
    assert run(recorded, model_path).published == []
    recorded.store.versions.set_serving("main", 0)  # a rollback does not end it
    assert run(recorded, model_path).published == []
    assert recorded.states() == {"ready": 32}
    said = read_training_status(recorded.store.dir, ["main"])["main"]
    assert said.startswith("paused by ada since ")
    assert said.endswith("`nextstate resume main` ends the pause")
    recorded.store.versions.resume("main")
    assert run(recorded, model_path).published == [1, 2]
    assert read_training_status(recorded.store.dir, ["main"]) == {}


def test_a_running_learner_notices_that_a_person_resumes(recorded, model_path, monkeypatch):
    reject_all(monkeypatch, 1, 2, 3)
    recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 1)
    looks = []

    def wait(_: float | None = None) -> bool:
        looks.append(recorded.states())
        if len(looks) == 2:
            recorded.store.versions.resume("main")
        return engine.stop.is_set()

    engine.stop.wait = wait
    train(recorded, model_path, engine)
    assert looks == [{"ready": 48}] * 2
    assert engine.published == [4]


def test_a_pause_that_ends_before_the_learner_looks_again_is_not_reported_for_ever(
    recorded, model_path, monkeypatch
):
    """While another lineage trains, or between the last rejection and its report."""
    reject_all(monkeypatch, 1, 2, 3)
    recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 1)
    register, update = Lineage._register, PolicyTrainer.update

    def resume_after(self, version, *given, **named):
        register(self, version, *given, **named)
        if version.number == 3:
            recorded.store.versions.resume("main")

    def said_when_it_trains(self, *given):
        said.append(read_training_status(recorded.store.dir, ["main"]))
        return update(self, *given)

    said = []
    monkeypatch.setattr(Lineage, "_register", resume_after)
    monkeypatch.setattr(PolicyTrainer, "update", said_when_it_trains)
    train(recorded, model_path, engine)
    assert engine.published == [4]
    assert said[3] == {}


def test_another_version_put_into_service_ends_the_pause(recorded, model_path, monkeypatch):
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    reject_all(monkeypatch, 1, 2, 3)
    recorded.add_mixed(16 * 4)
    engine = FakeEngine(recorded.store)

    def roll_back(_: float | None = None) -> bool:
        recorded.store.versions.set_serving("main", 0)
        return engine.stop.is_set()

    engine.stop.wait = roll_back
    train(recorded, model_path, engine)
    newest = recorded.store.versions.all("main")[-1]
    assert (newest.number, newest.parent) == (5, 0)


def test_what_passes_ends_the_row(recorded, model_path, monkeypatch):
    reject_all(monkeypatch, 1, 2, 4, 5)
    recorded.add_mixed(16 * 6)
    assert run(recorded, model_path).published == [3, 6]
    assert recorded.states() == {"trained": 32, "dropped": 64}


def test_only_what_the_gate_rejected_last_and_nobody_has_accepted_counts():
    def version(number: int, state: VersionState, sha256: str | None = None) -> PolicyVersion:
        return PolicyVersion("main", number, 0, sha256 and "/a", sha256, 1, state)

    refused = [version(number, VersionState.REJECTED) for number in range(5)]
    withdrawn = version(1, VersionState.REJECTED, "ff")
    serving = version(1, VersionState.SERVING, "ff")
    assert rejected_in_a_row([], -1) == []
    assert rejected_in_a_row([refused[0], serving, *refused[2:4]], -1) == [2, 3]
    assert rejected_in_a_row([refused[0], withdrawn], -1) == []
    assert rejected_in_a_row(refused, 2) == [3, 4]
