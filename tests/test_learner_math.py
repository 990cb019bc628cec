"""Advantages, batches, lags and metrics: the learner's pure parts, on numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import WEIGHTS, teacher_gap, token_advantages
from learner.batch import collate, micro_batches, pad_left, pad_right, token_count
from learner.config import LearnerConfig
from learner.metrics import TokenStats, drift, join, token_metrics
from learner.selection import policy_lag, unfit
from nextstate.errors import ConfigError
from tests.test_learner_tiny import sample

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
        ("combined", [[1.0, 1.0, 1.0], [-0.5, -2.0, 0.0], [1.0, 0.25, 0.0]]),
    ],
)
def test_advantage_is_the_weighted_sum_of_score_and_clipped_gap(method, expected):
    teacher = torch.tensor([[-1.0, -9.0, 0.0], [-0.5, -1.0, 0.0]])
    behaviour = torch.tensor([[-1.5, -2.0, 0.0], [-4.0, -1.25, 0.0]])
    gap = teacher_gap(teacher, behaviour, 1.0)
    assert gap.tolist() == [[0.5, -1.0, 0.0], [1.0, 0.25, 0.0]]
    scores = torch.tensor([1.0, -1.0, 0.0])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
    found = token_advantages(scores, gap, torch.tensor([1, 2]), mask, WEIGHTS[method])
    assert found.tolist() == expected


def test_without_any_hint_the_advantage_is_the_score():
    mask = torch.ones(2, 3)
    none = torch.zeros(0, dtype=torch.long)
    found = token_advantages(
        torch.tensor([1.0, -1.0]), torch.zeros(0, 3), none, mask, WEIGHTS["combined"]
    )
    assert found.tolist() == [[1.0] * 3, [-1.0] * 3]


@given(st.lists(TOKENS, max_size=5))
def test_padding_is_undone_by_its_mask(rows):
    for pad in (pad_left, pad_right):
        values, mask = pad(rows, 0)
        assert values.shape == mask.shape == (len(rows), max(map(len, rows), default=0))
        assert [v[m.bool()].tolist() for v, m in zip(values, mask, strict=True)] == rows
    left, right = pad_left(rows, 0)[1], pad_right(rows, 0)[1]
    assert (left.diff(dim=1) >= 0).all()
    assert (right.diff(dim=1) <= 0).all()


@given(SAMPLES)
def test_a_batch_holds_every_token_once_and_in_its_place(samples):
    batch = collate(samples, current=1, weights=WEIGHTS["combined"])
    for row, s in enumerate(samples):
        reply = batch.completion_mask[row].bool()
        assert batch.prompt_ids[row][batch.prompt_mask[row].bool()].tolist() == list(s.prompt_ids)
        assert batch.completion_ids[row][reply].tolist() == list(s.completion_ids)
        assert batch.behaviour_logprobs[row][reply].tolist() == pytest.approx(s.behaviour_logprobs)
        assert batch.behaviour_logprobs[row][~reply].abs().sum() == 0
        assert batch.current[row] == (s.policy_version == 1)
    hinted = [row for row, s in enumerate(samples) if s.hinted_prompt_ids is not None]
    assert batch.hinted_rows.tolist() == hinted
    for ids, mask, row in zip(
        batch.hinted_prompt_ids, batch.hinted_prompt_mask, hinted, strict=True
    ):
        assert tuple(ids[mask.bool()].tolist()) == samples[row].hinted_prompt_ids


@given(SAMPLES, st.integers(1, 7))
def test_micro_batches_share_out_all_samples(samples, size):
    groups = micro_batches(samples, size)
    assert sorted(id(s) for group in groups for s in group) == sorted(map(id, samples))
    assert all(len(group) == size for group in groups[:-1])
    lengths = [token_count(s) for group in groups for s in group]
    assert lengths == sorted(lengths)


def test_a_method_without_distillation_has_no_teacher_prompts():
    batch = collate([sample(hinted=(3, 4))], current=0, weights=WEIGHTS["binary"])
    assert batch.hinted_rows.tolist() == []
    assert batch.hinted_prompt_ids.shape == (0, 0)


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


def test_drift_looks_at_the_current_version_only():
    tokens = TokenStats(
        policy=torch.tensor([-1.0, -2.0, -3.0]),
        behaviour=torch.tensor([-1.5, -1.9, -9.0]),
        advantage=torch.tensor([1.0, 1.0, -1.0]),
        current=torch.tensor([True, True, False]),
        gap=torch.tensor([0.5, -0.1]),
        reference=torch.tensor([-1.0, -2.0, -3.0 + math.log(2)]),
    )
    assert drift(tokens) == pytest.approx(0.3)
    metrics = token_metrics(join([tokens, tokens]))
    assert metrics["drift/mean"] == pytest.approx(0.3)
    assert metrics["ratio/max"] == pytest.approx(math.exp(6), rel=1e-5)
    assert metrics["advantage/mean"] == pytest.approx(1 / 3)
    assert metrics["teacher_gap/mean"] == pytest.approx(0.2)
    assert metrics["kl/base"] == pytest.approx((2 - math.log(2) - 1) / 3, abs=1e-6)


def test_what_was_not_measured_has_no_number():
    one = torch.tensor([-1.0])
    metrics = token_metrics(
        TokenStats(one, one, one, torch.tensor([False]), torch.zeros(0), reference=None)
    )
    assert set(metrics) == {"ratio/mean", "ratio/max", "advantage/mean"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"adam_beta2": 1.0},
        {"kl_coef": -0.1},
        {"ratio_cap": 1.28},
        {"lora_targets": ()},
        {"device": "tpu"},
    ],
)
def test_an_impossible_setting_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"\[learner\] {next(iter(wrong))} = "):
        LearnerConfig(**wrong)
