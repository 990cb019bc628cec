"""What ranks tell each other: how samples are dealt, what is summed, and errors of one rank."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.model import check_devices
from learner.rank_processes import started
from learner.ranks import Ranks, deal
from learner.tensors import sequence_length, sequences_of
from nextstate.errors import LearnerError, StartError
from nextstate.records import Sample
from tests.learner.acting_ranks import act_until_the_end, shared
from tests.learner.test_tiny_model import CONFIG, sample

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


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with started(
        3, act_until_the_end, lambda: None, tmp_path_factory.mktemp("three") / "f"
    ) as ranks:
        yield ranks


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


@pytest.mark.parametrize(
    ("work", "count", "kind"), [("passes", 3, False), ("passes with a gradient", 2, True)]
)
def test_a_rank_without_a_pass_left_lends_its_share_until_none_has_any(three, work, count, kind):
    done = shared(three, work)
    for rank in range(3):
        own = rank + 1 if work == "passes" else 2 - rank
        expected = [f"{rank} reads {kind}"] * own + [f"{rank} lends {kind}"] * (count - own)
        assert [entry for entry in done if entry[0] == str(rank)] == expected  # type: ignore[attr-defined]


def test_a_rank_that_fails_between_passes_ends_the_wait_of_the_others(three):
    with pytest.raises(LearnerError, match=r"^rank 1 of the learner: it went wrong$"):
        shared(three, "a pass that fails")
    assert shared(three, "sum"), "the ranks go on"


def test_in_a_pass_of_rank_0_alone_the_others_lend_their_shares(three):
    assert shared(three, "a pass of rank 0") == ["0 reads False", "1 lends False", "2 lends False"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_ranks_listen_on_the_loopback_interface_only(three):
    first, *others = shared(three, "listen")  # type: ignore[misc]
    assert others == [{"0100007F"}] * 2
    assert "00000000" not in first
    assert "0" * 32 not in first


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = torch.device("cuda", 0)
    check_devices(replace(CONFIG, ranks=2), gpu)
    check_devices(replace(CONFIG, ranks=3), torch.device("cpu"))
    with pytest.raises(StartError, match=r"ranks = 3.*sees 2: set ranks to at most 2"):
        check_devices(replace(CONFIG, ranks=3), gpu)
