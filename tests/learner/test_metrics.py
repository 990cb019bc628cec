"""The numbers about the tokens of one update, worked by hand."""

import math

import pytest
import torch

from learner.kl import largest_move
from learner.metrics import TokenStats, drift, join, token_metrics


def test_drift_looks_at_the_current_version_only():
    tokens = TokenStats(
        policy=torch.tensor([-1.0, -2.0, -3.0]),
        raw=torch.tensor([-1.0, -2.0, -3.0]),
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
    # The policy draws the third token e^6 times as often as the behaviour did; truncated at 4.
    assert metrics["kl/base"] == pytest.approx(4 * (2 - math.log(2) - 1) / 3, abs=1e-6)
    assert metrics["kl/teacher"] == pytest.approx(0.5)


def test_what_was_not_measured_has_no_number():
    one, nothing = torch.tensor([-1.0]), torch.zeros(0)
    metrics = token_metrics(
        TokenStats(one, one, one, one, torch.tensor([1]), nothing, reference=None, divergence=None),
        step_kl=0.01,
    )
    assert set(metrics) == {"ratio/mean", "ratio/max", "advantage/mean", "drift/unexplained"}
