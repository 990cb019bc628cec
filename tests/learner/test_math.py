"""Advantages, batches, lags and metrics: the learner's pure parts, on numbers worked by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import SIGNALS, teacher_gap, token_advantages
from learner.batch import collate, micro_batches, pad_right, sequences_of, token_mean
from learner.kl import kl_divergence, largest_move
from learner.metrics import TokenStats, drift, join, token_metrics
from learner.selection import is_due, policy_lag, unfit
from nextstate.app.settings import Settings
from nextstate.errors import ConfigError
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


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("binary", [[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]),
        ("opd", [[0.0, 0.0, 0.0], [0.5, -1.0, 0.0], [1.0, 0.25, 0.0]]),
        ("combined_sampled", [[1.0, 1.0, 1.0], [-0.5, -2.0, 0.0], [1.0, 0.25, 0.0]]),
        ("combined", [[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]),
        ("opd_topk", [[0.0] * 3] * 3),  # its signal is a term of the loss
    ],
)
def test_advantage_is_the_weighted_sum_of_score_and_clipped_gap(method, expected):
    teacher = torch.tensor([[-1.0, -9.0, 0.0], [-0.5, -1.0, 0.0]])
    behaviour = torch.tensor([[-1.5, -2.0, 0.0], [-4.0, -1.25, 0.0]])
    gap = torch.zeros(3, 3)
    gap[1:] = teacher_gap(teacher, behaviour, 1.0)
    assert gap.tolist() == [[0.0] * 3, [0.5, -1.0, 0.0], [1.0, 0.25, 0.0]]
    scores = torch.tensor([1.0, -1.0, 0.0])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
    found = token_advantages(scores, gap, mask, SIGNALS[method], 1.0)
    assert found.tolist() == expected


ANY = st.floats(allow_nan=False, width=32)
"""Infinite ones too."""


@given(
    st.lists(st.tuples(ANY, ANY, st.sampled_from((-1.0, 0.0, 1.0))), min_size=1),
    st.floats(0.125, 8, width=32),
    st.sampled_from(sorted(SIGNALS)),
)
def test_no_token_counts_more_than_the_weights_allow(tokens, limit, method):
    teacher, behaviour, scores = torch.tensor(tokens).unbind(1)
    signals, mask = SIGNALS[method], torch.ones(len(tokens), 1)
    bound = signals.rl + signals.opd * limit
    gap = teacher_gap(teacher, behaviour.clamp(-1e30, 1e30), limit)
    found = token_advantages(scores, gap[:, None], mask, signals, limit)
    assert found.abs().max() <= bound
    unclipped = token_advantages(1e30 * scores, teacher[:, None], mask, signals, limit)
    assert unclipped.abs().max() <= bound


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
    assert (policy.labels != -100).sum() == sum(len(s.completion_ids) for s in samples)
    taught = {}
    for teacher in batch.hinted:
        assert len(teacher.turns) == 1 or teacher.sequences.ids.numel() <= pass_tokens
        for row, turn in enumerate(teacher.turns.tolist()):
            ids = teacher.sequences.ids[row][teacher.sequences.mask[row].bool()].tolist()
            cut = len(ids) - len(turns[turn].completion_ids)
            assert ids[cut:] == list(turns[turn].completion_ids)
            taught[turn] = tuple(ids[:cut])
    hints = {row: s.hinted_prompt_ids for row, s in enumerate(turns)}
    assert taught == {row: ids for row, ids in hints.items() if ids is not None}
    assert batch.has_teacher.tolist() == [s.hinted_prompt_ids is not None for s in turns]


@given(SAMPLES)
def test_what_a_forward_pass_predicts_comes_back_turn_by_turn(samples):
    turns, batch = collated(samples)
    policy = batch.sequences
    found = policy.by_turn(policy.ids[:, 1:].float())  # as if each token were its own log-prob
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


def test_the_mean_is_over_each_turns_tokens_and_then_over_turns():
    values, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    assert token_mean(values, mask).item() == pytest.approx(((1 + 2) / 2 + 6) / 2)


def test_lag_counts_updates_along_the_chain_and_over_forks():
    parents = {1: 0, 2: 1, 3: 2, 4: 1, 5: 4}
    assert [policy_lag(parents, 5, version) for version in (5, 4, 1, 0)] == [0, 1, 2, 3]
    assert policy_lag(parents, 5, 3) == 4  # 5 → 4 → 1 ← 2 ← 3: the fork that was rolled back
    assert policy_lag({}, 0, 0) == 0


@pytest.mark.parametrize(
    ("tokens", "lag", "reason"),
    [
        (100, 8, None),
        (100, 9, "lag 9 over the limit of 8"),
        (101, 0, "101 tokens over the limit of 100"),
    ],
)
def test_unfit_samples_come_with_the_reason(tokens, lag, reason):
    assert unfit(tokens, lag, max_lag=8, max_tokens=100) == reason


@pytest.mark.parametrize(
    ("ready", "waited_s", "max_wait_s", "due"),
    [
        (16, 0.0, 0.0, True),
        (16, 0.0, 60.0, True),
        (15, 1e9, 0.0, False),  # 0: only a full batch
        (15, 59.9, 60.0, False),
        (15, 60.0, 60.0, True),
        (4, 60.0, 60.0, True),
        (3, 1e9, 60.0, False),
    ],
)
def test_an_update_starts_full_or_with_enough_that_have_waited(ready, waited_s, max_wait_s, due):
    settings = {"batch_size": 16, "min_batch": 4, "max_wait_s": max_wait_s}
    assert is_due(ready, waited_s, **settings) is due


def test_drift_looks_at_the_current_version_only():
    tokens = TokenStats(
        policy=torch.tensor([-1.0, -2.0, -3.0]),
        behaviour=torch.tensor([-1.5, -1.9, -9.0]),
        advantage=torch.tensor([1.0, 1.0, -1.0]),
        lag=torch.tensor([0, 0, 2]),
        gap=torch.tensor([0.5, -0.1]),
        reference=torch.tensor([-1.0, -2.0, -3.0 + math.log(2)]),
        divergence=torch.tensor([0.25, 0.75]),
    )
    assert drift(tokens) == pytest.approx(0.3)
    metrics = token_metrics(join([tokens, tokens]), step_kl=0.01)
    assert metrics["drift/mean"] == pytest.approx(0.3)
    explained = 2 / 3 * largest_move(0.01)  # a mean lag of 2/3
    assert metrics["drift/unexplained"] == pytest.approx(2.2 - explained, abs=1e-6)
    assert metrics["ratio/max"] == pytest.approx(math.exp(6), rel=1e-5)
    assert metrics["advantage/mean"] == pytest.approx(1 / 3)
    assert metrics["teacher_gap/mean"] == pytest.approx(0.2)
    assert metrics["kl/base"] == pytest.approx((2 - math.log(2) - 1) / 3, abs=1e-6)
    assert metrics["kl/teacher"] == pytest.approx(0.5)


def test_what_was_not_measured_has_no_number():
    one, nothing = torch.tensor([-1.0]), torch.zeros(0)
    metrics = token_metrics(
        TokenStats(one, one, one, torch.tensor([1]), nothing, reference=None, divergence=None),
        step_kl=0.01,
    )
    assert set(metrics) == {"ratio/mean", "ratio/max", "advantage/mean", "drift/unexplained"}


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=20))
def test_no_step_moves_the_tokens_further_than_its_divergence_tells(moves):
    old, new = torch.zeros(len(moves), dtype=torch.float64), torch.tensor(moves).double()
    kl = kl_divergence(old, new)
    assert new.abs().mean() <= largest_move(max(kl, 1e-12)) + 1e-5


@pytest.mark.parametrize("kl", [1e-9, 1e-4, 0.01, 1.0, 30.0])
def test_the_largest_move_is_reached_where_every_token_falls_alike(kl):
    x = largest_move(kl)
    fallen = kl_divergence(torch.zeros(4).double(), torch.full((4,), -x).double())
    assert fallen == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"kl_coef": -0.1},
        {"lora_targets": ()},
        {"topk": 0},
        {"micro_batch_tokens": 0},
        {"max_wait_s": -1.0},
        {"idle_patience_s": -1},
        {"step_kl_floor": 0.0},
        {"min_batch": 17},
        {"adam_beta1": 1.0},
        {"lora_targets": ("all-linear", "q_proj")},
        {"holdout": 1.0},
        {"holdout": -0.1},
        {"gate_weight_change": 0.0},
        {"gate_kl_parent": 0.0},
        {"gate_kl_base": -1.0},
        {"gate_drop": -0.1},
        {"gate_canaries": -1},
        {"watch_level": 1.0},
        {"watch_drop": -0.1},
        {"device": "tpu"},
        {"device": "cuda:1"},
    ],
)
def test_an_impossible_setting_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"\[learner\] {next(iter(wrong))} = "):
        Settings.read(overrides={"learner": wrong})
