"""How far an optimizer step goes: AdamW gives its direction, the measured change its length.

No rate suits models of any size. What an update may do is said in nats a token of the policy's own
change, which means the same for all of them. The change grows with the square of a small step (its
Hessian is the Fisher information), which tells by how much a step must be longer or shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from learner.config import LearnerConfig

FIRST_RATE = 1e-4
"""AdamW's rate for the first step of a lineage. It is lengthened or shortened as measured."""
HIGHEST_RATE = 3e-2
"""Ten times what the smallest model here needs: where even this changes nothing, nothing will."""
LONGER = 4.0
"""The most by which a step is lengthened, except the first. AdamW divides a gradient by those
before it, so a batch that teaches little makes a short step. This keeps it short."""
MAX_TRIES = 30
"""How often a step's length is changed before it is refused. Each time costs one forward pass."""
_ENOUGH, _AIM = 0.5, 0.8
"""A change of at least `_ENOUGH` of the limit is not lengthened; others are, to about `_AIM`."""
_SQUARE, _STEEPEST = 2.0, 8.0
"""The power of the length with which the change is taken to grow: at first, and at most. A step
that became too long tells it, so that it is not shortened by more than it has to be."""
_LEAP = 10.0
"""The most by which one try lengthens: far from the measured change, its square misleads."""


def step_bound(scores: Sequence[float], config: LearnerConfig) -> float:
    """How much an update may change the policy, in nats a token: less where less was blamed.

    `scores` are at most 1: of people's turns those of their verdicts, of steps the outcome of their
    episode. So the bound falls with 1 - success as a task is learned.
    """
    to_correct = 1.0 - sum(scores) / len(scores)
    return config.step_kl * min(1.0, max(config.step_kl_floor, to_correct))


def longest_way(rate: float, *, first: bool) -> float:
    """The most times as long as it is that a step with AdamW's `rate` may get."""
    return HIGHEST_RATE / rate if first else min(HIGHEST_RATE / rate, LONGER)


def fit_step(
    change: Callable[[], float], scale: Callable[[float], None], limit: float, most: float
) -> tuple[float, float]:
    """Makes a step shorter or longer until its `change` is near `limit` and not above.

    `change()` measures it in nats a token; `scale(factor)` makes it `factor` times as long. It gets
    at most `most` times as long; 1: it is only shortened. Returns the last change and how long the
    step is now. If no try sufficed, the change returned is over the limit, or not a number.
    """
    length, kl, shortened = 1.0, change(), False
    power = _SQUARE
    for _ in range(MAX_TRIES):
        if not kl <= limit:
            factor, shortened = 0.1, True
            if math.isfinite(kl):
                factor = min(0.9, (limit / kl) ** (1 / power))
        elif not shortened and kl < _ENOUGH * limit and length < most:
            wanted = math.sqrt(_AIM * limit / kl) if kl > 0 else _LEAP
            factor = min(wanted, _LEAP, most / length)
        else:
            break
        length *= factor
        scale(factor)
        before, kl = kl, change()
        if factor > 1 and 0 < before < kl < math.inf:
            power = min(max(math.log(kl / before) / math.log(factor), _SQUARE), _STEEPEST)
    return kl, length
