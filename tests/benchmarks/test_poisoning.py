"""The simulation of attackers: the people's policy learns, and each defence is seen to matter."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks import poisoning
from benchmarks.poisoning import ALL, ATTACKS, NONE, run

MOST_MOVED = 0.03
"""Of the others' score: the goal."""
FEWEST_MOVED = 0.2
"""Without a defence; else the attack would prove nothing of it."""


@cache
def unattacked() -> float:
    """The score after as many updates with nobody who attacks."""
    score, theirs = run("nobody", ALL, 0)
    assert theirs == 0.0
    return score


def test_people_teach_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poisoning, "UPDATES", 10)
    score, _ = run("nobody", ALL, 0)
    assert score > 0.8


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_moves_three_points_at_most_and_many_without_a_defence(attack: str) -> None:
    (open_, _), (defended, share) = run(attack, NONE, 0), run(attack, ALL, 0)
    assert unattacked() - open_ > FEWEST_MOVED
    assert unattacked() - defended <= MOST_MOVED
    assert share <= 0.26
