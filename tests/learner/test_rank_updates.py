"""Several processes take an update together, and it is the update of one process."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from learner import stage
from learner.config import LearnerConfig
from learner.rank_processes import started
from learner.ranks import Ranks, deal
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.errors import LearnerError
from nextstate.records import Sample
from tests.learner.test_parity import LAGS, STALE, conversation_samples
from tests.learner.test_tiny_model import save_tiny_model

ROUNDING = 1e-6
"""Of the largest entry: floating-point sums in another order."""
TRAINED = replace(STALE, learning_rate=0.0, epochs=2, kl_coef=0.1, micro_batch_tokens=24)
"""As by default the rate is found; the shares of two ranks are several micro-batches."""


class Pair:
    """A trainer of two ranks and one without others, from the same state."""

    def __init__(
        self, folder: Path, ranks: Ranks, model_path: str, config: LearnerConfig = TRAINED
    ) -> None:
        schedule = stage._schedule(config, threading.Event(), None)
        self.two = stage._trainer(config, model_path, folder, "float32", schedule, ranks)
        self.one = build_trainer(replace(config, ranks=1, divided=False), model_path, folder)
        self.model_path = model_path
        self.fresh = self.one.snapshot()

    def reset(self) -> None:
        for trainer in (self.one, self.two):
            trainer.restore(self.fresh)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model_path = save_tiny_model(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("work")
    follow = partial(stage.follow, TRAINED, model_path, folder, "float32", None)
    with started(2, follow, lambda: None, folder / "file") as ranks:
        yield Pair(folder, ranks, model_path)


def gradients(trainer: PolicyTrainer, samples: Sequence[Sample]) -> list[list[torch.Tensor]]:
    """Those of each step of one update, which is undone."""
    found: list[list[torch.Tensor]] = []
    step = trainer.optimizer_step

    def noted() -> float:
        found.append([w.grad.clone() for w in trainer.trained if w.grad is not None])
        return step()

    trainer.optimizer_step = noted  # type: ignore[method-assign]
    try:
        trainer.restore(trainer.update(samples, LAGS).before)
    finally:
        del trainer.optimizer_step
    return found


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest one, relative to the largest entry."""
    scale = max(float(x.abs().max()) for x in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / scale


def test_the_first_gradient_of_two_ranks_is_that_of_one(pair):
    pair.reset()
    samples = conversation_samples(pair.model_path)
    for update in range(2):  # a fresh adapter's A has no gradient
        ours, theirs = (gradients(t, samples)[0] for t in (pair.two, pair.one))
        assert difference(ours, theirs) <= ROUNDING, update
        pair.one.update(samples, LAGS)
        pair.two.restore(pair.one.snapshot())


def test_updates_of_two_ranks_are_those_of_one(pair):
    pair.reset()
    samples = conversation_samples(pair.model_path)
    for _ in range(5):
        ours, theirs = (t.update(samples, LAGS).metrics for t in (pair.two, pair.one))
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"step/seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name
    ours, theirs = (list(t.weights.copy().values()) for t in (pair.two, pair.one))
    assert difference(ours, theirs) < 1e-2


def test_a_rank_without_a_sequence_takes_part(pair):
    pair.reset()
    samples = conversation_samples(pair.model_path)[:1]
    ours, theirs = (gradients(t, samples)[0] for t in (pair.two, pair.one))
    assert difference(ours, theirs) <= ROUNDING


def drifted(samples: Sequence[Sample]) -> list[Sample]:
    """The same, but the longest of them is nothing that this engine can have said."""
    longest = deal(samples, 2)[0][0].turn
    return [
        replace(s, behaviour_logprobs=(-400.0,) * len(s.completion_ids)) if s.turn == longest else s
        for s in samples
    ]


def test_drift_on_one_rank_stops_all_as_it_stops_one(pair):
    pair.reset()
    samples = drifted(conversation_samples(pair.model_path))
    said = []
    for trainer in (pair.two, pair.one):
        with pytest.raises(LearnerError, match="nothing was trained") as raised:
            trainer.update(samples, LAGS)
        said.append(str(raised.value))
        assert all(torch.equal(w, pair.fresh.weights[n]) for n, w in trainer.weights.copy().items())
    assert said[0] == said[1]
    pair.two.update(conversation_samples(pair.model_path), LAGS)  # the ranks go on


def test_what_is_not_a_number_on_one_rank_is_on_all(pair):
    pair.reset()
    samples = conversation_samples(pair.model_path)
    last = deal(samples, 2)[1][0]
    no_number = replace(last, advantage=1.0)
    object.__setattr__(no_number, "advantage", float("nan"))  # as if a device computed it
    broken = [no_number if s is last else s for s in samples]
    results = [t.update(broken, LAGS) for t in (pair.two, pair.one)]
    for trainer, result in zip((pair.two, pair.one), results, strict=True):
        assert result.metrics["loss"] != result.metrics["loss"]
        assert not all(w.isfinite().all() for w in trainer.trained)
        trainer.restore(result.before)
    pair.two.update(samples, LAGS)


def test_too_little_memory_for_the_step_of_one_rank_stops_all_and_undoes_it(pair):
    pair.reset()
    samples = conversation_samples(pair.model_path)

    def fail() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")

    pair.two.optimizer_step = fail
    with pytest.raises(LearnerError, match="did not fit: CUDA out of memory; lower"):
        pair.two.update(samples, LAGS)
    del pair.two.optimizer_step
    fresh = pair.fresh.weights
    assert all(torch.equal(w, fresh[n]) for n, w in pair.two.weights.copy().items())
    pair.two.update(samples, LAGS)  # the ranks go on


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_after_a_hundred_updates_the_ranks_are_equal_in_every_bit(pair):
    """Each update checks that itself (`Ranks.require_equal`), or raises."""
    pair.reset()
    samples = conversation_samples(pair.model_path)
    apart = []
    for number in range(100):
        chosen = [s for at, s in enumerate(samples) if (at + number) % 5]
        for trainer in (pair.two, pair.one):
            trainer.update(chosen, LAGS)
        ours, theirs = (list(t.weights.copy().values()) for t in (pair.two, pair.one))
        apart.append(difference(ours, theirs))
    print("apart from one rank, of the largest weight:", [f"{apart[n]:.1e}" for n in (0, 9, 99)])
