"""A test whether a serving version's verdicts are clearly worse than its ancestors'.

The learner looks again and again, so the test must hold for any number of looks. Both means are
bounded by betting (Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by
betting"). A gambler bets on each verdict against "the mean is at least m", at fair odds: each
verdict multiplies the capital by 1 + λ (m − score). If m is right, the capital never reaches 1 / p
with probability 1 − p (Ville's inequality). The capital is a mean over several λ, so the counts of
each score are all that it needs. Each of the two means gets half of the level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nextstate.records import ScoreCounts

REFERENCE_VERSIONS = 4
"""A version is compared with the verdicts of this many nearest ancestors together."""
_STAKES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""λ as a fraction of the largest stake that cannot lose everything in one verdict."""
_BISECTIONS = 30


@dataclass(frozen=True, slots=True)
class Drop:
    """A clear drop of the mean score."""

    mean: float
    """Score of the version's turns."""
    verdicts: int
    before: float
    """Score of its ancestors' turns."""
    verdicts_before: int

    def __str__(self) -> str:
        return (
            f"its turns score {self.mean:.2f} on average ({self.verdicts} verdicts), those of the "
            f"versions before it {self.before:.2f} ({self.verdicts_before} verdicts)"
        )


def clear_drop(
    ours: ScoreCounts, before: Sequence[ScoreCounts], *, level: float, drop: float
) -> Drop | None:
    """The drop of the mean score if it is clearly larger than `drop`; otherwise None.

    Without such a drop, the probability of ever finding one, over all looks, is at most `level`.
    """
    reference = sum(before, ScoreCounts())
    if not ours.total or not reference.total:
        return None
    expected = lower_bound(reference, level / 2) - drop
    if log_capital_against_at_least(expected, ours) < math.log(2 / level):
        return None
    return Drop(mean(ours), ours.total, mean(reference), reference.total)


def mean(counts: ScoreCounts) -> float:
    """The mean score, of at least one verdict."""
    return (counts.good - counts.bad) / counts.total


def lower_bound(counts: ScoreCounts, level: float) -> float:
    """The true mean score is above this at all times, with probability 1 - `level`."""
    low, high = -1.0, 1.0
    mirrored = ScoreCounts(counts.bad, counts.neutral, counts.good)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        # "At most m" of the scores is "at least -m" of the scores with the other sign.
        if log_capital_against_at_least(-middle, mirrored) >= math.log(1 / level):
            low = middle
        else:
            high = middle
    return low


def log_capital_against_at_least(expected: float, counts: ScoreCounts) -> float:
    """Logarithm of what a capital of 1 became by betting that the mean is below `expected`.

    With a fraction f of the largest stake, 1 / (1 - expected), a verdict multiplies the capital by
    1 - f + f (1 - score) / (1 - expected). It grows with `expected`.
    """
    if expected >= 1:
        return math.inf if counts.neutral + counts.bad else 0.0
    scores = ((1, counts.good), (0, counts.neutral), (-1, counts.bad))
    logs = [
        sum(n * math.log(1 - f + f * (1 - score) / (1 - expected)) for score, n in scores)
        for f in _STAKES
    ]
    highest = max(logs)
    return highest + math.log(sum(math.exp(log - highest) for log in logs) / len(logs))
