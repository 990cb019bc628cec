"""Lineages that take turns at one trainer: each trains as if it were alone, and none waits long."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner import evaluator, lineage, stage, trainer
from learner.checkpoint import load_checkpoint
from learner.config import LearnerConfig
from learner.folders import lineage_folder
from learner.kl import kl_divergence
from learner.shared_trainer import SharedTrainer
from learner.step_size import MAX_TRIES
from learner.weights import Snapshot
from nextstate.errors import LearnerError, StartError, TakenError
from nextstate.process_lock import ProcessLock
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

    def __call__(self, version: PolicyVersion, withdraw: object = None) -> None:
        self._store.versions.serve_candidate(version)
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
    """The lineage's moments and steps, flat."""
    checkpoint = load_checkpoint(recorded.store.dir / "learner" / lineage)
    assert checkpoint is not None
    moments: dict[int, dict[str, Any]] = checkpoint.training["optimizer"]["state"]
    found = {f"{at}/{name}": v for at, one in moments.items() for name, v in one.items()}
    return found | {"step": torch.tensor(checkpoint.training["step"])}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_each_of_two_lineages_trains_bit_for_bit_as_if_it_were_alone(
    tmp_path: Path, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "REPLY_TOKENS", 8)
    shared = Recorded(tmp_path / "shared", model_path)
    alone = {name: Recorded(tmp_path / name, model_path) for name in (MAIN, ALICE)}
    for name in (MAIN, ALICE) * 3:
        add_batch(shared, name)
        add_batch(alone[name], name)
    canaries = {"gate_canaries": 1}  # they must not disturb the other lineage either
    published = train(shared, model_path, [MAIN, ALICE], (ALICE, 3), **canaries)
    assert published == [(name, n) for n in (1, 2, 3) for name in (MAIN, ALICE)]
    for name, recorded in alone.items():
        train(recorded, model_path, [name], (name, 3), **canaries)
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
    failing = iter([9.0] * (MAX_TRIES + 1))

    def change(old: torch.Tensor, new: torch.Tensor, drawn_by: torch.Tensor) -> float:
        return next(failing, None) or kl_divergence(old, new, drawn_by)

    patched.setattr(trainer, "kl_divergence", change)


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

    monkeypatch.setattr(lineage, "objection", objection)
    service = Service(shared.store, (MAIN, 3))

    def publish(version: PolicyVersion, withdraw: object = None) -> None:
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

    def publish(version: PolicyVersion, withdraw: object = None) -> None:
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


@pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
def test_files_that_another_process_has_are_waited_for_where_machines_share_them(
    store: Store, database: str, model_path: str
) -> None:
    """A learner that was cut off from Ray may hold them until it has ended itself."""
    folder = lineage_folder(store.dir / "learner", MAIN)
    folder.mkdir(parents=True)
    service = Service(store, (MAIN, 1))
    with ProcessLock(folder / "lock", "taken", "end it"), pytest.raises(StartError) as refused:
        stage.run(store, CONFIG, model_path, [MAIN], service, service.stop)
    assert isinstance(refused.value, TakenError) is (database == "postgresql")


class FakeTrainer:
    """Holds one number, to which each lineage's step adds one of its own."""

    def __init__(self) -> None:
        self.held = 0
        self.exchanges = 0

    def snapshot(self) -> Snapshot:
        return Snapshot({}, {"held": self.held})

    def restore(self, snapshot: Snapshot) -> None:
        self.exchanges += 1
        self.held = snapshot.training["held"]


class FakeLineage:
    """Has something to train at some of its looks into the store, or fails there."""

    def __init__(self, name: str, looks: Sequence[bool | None], shared: SharedTrainer) -> None:
        self.name = name
        self.looks = deque(looks)
        self.expected = 0
        self.resumed = 0
        self.released = 0
        self.reports: list[str] = []
        self.looked = 0
        self.trained: list[str] = []
        """Shared by all: the names of the lineages that trained, in order."""
        self._shared = shared

    def resume(self) -> None:
        self.resumed += 1

    def update(self) -> bool:
        due = self.looks.popleft() if self.looks else False
        if due is None:
            self.looks.clear()
            raise LearnerError(self.name)
        if not due:
            return False
        trainer = self._shared.of(self.name)
        assert trainer.held == self.expected
        self.trained.append(self.name)
        self.expected += int(self.name) + 1
        trainer.held = self.expected
        return True

    def look(self) -> None:
        self.looked += 1

    def stopped(self, error: LearnerError) -> None:
        self.reports.append(f"stopped: {error}")

    def release(self) -> None:
        self.released += 1


class Rounds(threading.Event):
    """Ends the learner when it has nothing left to do; counts its pauses."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses = 0
        self.lineages: list[FakeLineage] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses += 1
        if not any(one.looks for one in self.lineages):
            self.set()
        return self.is_set()


LOOKS = st.lists(st.sampled_from([True, True, False, None]), max_size=8)


def run_in_turn(
    plans: Sequence[Sequence[bool | None]],
) -> tuple[list[FakeLineage], FakeTrainer, Rounds, str | None]:
    """The lineages, their trainer, the pauses and the error that ended the loop."""
    stop, trainer = Rounds(), FakeTrainer()
    names = [str(number) for number in range(len(plans))]
    shared = SharedTrainer(trainer, names)
    lineages = [FakeLineage(n, p, shared) for n, p in zip(names, plans, strict=True)]
    for one in lineages:
        one.trained = lineages[0].trained
    stop.lineages = lineages
    try:
        stage.train_in_turn(lineages, shared.forget, lambda: True, stop, 1.0)
    except LearnerError as error:
        return lineages, trainer, stop, str(error)
    return lineages, trainer, stop, None


@given(st.lists(LOOKS, min_size=1, max_size=4))
def test_turns_are_fair_and_each_lineage_finds_its_own_state(plans: list[list[bool | None]]):
    lineages, trainer, _, ended_by = run_in_turn(plans)
    fails = [None in plan for plan in plans]
    for one, failed in zip(lineages, fails, strict=True):
        assert one.reports == ([f"stopped: {one.name}"] if failed else [])
        assert (one.resumed, one.released) == (1, int(failed))
    assert (ended_by is not None) == all(fails)
    # Nothing is left out, and nothing comes after a failure. What is due at the first look of each
    # comes before what is due at the second look of any.
    rounds: list[tuple[int, str]] = []
    for one, plan in zip(lineages, plans, strict=True):
        until = plan.index(None) if None in plan else len(plan)
        rounds += [(look, one.name) for look, due in enumerate(plan[:until]) if due]
    trained = lineages[0].trained
    assert trained == [name for _, name in sorted(rounds)]
    changes = sum(a != b for a, b in zip([None, *trained], trained, strict=False))
    assert trainer.exchanges == (0 if len(lineages) == 1 else changes)


def test_a_round_in_which_nothing_is_due_is_followed_by_one_pause() -> None:
    lineages, _, stop, _ = run_in_turn([[True, False], []])
    assert lineages[0].trained == ["0"]
    assert stop.pauses == 1


def test_a_lineage_that_failed_is_tried_again_after_a_pause_that_doubles() -> None:
    class Failing(FakeLineage):
        def update(self) -> bool:
            tried.append(now[0])
            raise LearnerError(self.name)

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            now[0] += 300.0
            if now[0] > 2000:
                self.set()
            return self.is_set()

    now, tried, stop = [0.0], list[float](), Clock()
    shared = SharedTrainer(FakeTrainer(), ["0", "1"])
    failing = Failing("0", [], shared)
    lineages = [failing, FakeLineage("1", [], shared)]
    stage.train_in_turn(lineages, shared.forget, lambda: True, stop, 1.0, lambda: now[0])
    assert tried == [0.0, 600.0, 1800.0]
    assert failing.resumed == failing.released == 3


def test_outside_its_window_each_lineage_looks_at_each_poll_and_none_trains() -> None:
    opens = iter([False] * 6 + [True] * 20)
    stop, shared = Rounds(), SharedTrainer(FakeTrainer(), ["0", "1"])
    stop.lineages = [FakeLineage(name, [True], shared) for name in ("0", "1")]
    first, second = stop.lineages
    stage.train_in_turn(stop.lineages, shared.forget, lambda: next(opens), stop, 1.0)
    assert (first.looked, second.looked) == (3, 3)
    assert (first.trained, second.trained) == (["0"], ["1"])


def test_a_lineage_that_is_left_alone_is_looked_at_all_the_same() -> None:
    lineages, _, stop, _ = run_in_turn([[None], [False] * 5])
    assert lineages[0].looked == stop.pauses - 1 == 4
    assert lineages[1].looked == 0  # its updates begin with a look
