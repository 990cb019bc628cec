"""How far one policy is from another, and how far single tokens can have moved."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.kl import kl_divergence, largest_move


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


def test_what_another_policy_drew_counts_as_often_as_the_old_one_would_draw_it():
    """Of two tokens the behaviour drew each half of the time, the old policy 3 to 1."""
    old, new = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    found = kl_divergence(old, new, torch.tensor([0.5, 0.5]).log())
    # KL(old || new) = 0.75 ln 1.5 + 0.25 ln 0.5; the estimates add E_old[new / old] - 1 = 0.
    assert found == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
