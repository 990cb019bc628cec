"""A learner killed with SIGKILL at any point: nothing trains twice and nothing is lost."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from learner import evaluator, lineage, stage
from learner.checkpoint import load_checkpoint
from learner.metric_writers import MetricWriters
from learner.trainer import PolicyTrainer
from nextstate.config import StoreConfig
from nextstate.engine.adapter_files import verify_adapter
from nextstate.errors import FencedError
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.versions import Versions
from tests.learner.forked import processes
from tests.learner.test_lineages_in_turn import (
    ALICE,
    MAIN,
    add_batch,
    assert_same,
    made,
    state,
    train,
)
from tests.learner.test_tiny_model import GOOD, Recorded, save_tiny_model
from tests.learner.test_tiny_model import WITH_CANARIES as CONFIG
from tests.postgresql_server import instead_of_files


def answer_in_short() -> None:
    """Replies to canaries decide nothing here, and would take half of the time."""
    evaluator.REPLY_TOKENS = 4


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "REPLY_TOKENS", evaluator.REPLY_TOKENS)
    answer_in_short()


def kill_myself(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rejected(*_: object) -> str:
    return "it was told to"


def learner_that_dies(config: StoreConfig, model_path: str, point: str) -> None:
    """Runs the stage until `point`, which is a step of its order, and dies there."""
    answer_in_short()
    match point:
        case "before the gate":
            lineage.objection = kill_myself
        case "before rejecting":
            lineage.objection = rejected
            Versions.add = kill_myself
        case "after rejecting":
            lineage.objection = rejected
            MetricWriters.write = kill_myself
        case "before the step is undone":
            lineage.objection = rejected
            PolicyTrainer.restore = kill_myself
        case "before the step":
            PolicyTrainer.update = kill_myself
        case "before the checkpoint":
            lineage.save_checkpoint = kill_myself
        case "before settling":
            Versions.add = kill_myself
        case _:
            pass
    store = Store(config)
    stage.run(store, CONFIG, model_path, ["main"], kill_myself, threading.Event())


def dies_after(calls: int, act: Callable[..., Any]) -> Callable[..., Any]:
    """`act`, in whose place the process dies once it was called so often."""
    number = count()

    def act_or_die(*arguments: object, **options: object) -> Any:
        if next(number) == calls:
            kill_myself()
        return act(*arguments, **options)

    return act_or_die


STEPS: dict[str, tuple[Any, str]] = {
    "before the step": (PolicyTrainer, "update"),
    "before the checkpoint": (lineage, "save_checkpoint"),
    "before settling": (Versions, "add"),
    "before serving": (Versions, "serve_candidate"),
    "before another lineage's state comes in": (PolicyTrainer, "restore"),
}


def lineages_that_die(config: StoreConfig, model_path: str, point: str, calls: int) -> None:
    """Trains two lineages in turn, and dies when they come to `point` after so many times."""
    answer_in_short()
    owner, name = STEPS[point]
    setattr(owner, name, dies_after(calls, getattr(owner, name)))
    store = Store(config)

    def publish(version: PolicyVersion) -> None:
        store.versions.serve_candidate(version)

    stage.run(store, CONFIG, model_path, [MAIN, ALICE], publish, threading.Event())


def run_until_killed(
    recorded: Recorded,
    model_path: str,
    point: str,
    *calls: int,
    learner: Callable[..., None] = learner_that_dies,
) -> None:
    arguments = (recorded.store.config, model_path, point, *calls)
    child = processes.Process(target=learner, args=arguments)
    child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        pytest.fail(f"the learner never came to the point {point!r}")
    assert child.exitcode == -signal.SIGKILL


def resume(recorded: Recorded, model_path: str, last: int = 2) -> list[int]:
    """The versions that a fresh learner publishes, up to `last`."""
    stop = threading.Event()
    published = []

    def publish(version: PolicyVersion) -> None:
        recorded.store.versions.serve_candidate(version)
        published.append(version.number)
        if version.number == last:
            stop.set()

    stage.run(recorded.store, CONFIG, model_path, ["main"], publish, stop)
    return published


@pytest.mark.parametrize(
    ("point", "kept"),
    [
        ("before the step", False),
        ("before the gate", False),
        ("before rejecting", False),
        ("before the checkpoint", False),
        ("before settling", True),
        ("before serving", True),
    ],
)
def test_a_killed_learner_resumes_exactly(tmp_path, point, kept):
    model_path = save_tiny_model(tmp_path / "model")
    recorded = Recorded(tmp_path / "state", model_path)
    turns = recorded.add_mixed(32)
    run_until_killed(recorded, model_path, point)
    trained = point == "before serving"
    assert recorded.states() == {"trained" if trained else "leased": 16, "ready": 16}
    first = tmp_path / "state/versions/main/v000001"
    identity = first.stat().st_ino if first.exists() else None

    assert resume(recorded, model_path) == [1, 2]
    assert recorded.states() == {"trained": 32}
    assert recorded.trained_in() == dict(zip(turns, [1] * 16 + [2] * 16, strict=True))
    for version in recorded.store.versions.all("main"):
        assert version.path is not None
        verify_adapter(Path(version.path), version.sha256)
    # What the dead learner had finished is taken over, not made a second time.
    assert (first.stat().st_ino == identity) is kept
    assert sorted(p.name for p in first.parent.iterdir()) == ["v000001", "v000002"]


@pytest.mark.parametrize("point", ["before the checkpoint", "before settling"])
def test_a_killed_learner_of_a_store_on_a_server_resumes(tmp_path, postgresql, point):
    model_path = save_tiny_model(tmp_path / "model")
    with instead_of_files(postgresql):
        recorded = Recorded(tmp_path / "state", model_path)
        recorded.add_mixed(32)
        run_until_killed(recorded, model_path, point)
        assert resume(recorded, model_path) == [1, 2]
        assert recorded.states() == {"trained": 32}
        versions = recorded.store.versions.all("main")
        epochs = [1 if point == "before settling" else 2, 2]
        names = [Path(version.path).name for version in versions]
        assert names == [f"v00000{v.number}-e{n}" for v, n in zip(versions, epochs, strict=True)]
        for version in versions:
            verify_adapter(Path(version.path), version.sha256)
        assert [file.name for file in (tmp_path / "state/learner/main").glob("*.pt")] == [
            "checkpoint-e2.pt"
        ]


def test_a_checkpoint_of_samples_that_were_released_meanwhile_is_dropped(tmp_path):
    """Of a store that was put back to an older copy, or of a learner that was replaced."""
    model_path = save_tiny_model(tmp_path / "model")
    recorded = Recorded(tmp_path / "state", model_path)
    recorded.add_mixed(32)
    run_until_killed(recorded, model_path, "before settling")
    recorded.store.training.release_samples("main")
    assert resume(recorded, model_path) == [1, 2]
    assert recorded.states() == {"trained": 32}
    versions = recorded.store.versions
    used = [turn for number in (1, 2) for turn, _ in versions.used_turns("main", number)]
    assert len({*used}) == len(used) == 32


def test_a_learner_that_was_cut_off_and_replaced_leaves_the_files_of_the_next_one(
    tmp_path, postgresql, monkeypatch
):
    model_path = save_tiny_model(tmp_path / "model")
    with instead_of_files(postgresql):
        recorded = Recorded(tmp_path / "state", model_path)
        here = Store(StoreConfig(dir=str(tmp_path / "state")))
        recorded.add_mixed(32)
        monkeypatch.setattr(stage, "ProcessLock", lambda *_: nullcontext())  # each has a machine
        reached, goes_on = threading.Event(), threading.Event()
        save = lineage.Lineage._save

        def waits(self: lineage.Lineage, *given: Any) -> PolicyVersion:
            if self._store is here:
                reached.set()
                assert goes_on.wait(120)
            return save(self, *given)

        monkeypatch.setattr(lineage.Lineage, "_save", waits)
        with ThreadPoolExecutor() as pool:
            other = replace(CONFIG, batch_size=8)  # so that it makes another adapter
            nothing = threading.Event()
            cut_off = pool.submit(stage.run, here, other, model_path, ["main"], print, nothing)
            assert reached.wait(120)
            postgresql.run(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            )
            try:
                assert resume(recorded, model_path, last=1) == [1]
            finally:
                goes_on.set()
            with pytest.raises(FencedError):
                cut_off.result()
        version = recorded.store.versions.serving("main")
        verify_adapter(Path(version.path), version.sha256)
        found = load_checkpoint(tmp_path / "state/learner/main")
        assert found.version.sha256 == version.sha256
        assert resume(recorded, model_path) == [2]
        assert recorded.states() == {"trained": 32}


@pytest.mark.parametrize("point", ["after rejecting", "before the step is undone"])
def test_a_learner_killed_after_a_rejection_goes_on_from_the_parent(tmp_path, point):
    model_path = save_tiny_model(tmp_path / "model")
    recorded, spared = (Recorded(tmp_path / name, model_path) for name in ("state", "spared"))
    for one in (recorded, spared):
        one.add_mixed(16)
        assert resume(one, model_path, last=1) == [1]
    for _ in range(16):
        recorded.add(GOOD, -1)
    run_until_killed(recorded, model_path, point)
    assert recorded.states() == {"trained": 16, "dropped": 16}

    for one in (recorded, spared):
        one.add_mixed(16)
    assert resume(recorded, model_path, last=3) == [3]
    assert resume(spared, model_path, last=2) == [2]
    first, second, third = recorded.store.versions.all("main")
    assert (second.state, second.parent, second.path) == (VersionState.REJECTED, 1, None)
    assert (third.state, third.parent) == (VersionState.SERVING, first.number)
    assert recorded.states() == {"trained": 32, "dropped": 16}
    # As if the rejected batch had never been: weights, moments and random numbers.
    assert third.sha256 == spared.store.versions.all("main")[-1].sha256


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Recorded]:
    """A model, and two lineages that a learner has trained twice without being killed."""
    model_path = save_tiny_model(tmp_path_factory.mktemp("model"))
    recorded = Recorded(tmp_path_factory.mktemp("unharmed"), model_path)
    for name in (MAIN, ALICE) * 2:
        add_batch(recorded, name)
    train(recorded, model_path, [MAIN, ALICE], (ALICE, 2))
    return model_path, recorded


@pytest.mark.parametrize(
    ("point", "calls"),
    [
        ("before the step", 2),
        ("before the checkpoint", 3),
        ("before settling", 2),
        ("before serving", 3),
        ("before another lineage's state comes in", 3),
    ],
)
def test_every_lineage_of_a_killed_learner_resumes_with_its_optimizer_and_step(
    tmp_path, unharmed, point, calls
):
    """Killed in the main lineage's second update, which is the third in all, or in Alice's."""
    model_path, expected = unharmed
    recorded = Recorded(tmp_path / "state", model_path)
    for name in (MAIN, ALICE) * 2:
        add_batch(recorded, name)
    run_until_killed(recorded, model_path, point, calls, learner=lineages_that_die)
    trained_before = {turn: v for turn, v in recorded.trained_in().items() if v is not None}
    assert len(trained_before) == 16 * (calls + (point == "before serving"))
    train(recorded, model_path, [MAIN, ALICE], (ALICE, 2))
    assert recorded.states() == {"trained": 16 * 4}
    assert trained_before.items() <= recorded.trained_in().items()
    for name in (MAIN, ALICE):
        assert [v.number for v in recorded.store.versions.all(name)] == [1, 2]
        assert made(recorded, name) == made(expected, name)
        assert_same(state(recorded, name), state(expected, name))
        assert recorded.store.versions.serving(name).number == 2
