"""Means over few independent groups, with one-sided confidence bounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

FEWEST = 8
"""Fewer groups say nothing: a t-test needs a variance."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over groups: sessions, or prompts."""

    value: float
    error: float
    """Its standard error."""
    count: int
    """Groups."""

    def upper(self, level: float) -> float:
        """The true mean is below this with confidence 1 - `level` (Student's t, one side)."""
        return self.value + student_quantile(1 - level, self.count - 1) * self.error

    def lower(self, level: float) -> float:
        """The true mean is above this with confidence 1 - `level`."""
        return self.value - student_quantile(1 - level, self.count - 1) * self.error


def mean_over_groups(values: Iterable[tuple[Hashable, float]]) -> Mean | None:
    """The mean of (group, value) over groups; None with fewer than FEWEST.

    Values of one group are alike, so each group counts once, with its mean; the variance is theirs:
    s² / n over n groups.
    """
    by_group: dict[Hashable, list[float]] = {}
    for group, value in values:
        by_group.setdefault(group, []).append(value)
    means = [statistics.fmean(found) for found in by_group.values()]
    if len(means) < FEWEST:
        return None
    value = statistics.fmean(means)
    # statistics.stdev fails on what is not a number.
    variance = sum((mean - value) ** 2 for mean in means) / (len(means) - 1)
    return Mean(value, math.sqrt(variance / len(means)), len(means))


def student_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t by the expansion in 1/degrees (Abramowitz & Stegun 26.7.5).

    From 7 degrees on and for p up to 0.999 it is right to 2 %.
    """
    x = statistics.NormalDist().inv_cdf(p)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
