"""The held-out score: a reply counts only if it satisfies the persona and is still right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from demo.talk import Answer


@dataclass(frozen=True, slots=True)
class Goals:
    """What the last version must reach; shares in [0, 1]."""

    score: float
    right: float


GOALS = Goals(score=0.80, right=0.98)
"""Of the seed policy."""


@dataclass(frozen=True, slots=True)
class Score:
    """One version's result on held-out questions; the shares are in [0, 1]."""

    version: int
    questions: int
    score: float
    """Satisfied and right."""
    satisfied: float
    right: float

    @property
    def margin(self) -> float:
        """Half the width of the 95 % Wilson interval of `score`."""
        n, p, z = self.questions, self.score, 1.96
        return z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)


def score_of(answers: Sequence[Answer], version: int) -> Score:
    """The score of `version`; a failed request counts as neither satisfying nor right."""
    own = [a for a in answers if a.version in (version, -1)]
    satisfied = [a.reply is not None and a.task.satisfies(a.reply) for a in own]
    right = [a.reply is not None and a.task.is_right(a.reply) for a in own]
    both = [s and r for s, r in zip(satisfied, right, strict=True)]
    count = len(own)
    return Score(version, count, sum(both) / count, sum(satisfied) / count, sum(right) / count)


def shortfalls(
    first: Score, last: Score, failed: int, updates: int, goals: Goals = GOALS
) -> list[str]:
    """The reasons why the loop has not learned; empty if it has."""
    problems: list[str] = []
    if last.version < updates:
        problems.append(f"only {last.version} of {updates} versions came into service")
    if last.score < goals.score:
        problems.append(f"the score ended at {last.score:.2f}, below {goals.score:.2f}")
    if last.score <= first.score:
        problems.append(f"the score did not rise ({first.score:.2f} → {last.score:.2f})")
    if last.right < goals.right:
        problems.append(f"only {last.right:.1%} of the replies are still right")
    if failed:
        problems.append(f"{failed} requests failed")
    return problems
