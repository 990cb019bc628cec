"""Which samples may train, and when an update is due."""

import pytest

from learner.selection import is_due, policy_lag, unfit


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
