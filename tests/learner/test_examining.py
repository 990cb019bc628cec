"""The exam of a candidate: how it is decided, how long it is waited for, what a failure undoes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from learner.examining import BEGIN_S, LONGEST_S, Examining
from learner.gate import exam_objection
from learner.rejections import rejected_in_a_row
from learner.schedule import Schedule
from nextstate.exams import FAILED, MISSED, Exam
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.training_status import read_training_status
from tests.learner.running_stage import FakeEngine, train
from tests.learner.test_tiny_model import Recorded, save_tiny_model

WHOLE = Exam(planned=32, tasks=32, solved=20, gained=5, lost=5)


@pytest.mark.parametrize(
    ("gained", "lost", "fails"),
    [
        (0, 0, False),
        (32, 0, False),
        (0, 6, False),  # 1/64
        (0, 7, True),  # 1/128
        (5, 15, False),  # 0.021
        (5, 17, True),  # 0.0085
    ],
)
def test_a_candidate_fails_if_it_clearly_loses_more_tasks_than_it_gains(
    gained: int, lost: int, fails: bool
) -> None:
    reason = exam_objection(replace(WHOLE, solved=gained, gained=gained, lost=lost))
    assert (reason is not None) is fails


def test_the_reason_names_what_was_counted() -> None:
    reason = exam_objection(Exam(planned=32, tasks=30, solved=4, gained=0, lost=9))
    assert reason == (
        "it solves fewer held-out tasks than its parent: 4 of 30, its parent 13; by chance that "
        "happens with probability 0.002, below the bound of 0.01"
    )


def test_an_exam_comes_back_from_the_metrics_of_its_version() -> None:
    assert Exam.of({"loss": 1.0, **WHOLE.metrics()}) == WHOLE
    assert Exam.of({}) == Exam()
    assert (WHOLE.by_parent, WHOLE.is_over, Exam().is_over) == (20, True, False)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def candidate(store: Store, number: int = 1) -> PolicyVersion:
    made = PolicyVersion("main", number, number - 1, "/a", "ff", 1, VersionState.CANDIDATE)
    store.versions.add(made, None)
    return made


def noted(store: Store, exam: Exam) -> PolicyVersion:
    assert store.versions.note("main", 1, exam.metrics())
    found = store.versions.get("main", 1)
    assert found is not None
    return found


def test_an_exam_that_nobody_begins_is_waited_for_briefly_and_one_that_runs_longer(
    store: Store,
) -> None:
    clock = Clock()
    examining = Examining(store, "main", clock)
    made = candidate(store)
    assert "`nextstate rollout` has not begun it" in (examining.waits(made) or "")
    clock.now += BEGIN_S
    assert examining.waits(made)
    begun = noted(store, Exam(planned=32, tasks=3, solved=1))
    clock.now += LONGEST_S - BEGIN_S
    assert "it solves 1 and its parent 1 of 3 held-out tasks (32 are planned)" in (
        examining.waits(begun) or ""
    )
    assert examining.waits(noted(store, WHOLE)) is None
    clock.now += 0.1
    assert examining.waits(begun) is None
    assert examining.waits(made) is None
    given_up = replace(made, number=2, metrics={MISSED: 1.0})
    assert examining.waits(given_up) is None


def test_a_missed_exam_is_noted_and_does_not_hold_a_version_back(store: Store) -> None:
    examining = Examining(store, "main")
    assert examining.objection(candidate(store)) is None
    found = store.versions.get("main", 1)
    assert found is not None
    assert found.metrics == {MISSED: 1.0}


def test_a_candidate_waits_only_while_somebody_holds_the_exams_of_its_lineage(
    store: Store,
) -> None:
    clock = Clock()
    examining = Examining(store, "main", clock, configured=False)
    made = candidate(store)
    assert examining.waits(made) is None
    assert examining.objection(made) is None
    assert store.versions.get("main", 1) == made
    store.examiners.hold("other", "nextstate rollout --run noon")
    assert examining.waits(made) is None
    store.examiners.hold("main", "nextstate rollout --run night")
    assert "`nextstate rollout --run night` has not begun it" in (examining.waits(made) or "")
    begun = noted(store, Exam(planned=32, tasks=3, solved=1))
    assert "nextstate rollout --run night plays it" in (examining.waits(begun) or "")
    store.examiners.leave("main", "nextstate rollout --run night")
    waits = examining.waits(begun) or ""
    assert "nobody plays it now; it is waited for 1 min at most" in waits
    clock.now += BEGIN_S
    assert examining.waits(begun)
    store.examiners.hold("main", "nextstate rollout --run noon")
    assert "nextstate rollout --run noon plays it" in (examining.waits(begun) or "")
    store.examiners.leave("main", "nextstate rollout --run noon")
    assert examining.waits(begun)
    clock.now += BEGIN_S + 0.1
    assert examining.waits(begun) is None
    assert examining.waits(made) is None
    assert examining.objection(made) is None  # it was waited for
    found = store.versions.get("main", 1)
    assert found is not None
    assert MISSED in found.metrics


def test_what_was_played_of_an_exam_that_takes_too_long_decides(store: Store) -> None:
    examining = Examining(store, "main")
    candidate(store)
    assert examining.objection(noted(store, Exam(planned=32, tasks=9, solved=0, lost=9)))
    found = store.versions.get("main", 1)
    assert found is not None
    assert FAILED in found.metrics
    assert rejected_in_a_row([replace(found, state=VersionState.REJECTED)], -1) == [1]


def test_a_candidate_that_a_person_has_passed_over_is_not_failed_afterwards(store: Store) -> None:
    made = candidate(store)
    store.versions.set_serving("main", 0)
    assert not store.versions.note("main", 1, {MISSED: 1.0})
    assert not store.versions.fail(made, "it solves less")
    found = store.versions.get("main", 1)
    assert found is not None
    assert (found.state, found.metrics) == (VersionState.RETIRED, {})


class Examiner(threading.Event):
    """Plays exams while the learner waits: it gives each candidate its counts."""

    def __init__(self, store: Store, exam_of: Callable[[int], Exam], most: int = 40) -> None:
        super().__init__()
        self._store, self._exam_of, self._left = store, exam_of, most
        self.said: set[str] = set()

    def wait(self, timeout: float | None = None) -> bool:
        self._left -= 1
        if self._left <= 0:
            self.set()
        for version in self._store.versions.newest("main", 1):
            self.said |= set(read_training_status(self._store.dir, ["main"]).values())
            if version.state is VersionState.CANDIDATE:
                self._store.versions.note(
                    "main", version.number, self._exam_of(version.number).metrics()
                )
        return self.is_set()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recorded(tmp_path: Path, model_path: str) -> Recorded:
    return Recorded(tmp_path / "state", model_path)


def test_a_version_that_fails_its_exam_never_serves_and_training_goes_back_to_its_parent(
    recorded: Recorded, model_path: str
) -> None:
    worse = replace(WHOLE, solved=2, gained=0, lost=18)
    turns = recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 2)
    stop = Examiner(recorded.store, lambda number: worse if number == 2 else WHOLE)
    engine.stop = stop
    train(recorded, model_path, engine, examined=["main"])
    assert engine.published == [1, 3]
    first, second, third = recorded.store.versions.all("main")
    assert (first.parent, second.parent, third.parent) == (0, 1, 1)
    assert second.state is VersionState.REJECTED
    assert "it solves fewer held-out tasks than its parent: 2 of 32" in (second.reason or "")
    assert recorded.states() == {"trained": 32, "dropped": 16}
    assert "their version 2 was rejected" in (recorded.reason(turns[16]) or "")
    assert any("version 1 takes its exam before it serves" in text for text in stop.said)
    assert read_training_status(recorded.store.dir, ["main"]) == {}


def test_a_version_that_fails_an_exam_of_a_command_never_serves(
    recorded: Recorded, model_path: str
) -> None:
    """Of a lineage that no `[rollout]` names."""
    worse = replace(WHOLE, solved=2, gained=0, lost=18)
    recorded.add_mixed(16 * 2)
    store, run = recorded.store, "nextstate rollout --run night"
    store.examiners.hold("main", run)
    engine = FakeEngine(store, 1)
    stop = engine.stop = Examiner(store, lambda number: worse if number == 1 else WHOLE)
    train(recorded, model_path, engine)
    assert engine.published == [2]
    assert store.versions.all("main")[0].state is VersionState.REJECTED
    assert any(f"takes its exam before it serves: `{run}`" in text for text in stop.said)


def test_a_learner_that_ends_during_an_exam_goes_on_waiting_at_its_next_start(
    recorded: Recorded, model_path: str
) -> None:
    recorded.add_mixed(16 * 2)
    engine = FakeEngine(recorded.store, 9)
    engine.stop = Examiner(recorded.store, lambda _: Exam(planned=32), most=5)
    train(recorded, model_path, engine, examined=["main"])
    assert (engine.published, recorded.states()) == ([], {"trained": 16, "ready": 16})
    engine.stop = Examiner(recorded.store, lambda _: WHOLE, most=20)
    train(recorded, model_path, engine, examined=["main"])
    assert engine.published == [1, 2]


def test_an_exam_ends_outside_the_window_too(
    recorded: Recorded, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store, 1)
    engine.stop = Examiner(recorded.store, lambda _: Exam(planned=32), most=5)
    train(recorded, model_path, engine, examined=["main"])
    monkeypatch.setattr(Schedule, "may_update", lambda schedule: False)
    engine.stop = Examiner(recorded.store, lambda _: WHOLE, most=20)
    train(recorded, model_path, engine, examined=["main"])
    assert engine.published == [1]


def test_three_failed_exams_in_a_row_pause_the_lineage_and_keep_its_samples(
    recorded: Recorded, model_path: str
) -> None:
    worse = replace(WHOLE, solved=2, gained=0, lost=18)
    recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 9)
    engine.stop = Examiner(recorded.store, lambda _: worse, most=30)
    train(recorded, model_path, engine, examined=["main"])
    assert (engine.published, recorded.states()) == ([], {"ready": 48})
    said = read_training_status(recorded.store.dir, ["main"])["main"]
    assert said.startswith("paused: the gate rejected versions 1, 2, 3 in a row")
