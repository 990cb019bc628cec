"""Samples as padded tensors, and turns that share a sequence, by hand and by any samples."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import SIGNALS
from learner.tensors import collate, micro_batches, pad_right, sequences_of, token_mean
from tests.learner.test_tiny_model import sample

TOKENS = st.lists(st.integers(1, 63), min_size=1, max_size=9)
SAMPLES = st.lists(
    st.builds(
        sample,
        prompt=TOKENS,
        reply=TOKENS,
        score=st.sampled_from((-1, 0, 1)),
        hinted=st.none() | TOKENS,
        version=st.integers(0, 2),
    ),
    min_size=1,
    max_size=6,
)


@given(st.lists(TOKENS, max_size=5))
def test_padding_is_undone_by_its_mask(rows):
    values, mask = pad_right(rows, 0)
    assert values.shape == mask.shape == (len(rows), max(map(len, rows), default=0))
    assert [v[m.bool()].tolist() for v, m in zip(values, mask, strict=True)] == rows
    assert (mask.diff(dim=1) <= 0).all()


def collated(samples, method="combined", pass_tokens=1000):
    sequences = sequences_of(samples)
    lags = {0: 1, 1: 0, 2: 3}
    turns = [turn for sequence in sequences for turn in sequence]
    return turns, collate(sequences, lags=lags, signals=SIGNALS[method], pass_tokens=pass_tokens)


@given(SAMPLES, st.integers(1, 60))
def test_a_batch_holds_every_token_once_and_in_its_place(samples, pass_tokens):
    turns, batch = collated(samples, pass_tokens=pass_tokens)
    assert sorted(map(id, turns)) == sorted(map(id, samples))
    policy = batch.sequences
    for row, s in enumerate(turns):
        reply = batch.completion_mask[row].bool()
        places = policy.places[row][reply]
        assert policy.completion_ids[row][reply].tolist() == list(s.completion_ids)
        assert policy.ids.flatten()[places].tolist() == list(s.completion_ids)
        start = places[0] - len(s.prompt_ids)
        assert policy.ids.flatten()[start : places[0]].tolist() == list(s.prompt_ids)
        assert start % policy.ids.size(1) == 0
        assert batch.behaviour_logprobs[row][reply].tolist() == pytest.approx(s.behaviour_logprobs)
        assert batch.behaviour_logprobs[row][~reply].abs().sum() == 0
        assert batch.lags[row] == {0: 1, 1: 0, 2: 3}[s.policy_version]
    taught = {}
    for teacher in batch.hinted:
        assert len(teacher.turns) == 1 or teacher.sequences.ids.numel() <= pass_tokens
        for row, turn in enumerate(teacher.turns.tolist()):
            ids = teacher.sequences.ids[row][teacher.sequences.mask[row].bool()].tolist()
            cut = len(ids) - len(turns[turn].completion_ids)
            assert ids[cut:] == list(turns[turn].completion_ids)
            taught[turn] = tuple(ids[:cut])
    hints = {row: s.hinted_prompt_ids for row, s in enumerate(turns) if s.score <= 0}
    assert taught == {row: ids for row, ids in hints.items() if ids is not None}
    assert batch.has_teacher.tolist() == [row in taught for row in range(len(turns))]


@given(SAMPLES)
def test_what_a_forward_pass_predicts_comes_back_turn_by_turn(samples):
    turns, batch = collated(samples)
    policy = batch.sequences
    tokens = policy.completion_ids[policy.completion_mask.bool()]
    found = policy.by_turn(tokens.float())  # as if each token were its own log-prob
    assert found.tolist() == policy.completion_ids.tolist()
    states = policy.ids[:, :, None].float()
    every = torch.arange(len(turns))
    before = [(*s.prompt_ids, *s.completion_ids)[len(s.prompt_ids) - 1 : -1] for s in turns]
    flat = [float(token) for ids in before for token in ids]
    assert policy.predicting(states, every)[:, 0].tolist() == flat


def said(prompt, reply, session="s"):
    return replace(sample(prompt=prompt, reply=reply), session=session)


def test_turns_that_extend_each_other_are_one_sequence():
    first = said((1, 2), (3, 4))
    second = said((1, 2, 3, 4, 5), (6,))  # 5 is what the tool answered
    third = said((1, 2, 3, 4, 5, 6), (7, 8))
    assert sequences_of([third, first, second]) == [[first, second, third]]
    fork = said((1, 2, 3, 4, 9), (6,))
    assert sequences_of([first, second, fork]) == [[first, second], [fork]]
    rewritten = said((1, 2, 3, 9, 5), (6,))
    cut = said((1, 2, 3), (6,))
    elsewhere = said((1, 2, 3, 4, 5), (6,), "another")
    for other in (rewritten, cut, elsewhere):
        assert sorted(map(len, sequences_of([first, other]))) == [1, 1]


@st.composite
def conversations(draw):
    """Turns of two sessions that grow token by token, with forks, rewrites and repeats."""
    samples = []
    for session in draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=3)):
        history = tuple(draw(TOKENS))
        for _ in range(draw(st.integers(1, 4))):
            reply = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
            samples.append(said(history, reply, session))
            if draw(st.booleans()):
                history = (*history, *reply, *draw(st.lists(st.integers(1, 3), max_size=2)))
    return draw(st.permutations(samples))


@given(conversations())
def test_a_sequence_holds_each_of_its_turns_where_the_turn_was_said(samples):
    found = sequences_of(samples)
    assert sorted(id(s) for turns in found for s in turns) == sorted(map(id, samples))
    for turns in found:
        last = (*turns[-1].prompt_ids, *turns[-1].completion_ids)
        end = 0
        for turn in turns:
            whole = (*turn.prompt_ids, *turn.completion_ids)
            assert last[: len(whole)] == whole
            assert len(turn.prompt_ids) >= end, "no token is trained in two turns of one sequence"
            end = len(whole)
        assert len({turn.session for turn in turns}) == 1


@given(SAMPLES, st.integers(1, 60))
def test_passes_share_out_all_samples_within_their_budget(samples, pass_tokens):
    groups = micro_batches(samples, pass_tokens)
    found = [s for group in groups for turns in group for s in turns]
    assert sorted(map(id, found)) == sorted(map(id, samples))
    for group in groups:
        longest = max(len(turns[-1].prompt_ids) + len(turns[-1].completion_ids) for turns in group)
        assert len(group) == 1 or len(group) * longest <= pass_tokens


def test_a_long_turn_is_alone_in_its_pass():
    short, long = sample(prompt=(5, 6), reply=(7,)), sample(prompt=(5,) * 50, reply=(7,))
    assert micro_batches([short, long, short], 20) == [[[short], [short]], [[long]]]


def test_a_method_without_distillation_has_no_teacher_pass():
    _, batch = collated([sample(hinted=(3, 4))], "binary")
    assert batch.hinted == ()
    assert batch.has_teacher.tolist() == [False]


@pytest.mark.parametrize(("method", "taught"), [("combined", [0, 1]), ("opd", [0, 1, 2])])
def test_a_hint_on_a_praised_turn_counts_only_where_no_score_does(method, taught):
    samples = [sample(str(n), score=n - 1, hinted=(3, 4)) for n in range(3)]
    _, batch = collated(samples, method)
    assert [row for group in batch.hinted for row in group.turns.tolist()] == taught


def test_the_mean_is_over_each_turns_tokens_and_then_over_turns():
    values, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    assert token_mean(values, mask).item() == pytest.approx(((1 + 2) / 2 + 6) / 2)
