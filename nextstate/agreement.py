"""How well scores agree with labels: accuracy, and agreement beyond chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SCORES = (1, 0, -1)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of labels and scores; an abstention (None) agrees with no label."""

    cases: int
    accuracy: float
    kappa: float
    """Cohen's kappa (1960): agreement beyond chance, at most 1; 0 if chance explains all of it."""
    chance: float
    """The accuracy that chance explains."""
    abstained: int
    confusion: Mapping[tuple[int, int | None], int]
    """Cases by (label, score)."""

    @property
    def kappa_interval(self) -> tuple[float, float]:
        """Where κ lies with 90 % confidence: that of the accuracy, less the same chance.

        >>> [round(end, 2) for end in agreement([(1, 1), (0, 0), (-1, -1)]).kappa_interval]
        [0.29, 1.0]
        """
        low, high = proportion_interval(round(self.accuracy * self.cases), self.cases)
        if self.chance == 1:
            return -1.0, 1.0
        return (low - self.chance) / (1 - self.chance), (high - self.chance) / (1 - self.chance)


def agreement(
    pairs: Sequence[tuple[int, int | None]] | Mapping[tuple[int, int], int],
) -> Agreement:
    """The agreement of (label, score) pairs, given one by one or with their counts.

    >>> found = agreement([(1, 1), (1, 1), (0, 0), (-1, 1)])
    >>> found.accuracy, round(found.kappa, 4)
    (0.75, 0.5556)
    """
    if not pairs:
        raise ValueError("agreement of no cases")
    confusion: Counter[tuple[int, int | None]] = Counter(pairs)
    count = confusion.total()
    accuracy = sum(n for (label, score), n in confusion.items() if label == score) / count
    labels, scores = Counter[int](), Counter[int | None]()
    for (label, score), cases in confusion.items():
        labels[label] += cases
        scores[score] += cases
    chance = sum(labels[value] * scores[value] for value in SCORES) / count**2
    kappa = 0.0 if chance == 1 else (accuracy - chance) / (1 - chance)
    return Agreement(count, accuracy, kappa, chance, scores[None], confusion)


def proportion_interval(hits: int, cases: int, z: float = 1.645) -> tuple[float, float]:
    """Where the share behind `hits` of `cases` lies with 90 % confidence (Wilson 1927).

    >>> [round(end, 2) for end in proportion_interval(14, 16)]
    [0.68, 0.96]
    >>> proportion_interval(0, 0)
    (0.0, 1.0)
    """
    if not cases:
        return 0.0, 1.0
    share, spread = hits / cases, z * z / cases
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
