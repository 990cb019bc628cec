"""From a score and a teacher to one advantage a token, on numbers worked by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import SIGNALS, teacher_gap, token_advantages


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
    st.lists(st.tuples(ANY, ANY, st.floats(-3, 3, width=32)), min_size=1),
    st.floats(0.125, 8, width=32),
    st.sampled_from(sorted(SIGNALS)),
)
def test_no_token_counts_more_than_the_weights_allow(tokens, limit, method):
    teacher, behaviour, scores = torch.tensor(tokens).unbind(1)
    signals, mask = SIGNALS[method], torch.ones(len(tokens), 1)
    bound = signals.rl * scores.abs() + signals.opd * limit
    gap = teacher_gap(teacher, behaviour.clamp(-1e30, 1e30), limit)
    found = token_advantages(scores, gap[:, None], mask, signals, limit)
    assert (found.abs().squeeze(1) <= bound).all()
    unclipped = token_advantages(scores, teacher[:, None], mask, signals, limit)
    assert (unclipped.abs().squeeze(1) <= bound).all()
