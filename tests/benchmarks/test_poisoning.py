"""The simulation of attackers: the people's policy learns, and each defence is seen to matter."""

from __future__ import annotations

import pytest

from benchmarks import poisoning
from benchmarks.poisoning import ALL, ATTACKS, NONE, run


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poisoning, "UPDATES", 10)


def test_people_teach_the_policy() -> None:
    score, theirs = run("nobody", ALL, 0)
    assert score > 0.8
    assert theirs == 0.0


@pytest.mark.parametrize("attack", ["sessions", "feedback", "quotes"])
def test_without_a_defence_an_attack_moves_more(attack: str) -> None:
    (open_, _), (defended, share) = run(attack, NONE, 0), run(attack, ALL, 0)
    assert defended > open_ + 0.1
    assert share <= 0.26
    assert attack in ATTACKS
