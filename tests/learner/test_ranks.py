"""Several processes take an update together, and it is the update of one process."""

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from learner import stage
from learner.model import check_devices
from learner.rank_processes import started
from learner.ranks import Ranks, deal
from learner.tensors import sequence_length, sequences_of
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.errors import LearnerError, LostRankError, StartError
from nextstate.records import Sample
from tests.learner.test_parity import LAGS, STALE, conversation_samples
from tests.learner.test_tiny_model import CONFIG, sample, save_tiny_model

ROUNDING = 1e-6
"""Of the largest entry: floating-point sums in another order."""
TRAINED = replace(STALE, learning_rate=0.0, epochs=2, kl_coef=0.1, micro_batch_tokens=24)
"""As by default the rate is found; the shares of two ranks are several micro-batches."""


# -- dealing ---------------------------------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn) -> list[Sample]:
    """Turns of a few sessions: each extends the one before it, or begins anew."""
    found: list[Sample] = []
    for session in range(draw(st.integers(1, 8))):
        history: tuple[int, ...] = (1,)
        for turn in range(draw(st.integers(1, 4))):
            if draw(st.booleans()):
                history = (session + 2, *range(draw(st.integers(0, 30))))
            reply = (9,) * draw(st.integers(1, 12))
            one = sample(f"{session}-{turn}", prompt=history, reply=reply)
            found.append(replace(one, session=str(session)))
            history = (*history, *reply)
    return draw(st.permutations(found))


@given(conversations(), st.integers(1, 6))
def test_every_sample_is_dealt_once_in_whole_sequences_of_about_equal_length(samples, count):
    shares = deal(samples, count)
    assert len(shares) == count
    assert sorted(s.turn for share in shares for s in share) == sorted(s.turn for s in samples)
    together = sorted(sorted(t.turn for t in turns) for turns in sequences_of(samples))
    apart = [turns for share in shares for turns in sequences_of(share)]
    assert sorted(sorted(t.turn for t in turns) for turns in apart) == together
    for share in shares:
        assert share == [s for s in samples if s in share], "the order is the given one"
    lengths = [sum(map(sequence_length, sequences_of(share))) for share in shares]
    longest = max(map(sequence_length, sequences_of(samples)))
    assert max(lengths) - min(lengths) <= longest
    assert max(lengths) <= sum(lengths) / count + longest * (count - 1) / count


def test_the_longest_sequences_are_dealt_first():
    samples = [sample(str(n), prompt=(n,), reply=(1,) * n) for n in (1, 5, 3, 4, 2)]
    assert [[s.turn for s in share] for share in deal(samples, 2)] == [["1", "5", "2"], ["3", "4"]]


# -- sums and errors, between real processes -------------------------------------------------------


def act(ranks: Ranks, work: str) -> object:
    """One piece of work, as every rank does it."""
    match work:
        case "sum":
            weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
            weights[0].grad = torch.tensor([1.0, -2.0]) * 10**ranks.rank
            if ranks.rank == 1:
                weights[1].grad = torch.tensor([5.0, 7.0])
            ranks.sum_gradients(weights)
            return ranks.all(lambda: [None if w.grad is None else w.grad.tolist() for w in weights])
        case "tell apart":
            return ranks.require_equal([torch.tensor([1.0, float(ranks.rank)])])
        case "same":
            return ranks.require_equal([torch.tensor([1.0, float("nan")])])
        case "listen":
            return ranks.all(lambda: [own_addresses()])
        case _:
            kinds = {"learner": LearnerError, "start": StartError, "bug": ZeroDivisionError}
            kind = kinds.get(work, torch.OutOfMemoryError)

            def fail() -> list[str]:
                if ranks.rank == 1:
                    raise kind("it went wrong")
                return ["unharmed"]

            return ranks.all(fail)


def act_until_the_end(ranks: Ranks) -> None:
    while True:
        try:
            act(ranks, ranks.receive())
        except (LearnerError, StartError):
            continue


def own_addresses() -> set[str]:
    """The addresses at which this process listens, in hexadecimal as in /proc."""
    sockets = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            sockets.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    listening = (row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets)
    return {row[1].split(":")[0] for row in listening}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with started(
        3, act_until_the_end, lambda: None, tmp_path_factory.mktemp("three") / "f"
    ) as ranks:
        yield ranks


def shared(ranks: Ranks, work: str) -> object:
    ranks.tell(work)
    return act(ranks, work)


def test_gradients_are_summed_and_a_gradient_that_no_rank_has_stays_away(three):
    summed = [[111.0, -222.0], [5.0, 7.0], None]
    assert shared(three, "sum") == summed * 3, "on every rank"


@pytest.mark.parametrize(("work", "kind"), [("learner", LearnerError), ("start", StartError)])
def test_an_error_on_one_rank_is_raised_on_all_and_the_ranks_go_on(three, work, kind):
    with pytest.raises(kind, match=r"^rank 1 of the learner: it went wrong$"):
        shared(three, work)
    assert shared(three, "sum")


def test_too_little_memory_on_one_rank_stops_all_and_names_keys(three):
    said = r"^rank 1 of the learner: an update did not fit: it went wrong; lower .*max_tokens"
    with pytest.raises(LearnerError, match=said):
        shared(three, "memory")
    assert shared(three, "sum")


def test_weights_that_differ_in_one_bit_are_noticed(three):
    shared(three, "same")
    with pytest.raises(LearnerError, match=r"different weights.*ranks = 1"):
        shared(three, "tell apart")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_ranks_listen_on_the_loopback_interface_only(three):
    first, *others = shared(three, "listen")  # type: ignore[misc]
    assert others == [{"0100007F"}] * 2
    assert "00000000" not in first
    assert "0" * 32 not in first


def test_an_unexpected_error_ends_the_rank_and_the_block(tmp_path):
    lost: list[bool] = []
    with (
        pytest.raises(LostRankError, match="rank 1 of the learner: it went wrong"),
        started(2, act_until_the_end, lambda: lost.append(True), tmp_path / "file") as ranks,
    ):
        shared(ranks, "bug")
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_a_learner_of_one_process_starts_no_other_and_exchanges_nothing(tmp_path):
    with started(1, act_until_the_end, lambda: None, tmp_path / "file") as ranks:
        assert not dist.is_available() or not dist.is_initialized()
        assert ranks.all(lambda: [1, 2]) == [1, 2]
        samples = [sample("a"), sample("b")]
        assert ranks.mine(samples) is samples
    assert list(tmp_path.iterdir()) == []


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = torch.device("cuda", 0)
    check_devices(replace(CONFIG, ranks=2), gpu)
    check_devices(replace(CONFIG, ranks=3), torch.device("cpu"))
    with pytest.raises(StartError, match=r"ranks = 3.*sees 2: set ranks to at most 2"):
        check_devices(replace(CONFIG, ranks=3), gpu)


# -- updates ---------------------------------------------------------------------------------------


class Pair:
    """A trainer of two ranks and one without others, from the same state."""

    def __init__(self, folder: Path, ranks: Ranks, model_path: str) -> None:
        schedule = stage._schedule(TRAINED, threading.Event(), None)
        self.two = stage._trainer(TRAINED, model_path, folder, "float32", schedule, ranks)
        self.one = build_trainer(TRAINED, model_path, folder)
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
