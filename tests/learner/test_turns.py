"""Lineages that take turns at one trainer: each trains as if it were alone, and none waits long."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner import stage
from learner.checkpoint import load_checkpoint
from learner.config import LearnerConfig
from learner.trainer import Parked, Update
from learner.turns import Seat, Turns
from nextstate.errors import LearnerError, StartError
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.learner.test_tiny_model import BAD, CONFIG, GOOD, PROMPT, Recorded, save_tiny_model

ALICE, MAIN = "alice", "main"
SIZE = CONFIG.batch_size


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Service:
    """A publisher that flips at once and ends the learner with the version `last`."""

    def __init__(self, store: Store, last: tuple[str, int]) -> None:
        self.stop = threading.Event()
        self.published: list[tuple[str, int]] = []
        self._store = store
        self._last = last

    def __call__(self, version: PolicyVersion, withdraw: bool = False) -> None:
        self._store.versions.set_serving(version.lineage, version.number)
        self.published.append((version.lineage, version.number))
        if self.published[-1] == self._last:
            self.stop.set()


def add_batch(recorded: Recorded, lineage: str, *, shift: float = 0.0) -> list[str]:
    """A batch that Alice judges the other way round, half of it with a hint."""
    sign = -1 if lineage == ALICE else 1
    turns: list[str] = []
    for number in range(SIZE):
        reply, score = ((BAD, -1), (GOOD, 1))[number % 2]
        hinted = (9, *PROMPT) if number % 4 == 1 else None
        more: dict[str, Any] = {"hinted": hinted, "shift": shift}
        turns.append(recorded.add(reply, sign * score, lineage=lineage, **more))
    return turns


def train(
    recorded: Recorded, model_path: str, lineages: list[str], last: tuple[str, int], **keys: Any
) -> list[tuple[str, int]]:
    """Trains until `last` serves; what was published, in that order."""
    service = Service(recorded.store, last)
    config = replace(CONFIG, **keys)
    stage.run(recorded.store, config, model_path, lineages, service, service.stop)
    return service.published


def made(recorded: Recorded, lineage: str) -> list[tuple[str | None, float, float]]:
    """What each version of the lineage weighs, and what its step said."""
    versions = recorded.store.versions.all(lineage)
    return [(v.sha256, v.metrics["loss"], v.metrics["grad/norm"]) for v in versions]


def state(recorded: Recorded, lineage: str) -> dict[str, Any]:
    """The lineage's moments, steps and average teacher, flat."""
    checkpoint = load_checkpoint(recorded.store.dir / "learner" / lineage)
    assert checkpoint is not None
    moments: dict[int, dict[str, Any]] = checkpoint.state["optimizer"]["state"]
    found = {f"{at}/{name}": v for at, one in moments.items() for name, v in one.items()}
    found |= {f"average/{at}": v for at, v in enumerate(checkpoint.state["average"])}
    return found | {"step": torch.tensor(checkpoint.state["step"])}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("keys", [{}, {"teacher": "average", "teacher_decay": 0.5}])
def test_each_of_two_lineages_trains_bit_for_bit_as_if_it_were_alone(
    tmp_path: Path, model_path: str, keys: dict[str, Any]
) -> None:
    shared = Recorded(tmp_path / "shared", model_path)
    alone = {name: Recorded(tmp_path / name, model_path) for name in (MAIN, ALICE)}
    for name in (MAIN, ALICE) * 3:
        add_batch(shared, name)
        add_batch(alone[name], name)
    published = train(shared, model_path, [MAIN, ALICE], (ALICE, 3), **keys)
    assert published == [(name, n) for n in (1, 2, 3) for name in (MAIN, ALICE)]
    for name, recorded in alone.items():
        train(recorded, model_path, [name], (name, 3), **keys)
        assert made(shared, name) == made(recorded, name)
        assert_same(state(shared, name), state(recorded, name))
        assert state(shared, name)["step"] == 3
        file = f"learner/{name}/metrics.jsonl"
        assert len((shared.store.dir / file).read_text().splitlines()) == 3
    assert made(shared, MAIN) != made(shared, ALICE)


def spoil_the_checkpoint(recorded: Recorded) -> None:
    (recorded.store.dir / "learner" / ALICE / "checkpoint.pt").write_bytes(b"?")


@pytest.mark.parametrize("trouble", ["drift", "step", "checkpoint"])
def test_a_lineage_that_must_not_go_on_stops_and_the_others_train_as_if_it_were_not_there(
    tmp_path: Path,
    model_path: str,
    trouble: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shared, alone = (Recorded(tmp_path / name, model_path) for name in ("shared", "alone"))
    add_batch(shared, ALICE)
    for recorded, names in ((shared, [MAIN, ALICE]), (alone, [MAIN])):
        for _ in range(2):
            add_batch(recorded, MAIN)
        train(recorded, model_path, names, (names[-1], 1))
    refused = add_batch(shared, ALICE, shift=0.5 if trouble == "drift" else 0.0)
    if trouble == "checkpoint":
        spoil_the_checkpoint(shared)
    with monkeypatch.context() as patched:
        if trouble == "step":
            fail_the_first_step(patched)
        train(shared, model_path, [ALICE, MAIN], (MAIN, 2))
    train(alone, model_path, [MAIN], (MAIN, 2))
    assert made(shared, MAIN) == made(alone, MAIN)
    assert_same(state(shared, MAIN), state(alone, MAIN))
    assert len(shared.store.versions.all(ALICE)) == 1
    assert Counter(shared.trained_in()[turn] for turn in refused) == {None: SIZE}
    said = [r.getMessage() for r in caplog.records if "training stopped" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("training stopped lineage=alice: ")
    assert said[0].endswith("the next start of the learner tries this one again")

    if trouble == "step":  # the next start does
        assert train(shared, model_path, [MAIN, ALICE], (ALICE, 2)) == [(ALICE, 2)]
        assert Counter(shared.trained_in()[turn] for turn in refused) == {2: SIZE}


def fail_the_first_step(patched: pytest.MonkeyPatch) -> None:
    """No cut brings its change within the bound; it has been taken by then."""
    measured = stage.PolicyTrainer._policy_change
    seen: list[float] = []

    def change(trainer: stage.PolicyTrainer) -> float:
        seen.append(measured(trainer))
        return 9.0 if len(seen) <= 11 else seen[-1]

    patched.setattr(stage.PolicyTrainer, "_policy_change", change)


def test_the_last_lineage_to_stop_ends_the_learner_with_its_error(
    tmp_path: Path, model_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = Recorded(tmp_path / "state", model_path)
    for name in (MAIN, ALICE):
        add_batch(recorded, name, shift=0.5 if name == MAIN else 0.25)
    with pytest.raises(LearnerError, match=r"by 0\.2500 nats"):
        train(recorded, model_path, [MAIN, ALICE], (ALICE, 1))
    assert recorded.states() == {"ready": 2 * SIZE}
    assert "training stopped lineage=main: " in caplog.text
    assert "training stopped lineage=alice: " not in caplog.text


def test_a_rollback_and_a_rejection_of_one_lineage_change_nothing_for_the_other(
    tmp_path: Path, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice's first candidate is rejected and her second one taken back by a person."""
    shared, alone = (Recorded(tmp_path / name, model_path) for name in ("shared", "alone"))
    for _ in range(3):
        add_batch(shared, ALICE)
        add_batch(shared, MAIN)
        add_batch(alone, MAIN)
    train(alone, model_path, [MAIN], (MAIN, 3))
    asked: list[object] = []

    def objection(found: object, _config: LearnerConfig) -> str | None:
        asked.append(found)
        return "it was told to" if len(asked) == 1 else None

    monkeypatch.setattr(stage, "objection", objection)
    service = Service(shared.store, (MAIN, 3))

    def publish(version: PolicyVersion, withdraw: bool = False) -> None:
        service(version, withdraw)
        if (version.lineage, version.number) == (ALICE, 2):
            shared.store.versions.set_serving(ALICE, 0)

    stage.run(shared.store, CONFIG, model_path, [ALICE, MAIN], publish, service.stop)
    assert made(shared, MAIN) == made(alone, MAIN)
    assert_same(state(shared, MAIN), state(alone, MAIN))
    versions = shared.store.versions.all(ALICE)
    assert versions[0].state is VersionState.REJECTED
    assert [v.parent for v in versions] == [0, 0, 0]


def test_a_lineage_is_trained_by_one_process_at_a_time(tmp_path: Path, model_path: str) -> None:
    recorded = Recorded(tmp_path / "state", model_path)
    for name in (MAIN, ALICE):
        add_batch(recorded, name)
    refusals: list[str] = []
    service = Service(recorded.store, (MAIN, 1))

    def publish(version: PolicyVersion, withdraw: bool = False) -> None:
        with pytest.raises(StartError) as refused:
            train(recorded, model_path, [ALICE, MAIN], (MAIN, 2))
        refusals.append(str(refused.value))
        assert train(recorded, model_path, [ALICE], (ALICE, 1)) == [(ALICE, 1)]
        service(version, withdraw)

    stage.run(recorded.store, CONFIG, model_path, [MAIN], publish, service.stop)
    assert refusals == [
        f"lineage 'main' is trained by process {os.getpid()}: end it, or train another one with "
        "`nextstate learner --lineage NAME`"
    ]


class FakeTrainer:
    """Holds one number, to which each lineage's step adds one of its own."""

    def __init__(self) -> None:
        self.held = 0
        self.exchanges = 0

    def parked(self) -> Parked:
        return Parked({}, {"held": self.held})

    def unpark(self, parked: Parked) -> None:
        self.exchanges += 1
        self.held = parked.state["held"]


class FakeLearner:
    """Has something to train at some of its looks into the store, or fails there."""

    def __init__(
        self, lineage: str, looks: Sequence[bool | None], seat: Seat, trainer: FakeTrainer
    ) -> None:
        self.lineage = lineage
        self.looks = deque(looks)
        self.expected = 0
        self.resumed = 0
        self.recovered = 0
        self._seat = seat
        self._trainer = trainer

    def resume(self) -> None:
        self.resumed += 1

    def turn(self) -> Generator[Update, None, bool]:
        due = self.looks.popleft() if self.looks else False
        if due is None:
            self.looks.clear()
            raise LearnerError(self.lineage)
        if not due:
            return False
        self._seat.take(self.lineage)
        assert self._trainer.held == self.expected
        yield Update((), version=int(self.lineage))
        self.expected += int(self.lineage) + 1
        self._trainer.held = self.expected
        return True

    def recover(self) -> None:
        self.recovered += 1


class Rounds(threading.Event):
    """Ends the learner when it has nothing left to do; counts its pauses."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses = 0
        self.learners: list[FakeLearner] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses += 1
        if not any(learner.looks for learner in self.learners):
            self.set()
        return self.is_set()


LOOKS = st.lists(st.sampled_from([True, True, False, None]), max_size=8)


@given(st.lists(LOOKS, min_size=1, max_size=4))
def test_turns_are_fair_and_each_lineage_finds_its_own_state(plans: list[list[bool | None]]):
    stop, trainer = Rounds(), FakeTrainer()
    names = [str(number) for number in range(len(plans))]
    seat = Seat(trainer, names)
    learners = [FakeLearner(n, p, seat, trainer) for n, p in zip(names, plans, strict=True)]
    stop.learners = learners
    turns = Turns(learners, seat, lambda: None, stop, 1.0)
    trained: list[str] = []
    failed: list[str] = []

    def run() -> Iterator[str]:
        while True:
            try:
                for update in turns.updates():
                    trained.append(str(update.version))
                return
            except LearnerError as error:
                failed.append(str(error))
                try:
                    turns.drop(error)
                except LearnerError:
                    yield str(error)
                    return

    last = list(run())
    fails = {name: None in plan for name, plan in zip(names, plans, strict=True)}
    assert sorted(failed) == [name for name in names if fails[name]]
    assert last == (failed[-1:] if all(fails.values()) else [])
    # Nothing is left out, nothing comes after a failure.
    rounds: list[tuple[int, str]] = []
    for name, plan in zip(names, plans, strict=True):
        until = plan.index(None) if None in plan else len(plan)
        rounds += [(look, name) for look, due in enumerate(plan[:until]) if due]
    # A look a round: what is due at everyone's first look comes before anyone's second, and so on.
    assert trained == [name for _, name in sorted(rounds)]
    assert all(learner.resumed == 1 for learner in learners)
    assert [learner.recovered for learner in learners] == [int(fails[n]) for n in names]
    changes = sum(a != b for a, b in zip([None, *trained], trained, strict=False))
    assert trainer.exchanges == (0 if len(names) == 1 else changes)


def test_a_round_in_which_nothing_is_due_is_followed_by_one_pause() -> None:
    stop, trainer = Rounds(), FakeTrainer()
    seat = Seat(trainer, ["0", "1"])
    learners = [FakeLearner("0", [True, False], seat, trainer), FakeLearner("1", [], seat, trainer)]
    stop.learners = learners
    assert len(list(Turns(learners, seat, lambda: None, stop, 1.0).updates())) == 1
    assert stop.pauses == 1
