"""The sequential test: hand-worked capital, false alarms over many looks, and power."""

import math
from functools import lru_cache
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.score_drop import clear_drop, log_capital_against_at_least, lower_bound, mean
from nextstate.records import ScoreCounts

LEVEL, DROP = 0.01, 0.2
COUNTS = st.builds(ScoreCounts, *[st.integers(0, 60)] * 3)


def test_capital_worked_by_hand(monkeypatch):
    # Against "at least 0" with half of the largest stake, 1: a verdict of +1 halves the capital,
    # one of -1 makes it 1.5 times as much, 0 leaves it.
    monkeypatch.setattr("learner.score_drop._STAKES", (0.5,))
    assert math.exp(log_capital_against_at_least(0.0, ScoreCounts(2, 5, 3))) == pytest.approx(
        0.5**2 * 1.5**3
    )
    # Against "at least 0.5" the largest stake is 2: factors 0.5, 1.5 and 2.5.
    assert math.exp(log_capital_against_at_least(0.5, ScoreCounts(1, 1, 1))) == pytest.approx(
        0.5 * 1.5 * 2.5
    )
    # Two stakes: the mean of what each has become.
    monkeypatch.setattr("learner.score_drop._STAKES", (0.5, 0.1))
    assert math.exp(log_capital_against_at_least(0.0, ScoreCounts(1, 0, 0))) == pytest.approx(
        (0.5 + 0.9) / 2
    )


def test_a_fair_bet_neither_wins_nor_loses_on_average():
    # A verdict of mean 0: +1, 0, -1 with 0.3, 0.4, 0.3. The expected capital after one is 1.
    expected = sum(
        p * math.exp(log_capital_against_at_least(0.0, counts))
        for p, counts in (
            (0.3, ScoreCounts(1, 0, 0)),
            (0.4, ScoreCounts(0, 1, 0)),
            (0.3, ScoreCounts(0, 0, 1)),
        )
    )
    assert expected == pytest.approx(1.0)


@given(COUNTS, st.floats(-0.99, 0.98))
def test_capital_grows_with_what_is_expected(counts, expected):
    less = log_capital_against_at_least(expected, counts)
    assert log_capital_against_at_least(expected + 0.01, counts) >= less - 1e-9


@given(COUNTS)
def test_the_lower_bound_is_below_the_mean(counts):
    if counts.total:
        assert -1 <= lower_bound(counts, 0.01) <= mean(counts) + 1e-6


def test_more_verdicts_bring_the_bound_closer():
    bounds = [lower_bound(ScoreCounts(8 * n, n, n), 0.01) for n in (1, 4, 16, 64)]
    assert bounds == sorted(bounds)
    assert mean(ScoreCounts(8, 1, 1)) - bounds[-1] < 0.15


def test_a_drop_needs_verdicts_on_both_sides():
    assert clear_drop(ScoreCounts(), [ScoreCounts(50, 0, 0)], level=LEVEL, drop=DROP) is None
    assert clear_drop(ScoreCounts(0, 0, 50), [], level=LEVEL, drop=DROP) is None
    assert clear_drop(ScoreCounts(0, 0, 50), [ScoreCounts()], level=LEVEL, drop=DROP) is None


def test_a_clear_drop_says_both_means():
    found = clear_drop(
        ScoreCounts(2, 4, 14),
        [ScoreCounts(30, 5, 5), ScoreCounts(20, 4, 0)],
        level=LEVEL,
        drop=DROP,
    )
    assert str(found) == (
        "its turns score -0.60 on average (20 verdicts), those of the versions before it 0.70 "
        "(64 verdicts)"
    )


@lru_cache
def bound(counts: ScoreCounts, level: float) -> float:
    return lower_bound(counts, level)


def looks(rng: Random, ours, before, count: int, first: int, level=LEVEL) -> int | None:
    """The number of verdicts at which a drop is found, when one looks after every one; else None.

    `before` has `first` verdicts to begin with, and a late one for each ten of ours.
    """
    draws = {"ours": ours, "before": before}
    seen = {"ours": ScoreCounts(), "before": ScoreCounts()}

    def add(side: str) -> None:
        score = rng.choices((0, 1, 2), draws[side])[0]
        seen[side] += ScoreCounts(*(int(score == at) for at in range(3)))

    for _ in range(first):
        add("before")
    for at in range(1, count + 1):
        add("ours")
        if at % 10 == 0:
            add("before")
        if clear_drop(seen["ours"], [seen["before"]], level=level, drop=DROP):
            return at
    return None


@pytest.fixture(autouse=True)
def remembered_bound(monkeypatch):
    """The reference hardly changes between looks: its bound need not be found again each time."""
    monkeypatch.setattr("learner.score_drop.lower_bound", bound)


GOOD, NO_WORSE_THAN_ALLOWED, WORSE = (0.8, 0.1, 0.1), (0.7, 0.1, 0.2), (0.2, 0.2, 0.6)


def test_false_alarms_stay_under_the_level_however_often_one_looks():
    # Means 0.7 and 0.5: exactly the drop that is allowed, so as near to a drop as none can be.
    runs, level = 120, 0.05
    alarms = [
        looks(Random(f"alarm/{run}"), NO_WORSE_THAN_ALLOWED, GOOD, 100, first=40, level=level)
        for run in range(runs)
    ]
    assert sum(at is not None for at in alarms) <= level * runs


def test_a_clear_drop_is_found_soon():
    found = [looks(Random(f"power/{run}"), WORSE, GOOD, count=80, first=64) for run in range(40)]
    assert sum(at is not None for at in found) >= 38
    assert sorted(at or 80 for at in found)[20] <= 40
