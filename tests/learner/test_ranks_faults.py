"""A rank killed or stopped at any point: the learner ends, a new one trains nothing twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from learner import lineage, rank_processes, stage
from learner.config import LearnerConfig
from learner.divided import decoder_layers
from learner.memory import try_largest_batch
from learner.ranks import Ranks
from learner.trainer import PolicyTrainer
from nextstate.config import StoreConfig
from nextstate.errors import EXIT_LATER, LostRankError, NoRoomError
from nextstate.records import PolicyVersion
from nextstate.store import Store
from tests.learner.forked import processes
from tests.learner.test_tiny_model import CONFIG, Recorded, save_tiny_model

TWO = replace(CONFIG, ranks=2)
DIVIDED = replace(TWO, divided=True, gate_canaries=1)
_HANG_S = 4


def signal_myself(reached: Path, number: int, *_: object, **__: object) -> None:
    reached.touch()
    os.kill(os.getpid(), number)


def arm(reached: Path, rank: int, point: str, number: int) -> None:
    """From now on this process gets the signal when it comes to the point of an update."""
    act = partial(signal_myself, reached, number)
    match point:
        case "forward":
            PolicyTrainer._update = armed_pass(act)  # type: ignore[method-assign]
        case "layer":
            PolicyTrainer._update = armed_layer(act)  # type: ignore[method-assign]
        case "lend":
            Ranks._lend = act  # type: ignore[method-assign]
        case "reduce":
            dist.all_reduce = act
        case "save" if rank == 0:
            lineage.save_checkpoint = act
        case _:
            raise AssertionError(point)


def armed_pass(act: Callable[..., object]) -> Callable[..., Any]:
    """An update in which the first forward pass is the point; the trial pass is not."""
    update = PolicyTrainer._update

    def armed(self: PolicyTrainer, *given: Any) -> Any:
        self._score = act  # type: ignore[method-assign]
        return update(self, *given)

    return armed


def armed_layer(act: Callable[..., object]) -> Callable[..., Any]:
    """An update in which the point comes after the first layer of a pass, before the next."""
    update = PolicyTrainer._update

    def armed(self: PolicyTrainer, *given: Any) -> Any:
        decoder_layers(self.policy.get_base_model())[0].register_forward_hook(act)
        return update(self, *given)

    return armed


def follow(reached: Path, rank: int, point: str, number: int, *given: Any) -> None:
    """The life of the other rank, with the point in it if it is its own."""
    if rank == 1:
        arm(reached, rank, point, number)
    _follow(*given)


_follow = stage.follow


def kill_the_other(reached: Path, *given: Any) -> None:
    """Rank 0 saves, and meanwhile the other rank is killed."""
    reached.touch()
    (child,) = multiprocessing.active_children()
    child.kill()
    child.join()
    _save(*given)


_save = lineage.save_checkpoint


def reached_in(state_dir: str | Path) -> Path:
    """The file that tells that the fault came where it should."""
    return Path(f"{state_dir}.reached")


def learner_with_fault(
    state_dir: str, model_path: str, config: LearnerConfig, rank: int, point: str, number: int
) -> None:
    """Rank 0 of two, as a process of its own."""
    if number == signal.SIGSTOP:
        stage.started = partial(rank_processes.started, hang_s=_HANG_S)  # type: ignore[assignment]
    reached = reached_in(state_dir)
    stage.follow = partial(follow, reached, rank, point, number)  # type: ignore[assignment]
    if (rank, point) == (1, "save"):
        stage.follow = _follow
        lineage.save_checkpoint = partial(kill_the_other, reached)
    elif rank == 0:
        arm(reached, rank, point, number)
    store = Store(StoreConfig(dir=state_dir))
    try:
        run(store, model_path, threading.Event(), last=2, config=config)
    except LostRankError as error:
        print(error, flush=True)
        os._exit(EXIT_LATER)


def run(
    store: Store,
    model_path: str,
    stop: threading.Event,
    last: int,
    config: LearnerConfig = TWO,
) -> None:
    def publish(version: PolicyVersion, withdraw: object = None) -> None:
        store.versions.serve_candidate(version)
        if version.number == last:
            stop.set()

    stage.run(store, config, model_path, ["main"], publish, stop)


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Inside, a rank is there at once. Beside a fault it starts as any learner's does, in 8 s."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(multiprocessing, "get_context", lambda _: processes)
        yield


def trained(
    folder: Path, model_path: str, *fault: Any, config: LearnerConfig = TWO
) -> tuple[Recorded, list[str], int | None]:
    """What two updates come to, if the learner meets a fault and is then started again."""
    recorded = Recorded(folder, model_path)
    turns = recorded.add_mixed(32)
    code = None
    if fault:
        given = (str(folder), model_path, config, *fault)
        child = processes.Process(target=learner_with_fault, args=given)
        child.start()
        child.join(240)
        if child.is_alive():
            child.kill()
            pytest.fail(f"the learner hangs after {fault}")
        code = child.exitcode
        assert reached_in(folder).exists(), f"the learner ended before {fault}"
    stop = threading.Event()
    if recorded.store.versions.serving("main").number < 2:
        with forked_ranks():
            run(recorded.store, model_path, stop, last=2, config=config)
    return recorded, turns, code


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str | None]]:
    """A model, and the versions of a learner to which nothing happens."""
    model_path = save_tiny_model(tmp_path_factory.mktemp("model"))
    recorded, _, _ = trained(tmp_path_factory.mktemp("unharmed"), model_path)
    return model_path, [v.sha256 for v in recorded.store.versions.all("main")]


@pytest.mark.timeout(600)
def test_a_base_that_leaves_no_room_for_a_batch_is_divided_and_makes_the_same_versions(
    tmp_path, unharmed, monkeypatch
):
    model_path, expected = unharmed
    tried = []

    def attempt(trainer: PolicyTrainer) -> tuple[int, int]:
        tried.append(trainer.config.divided)
        if not trainer.config.divided:
            raise NoRoomError("it does not fit")
        return try_largest_batch(trainer)

    monkeypatch.setattr(stage, "try_largest_batch", attempt)
    recorded, turns, _ = trained(tmp_path / "state", model_path)
    assert tried == [False, True]
    assert recorded.trained_in() == dict(zip(turns, [1] * 16 + [2] * 16, strict=True))
    assert [v.sha256 for v in recorded.store.versions.all("main")] == expected


FAULTS = [
    pytest.param(TWO, 1, "reduce", signal.SIGSTOP),  # and then it is killed
    pytest.param(TWO, 1, "forward", signal.SIGKILL, marks=pytest.mark.soak),
    pytest.param(TWO, 0, "reduce", signal.SIGKILL, marks=pytest.mark.soak),
    pytest.param(TWO, 0, "forward", signal.SIGKILL, marks=pytest.mark.soak),
    pytest.param(TWO, 1, "reduce", signal.SIGKILL, marks=pytest.mark.soak),
    pytest.param(TWO, 0, "save", signal.SIGKILL, marks=pytest.mark.soak),
    pytest.param(TWO, 1, "save", signal.SIGKILL, marks=pytest.mark.soak),
    pytest.param(TWO, 1, "forward", signal.SIGSTOP, marks=pytest.mark.soak),
    pytest.param(TWO, 0, "reduce", signal.SIGSTOP, marks=pytest.mark.soak),
    pytest.param(TWO, 0, "save", signal.SIGSTOP, marks=pytest.mark.soak),
    pytest.param(DIVIDED, 1, "lend", signal.SIGKILL),  # rank 0 is in a pass of the gate
    pytest.param(DIVIDED, 1, "layer", signal.SIGKILL, marks=pytest.mark.soak),
    pytest.param(DIVIDED, 0, "layer", signal.SIGKILL, marks=pytest.mark.soak),
    pytest.param(DIVIDED, 1, "layer", signal.SIGSTOP, marks=pytest.mark.soak),
    pytest.param(DIVIDED, 0, "layer", signal.SIGSTOP, marks=pytest.mark.soak),
    pytest.param(DIVIDED, 1, "save", signal.SIGKILL, marks=pytest.mark.soak),
]
"""Each starts a process with TRL: `make soak` has them all."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("config", "rank", "point", "number"), FAULTS)
def test_a_rank_that_is_lost_ends_the_learner_and_a_new_one_goes_on_exactly(
    tmp_path, unharmed, config, rank, point, number
):
    """Exactly, and with a divided base the very versions of ranks that hold a whole one."""
    model_path, expected = unharmed
    fault = rank, point, int(number)
    recorded, turns, code = trained(tmp_path / "state", model_path, *fault, config=config)
    assert code == (-signal.SIGKILL if rank == 0 else EXIT_LATER)
    assert recorded.states() == {"trained": 32}
    assert recorded.trained_in() == dict(zip(turns, [1] * 16 + [2] * 16, strict=True))
    assert [v.sha256 for v in recorded.store.versions.all("main")] == expected
    assert not (tmp_path / "state/learner/main/ranks").exists()
