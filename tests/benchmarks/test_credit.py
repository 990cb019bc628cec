"""The simulation of credit: its policy learns, and what its table shows in the clearest cases."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.credit import METHODS, UPDATES, WORLDS, Learned, learn

OURS, ORIGINAL, OUTCOME = METHODS["ours"], METHODS["original's sum"], METHODS["outcome only"]


def updates(learned: Learned) -> int:
    return learned.updates if learned.updates is not None else UPDATES + 1


def test_with_a_good_judge_ours_needs_the_fewest_updates() -> None:
    ours, original, outcome = (learn(WORLDS["right 95 %"], m, 0) for m in (OURS, ORIGINAL, OUTCOME))
    assert updates(ours) < updates(original) < updates(outcome)


def test_a_judge_that_votes_against_what_is_right_is_not_heard() -> None:
    liar = replace(WORLDS["right 95 %"], judge=0.1, start=0.75)
    switched, heard = learn(liar, OURS, 0), learn(liar, METHODS["ours, λ stays 1"], 0)
    assert switched.silenced > 0
    assert updates(switched) < updates(heard)


def test_the_same_seed_repeats_a_run() -> None:
    world = WORLDS["right 60 %, start 0.75 a step"]
    assert learn(world, OURS, 3) == learn(world, OURS, 3)
