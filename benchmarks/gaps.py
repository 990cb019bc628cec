"""What version changes did to the gaps between tokens: pure functions of times in seconds."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from random import Random
from statistics import fmean

from benchmarks.asking import Answered

_DRAWS = 2000


@dataclass(slots=True)
class Window:
    """A stretch of time in which versions change, or none does."""

    begin: float
    end: float
    changing: bool
    gaps: list[float] = field(default_factory=list[float])
    """Between two events of one reply."""
    firsts: list[float] = field(default_factory=list[float])
    """From a request to its first event."""

    @property
    def worst(self) -> float:
        """The longest gap; 0.0 without any."""
        return max(self.gaps, default=0.0)


def sort_into(windows: Sequence[Window], replies: Iterable[Answered]) -> None:
    """Puts every gap and every wait for a first event into its window.

    One that touches a window with changes belongs there; what lies outside of all is left out.
    `windows` follow each other in time.
    """
    for reply in replies:
        first = _window_of(windows, reply.started, reply.times[0])
        if first is not None:
            first.firsts.append(reply.times[0] - reply.started)
        for begin, end in pairwise(reply.times):
            window = _window_of(windows, begin, end)
            if window is not None:
                window.gaps.append(end - begin)


def _window_of(windows: Sequence[Window], begin: float, end: float) -> Window | None:
    """The first window with changes that the stretch touches, else the one that holds it whole."""
    touched = [w for w in windows if w.begin < end and begin < w.end]
    for window in touched:
        if window.changing:
            return window
    return next((w for w in touched if w.begin <= begin and end <= w.end), None)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed.

    >>> quantile([4.0, 1.0, 3.0, 2.0], 0.5), quantile([4.0, 1.0, 3.0, 2.0], 0.51)
    (2.0, 3.0)
    """
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True, slots=True)
class Added:
    """What changes added to the worst gap, seconds."""

    overall: float
    """Worst gap of all windows with changes less that of all without."""
    mean: float
    """Mean over pairs of windows of the same difference: less noisy than the worst of all."""
    low: float
    """The mean's 5th percentile over bootstrap samples of the pairs."""
    high: float
    """Its 95th."""


def added(windows: Sequence[Window], seed: int = 0) -> Added:
    """Compares each window with changes with the one without that stands in the same place."""
    on = [window.worst for window in windows if window.changing]
    off = [window.worst for window in windows if not window.changing]
    pairs = [a - b for a, b in zip(on, off, strict=True)]
    draw = Random(seed)
    means = [fmean(draw.choices(pairs, k=len(pairs))) for _ in range(_DRAWS)]
    return Added(max(on) - max(off), fmean(pairs), quantile(means, 0.05), quantile(means, 0.95))


def wrong_versions(
    replies: Sequence[Answered], published: Sequence[tuple[float, int]]
) -> list[str]:
    """Replies by a version that could not be serving when they were asked for, in words.

    A reply's version is at least the newest that had answered anybody before its request, and was
    its publishing had begun before its first event. `published` are (when that was, version), with
    the version that served from the start.
    """
    seen = sorted((reply.times[0], reply.version) for reply in replies)
    times = [time for time, _ in seen]
    newest = [0, *accumulate((version for _, version in seen), max)]
    began = {version: time for time, version in published}
    found: list[str] = []
    for reply in replies:
        floor = newest[bisect_right(times, reply.started)]
        if reply.version < floor:
            found.append(f"version {reply.version} answered after {floor} had")
        elif reply.version not in began:
            found.append(f"version {reply.version} answered and was never published")
        elif began[reply.version] > reply.times[0]:
            found.append(f"version {reply.version} answered before it was published")
    return found
