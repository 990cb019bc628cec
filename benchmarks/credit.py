"""In how many updates each way of crediting steps learns a task, with good and bad judges.

A policy without a model: for each of 6 steps a table of 5 logits, one action of which is right. An
episode succeeds (+1) only if all its steps are right, else it fails (−1). An update has 8 groups of
8 episodes, and a judge votes +1 or −1 on each step. The advantages of an update are scaled to a
root mean square of 1 over all its steps, so that all methods take equally large steps, as the
learner does by its bound on the KL divergence. The advantages are those of `judge/advantages.py`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from judge.advantages import (
    PREDICTS,
    WINDOW,
    CreditMethod,
    EpisodeScores,
    JudgedEpisode,
    StepScore,
    group_credit,
    judge_auc,
    process_weight,
)

ACTIONS = 5
GROUPS, SIZE = 8, 8
UPDATES = 150
GOAL = 0.9
"""The probability that an episode succeeds."""
RATE = 0.45
"""What one update adds to a logit, for each unit of advantage · (taken − probability), on average
over the episodes."""
_RIGHT, _LIKED = 0, 1
"""The right action of each step, and the wrong one that a judge may like."""


@dataclass(frozen=True, slots=True)
class World:
    """A task and its judge."""

    judge: float
    """The probability that a vote is right."""
    liked: float | None = None
    """The probability that the judge praises one wrong action of each step; None: as any other."""
    start: float = 0.4
    """The probability of the right action before the first update."""
    steps: int = 6


@dataclass(frozen=True, slots=True)
class Method:
    """A column of the table."""

    credit: CreditMethod
    switch: Literal["", "episodes", "steps"] = ""
    """Of what the AUC is taken below which λ falls to 0; "": λ stays 1."""


@dataclass(frozen=True, slots=True)
class Learned:
    """The end of one run."""

    updates: int | None
    """Until GOAL; None: not within UPDATES."""
    success: float
    """The probability that an episode succeeds in the end."""
    silenced: int
    """Updates in which λ was 0."""


METHODS = {
    "outcome only": Method("outcome"),
    "original's sum": Method("step_sum"),
    "ours": Method("combined", switch="episodes"),
    "ours, λ stays 1": Method("combined"),
    "ours, AUC of steps": Method("combined", switch="steps"),
}
WORLDS = {
    "right 95 %": World(0.95),
    "right 75 %": World(0.75),
    "right 60 %": World(0.6),
    "right 50 %: a coin": World(0.5),
    "likes a wrong action (90 %)": World(0.9, liked=0.9, start=0.22),
    "right 85 %, start 0.22 a step": World(0.85, start=0.22),
    "right 85 %, 12 steps": World(0.85, steps=12),
    "right 60 %, start 0.75 a step": World(0.6, start=0.75),
}


def learn(world: World, method: Method, seed: int) -> Learned:
    """Updates until the goal; runs with the same seed and world begin alike."""
    random = np.random.default_rng(seed)
    logits = np.zeros((world.steps, ACTIONS))
    logits[:, _RIGHT] = np.log(world.start * (ACTIONS - 1) / (1 - world.start))
    judged: list[JudgedEpisode] = []
    names = map(str, count())
    silenced = 0
    for update in count():
        policy = np.exp(logits - logits.max(1, keepdims=True))
        policy /= policy.sum(1, keepdims=True)
        success = float(policy[:, _RIGHT].prod())
        if success >= GOAL or update == UPDATES:
            return Learned(update if success >= GOAL else None, success, silenced)
        weight = _weight(method, judged)
        silenced += weight == 0.0
        gradient = np.zeros_like(logits)
        squares = 0.0
        for _ in range(GROUPS):
            actions = _actions(random, policy)
            episodes = _episodes(random, world, actions, names)
            found = group_credit(episodes, method.credit, weight=weight).advantages
            advantages = np.array([[found.get(s.turn, 0.0) for s in e.steps] for e in episodes])
            squares += float((advantages**2).sum())
            for action in range(ACTIONS):
                gradient[:, action] += (advantages * (actions == action)).sum(0)
            gradient -= advantages.sum(0)[:, None] * policy
            judged = [*judged, *_judged(next(names), episodes, method)][-WINDOW:]
        if squares:
            size = np.sqrt(squares / (GROUPS * SIZE * world.steps))
            logits += RATE * gradient / (GROUPS * SIZE * size)
    raise AssertionError


def _actions(random: np.random.Generator, policy: np.ndarray) -> np.ndarray:
    """Actions (SIZE, steps) drawn from the policy (steps, ACTIONS)."""
    drawn = random.random((SIZE, len(policy), 1)) > policy.cumsum(1)
    return np.minimum(drawn.sum(2), ACTIONS - 1)


def _episodes(
    random: np.random.Generator, world: World, actions: np.ndarray, names: Iterator[str]
) -> list[EpisodeScores]:
    right = actions == _RIGHT
    praise = np.where(right, world.judge, 1 - world.judge)
    if world.liked is not None:
        praise[actions == _LIKED] = world.liked
    votes = np.where(random.random(actions.shape) < praise, 1.0, -1.0)
    return [
        EpisodeScores(
            next(names),
            1.0 if right[row].all() else -1.0,
            tuple(StepScore(next(names), vote) for vote in votes[row].tolist()),
        )
        for row in range(SIZE)
    ]


def _weight(method: Method, judged: list[JudgedEpisode]) -> float:
    """λ by the switch of the method: over the last WINDOW episodes, or as many steps."""
    if method.switch == "steps":
        auc = judge_auc(judged) if 2 * len(judged) >= WINDOW else None
        return 0.0 if auc is not None and auc < PREDICTS else 1.0
    return process_weight(judged) if method.switch else 1.0


def _judged(group: str, episodes: list[EpisodeScores], method: Method) -> list[JudgedEpisode]:
    """What the switch compares: the episodes of a group with two outcomes, or their steps."""
    if not method.switch or len({episode.outcome for episode in episodes}) == 1:
        return []
    scores = [(e.outcome or 0.0, [s.process or 0.0 for s in e.steps]) for e in episodes]
    if method.switch == "steps":
        return [JudgedEpisode(group, o, vote) for o, votes in scores for vote in votes]
    return [JudgedEpisode(group, o, sum(votes) / len(votes)) for o, votes in scores]


def _cell(runs: list[Learned]) -> str:
    """The median of the updates to the goal, or of the success at the end, and both extremes."""
    ordered = sorted(runs, key=lambda run: (run.updates or UPDATES + 1, -run.success))
    best, worst = (f"{r.updates or f'end {r.success:.2f}'}" for r in (ordered[0], ordered[-1]))
    middle = median(run.updates or math.inf for run in runs)
    end = f"end {median(run.success for run in runs):.2f}"
    return f"{end if middle == math.inf else f'{middle:.0f}'} ({best} to {worst})"


def _silenced(runs: list[Learned]) -> str:
    return f"{median(run.silenced for run in runs):.0f}"


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.credit", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell (default: 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="judges with this in the name")
    given = parser.parse_args()
    began = time.monotonic()
    table = Table(box=box.SIMPLE, title=f"updates to {GOAL:.0%} success, of at most {UPDATES}")
    for heading in ("judge", *METHODS, "λ 0: ours", "of steps"):
        table.add_column(heading, justify="left" if heading == "judge" else "right")
    for name, world in WORLDS.items():
        if given.only not in name:
            continue
        runs = {
            name: [learn(world, method, seed) for seed in range(given.seeds)]
            for name, method in METHODS.items()
        }
        silenced = [_silenced(runs[name]) for name, method in METHODS.items() if method.switch]
        table.add_row(name, *map(_cell, runs.values()), *silenced)
    Console(width=170).print(table)
    print(f"{given.seeds} seeds, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
