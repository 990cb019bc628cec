"""How far one policy is from another, and how far single tokens can have moved."""

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
