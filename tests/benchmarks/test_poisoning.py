"""The simulation of attackers: the people's policy learns, and each defence is seen to matter."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.poisoning import ALL, ATTACKS, NONE, run

MOST_MOVED = 0.03
"""Of the others' score: the goal."""
FEWEST_MOVED = 0.2
"""Without a defence; else the attack would prove nothing of it."""
UPDATES = {"sessions": 24, "feedback": 14, "web": 14, "quotes": 14, "reports": 22}
"""After so many, those who are defended have learnt what they learn: more would tell no more.

What delays them without keeping them from it, as a flood of sessions does, needs longer.
"""


@cache
def unattacked() -> list[float]:
    """The score after each update with nobody who attacks."""
    scores, theirs = run("nobody", ALL, 0, max(UPDATES.values()))
    assert theirs == 0.0
    return scores


def test_people_teach_the_policy() -> None:
    assert unattacked()[9] > 0.8


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_moves_three_points_at_most_and_many_without_a_defence(attack: str) -> None:
    updates = UPDATES[attack]
    (open_, _), (defended, share) = (run(attack, one, 0, updates) for one in (NONE, ALL))
    assert len(open_) == len(defended) == updates
    unharmed = unattacked()[updates - 1]
    assert unharmed - open_[-1] > FEWEST_MOVED
    assert unharmed - defended[-1] <= MOST_MOVED
    assert share <= 0.26
