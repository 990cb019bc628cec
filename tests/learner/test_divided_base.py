"""A base whose layers are divided over two ranks: the update of one process, in half the room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from learner import stage
from learner.adapters import Card
from learner.config import LearnerConfig
from learner.divided import decoder_layers
from learner.evaluator import Evaluator
from learner.rank_processes import started
from learner.ranks import Ranks, deal
from learner.tensors import micro_batches
from learner.trainer import PolicyTrainer
from nextstate.errors import LearnerError
from tests.learner.test_parity import LAGS, conversation_samples
from tests.learner.test_rank_updates import ROUNDING, TRAINED, Pair, difference, drifted, gradients
from tests.learner.test_tiny_model import save_tiny_model

DIVIDED = replace(
    TRAINED,
    ranks=2,
    divided=True,
    epochs=1,
    gate_canaries=2,
    micro_batch_tokens=16,
    gradient_checkpointing=True,
)
CARD = Card("main", 1, 0, "combined", (), {})


def held(trainer: PolicyTrainer) -> tuple[int, int]:
    """Bytes of the base that this process holds, and of the layers among them."""

    def nbytes(weights: Any) -> int:
        own = (w.to_local() if hasattr(w, "to_local") else w for w in weights)
        return sum(w.nbytes for w in own if not w.requires_grad)

    base = trainer.policy.get_base_model()
    layers = [weight for layer in decoder_layers(base) for weight in layer.parameters()]
    return nbytes(base.parameters()), nbytes(layers)


def follow(config: LearnerConfig, model_path: str, folder: Path, ranks: Ranks) -> None:
    """The life of the other rank; it says what it holds."""
    schedule = stage._schedule(config, stage.threading.Event(), None)
    trainer = stage._trainer(config, model_path, folder, "float32", schedule, ranks)
    ranks.all(lambda: [held(trainer)])
    trainer.follow()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model_path = save_tiny_model(tmp_path_factory.mktemp("model"), layers=3)
    folder = tmp_path_factory.mktemp("work")
    work = partial(follow, DIVIDED, model_path, folder)
    with started(2, work, lambda: None, folder / "file") as ranks:
        pair: Any = Pair(folder, ranks, model_path, DIVIDED)
        pair.held = ranks.all(lambda: [held(pair.two)])
        yield pair


def test_each_rank_holds_half_of_every_layer_and_the_embedding(pair):
    base, layers = held(pair.one)
    assert pair.held == [(base - layers + layers // 2, layers // 2)] * 2


@pytest.mark.parametrize(("count", "passes"), [(5, [3, 2]), (7, [2, 3])])
def test_the_gradient_is_that_of_one_rank_also_if_another_has_more_passes(pair, count, passes):
    pair.reset()
    samples = conversation_samples(pair.model_path)[:count]
    shares = [micro_batches(s, DIVIDED.micro_batch_tokens) for s in deal(samples, 2)]
    assert [len(list(share)) for share in shares] == passes
    for update in range(2):  # a fresh adapter's A has no gradient
        ours, theirs = (gradients(t, samples)[0] for t in (pair.two, pair.one))
        assert difference(ours, theirs) <= ROUNDING, update
        pair.one.update(samples, LAGS)
        pair.two.restore(pair.one.snapshot())


def test_updates_are_those_of_one_rank(pair):
    """Each update compares the ranks' weights bit by bit (`Ranks.require_equal`), or raises."""
    pair.reset()
    samples = conversation_samples(pair.model_path)
    for _ in range(3):
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


def test_the_gate_sees_what_it_sees_with_one_rank(pair):
    """Rank 0 reads and replies by itself, and the other one lends its share."""
    pair.reset()
    samples = conversation_samples(pair.model_path)
    result = pair.one.update(samples, LAGS)
    after = pair.one.snapshot()
    found = []
    for trainer in (pair.two, pair.one):
        trainer.restore(result.before)
        evaluator = Evaluator(trainer.config, trainer)
        evaluator.prepare(samples[:4], samples, parent=0)
        trainer.restore(after)
        found.append(evaluator.measure(result).metrics())
    ours, theirs = found
    assert ours.keys() == theirs.keys() >= {"gate/replies", "gate/kl_base"}
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_saved_adapter_and_a_snapshot_are_continued_exactly(pair, tmp_path):
    pair.reset()
    samples = conversation_samples(pair.model_path)
    pair.two.update(samples, LAGS)
    sha256 = pair.two.weights.save(tmp_path / "adapter", CARD)
    snapshot = pair.two.snapshot()
    first = gradients(pair.two, samples)
    pair.one.weights.load(tmp_path / "adapter", sha256)
    theirs = pair.one.weights.copy()
    assert all(torch.equal(w, theirs[n]) for n, w in pair.two.weights.copy().items())
    pair.two.update(samples, LAGS)
    pair.two.restore(snapshot)
    pair.two.weights.load(tmp_path / "adapter", sha256)
    for ours, again in zip(first, gradients(pair.two, samples), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_drift_on_one_rank_stops_all_and_they_go_on(pair):
    pair.reset()
    samples = conversation_samples(pair.model_path)
    with pytest.raises(LearnerError, match="nothing was trained"):
        pair.two.update(drifted(samples), LAGS)
    weights = pair.two.weights.copy()
    assert all(torch.equal(w, pair.fresh.weights[n]) for n, w in weights.items())
    pair.two.update(samples, LAGS)
