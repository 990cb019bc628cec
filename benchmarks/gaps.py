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

Gap = tuple[float, float]
"""When a gap between two events of one reply began and ended."""
_DRAWS = 2000


@dataclass(slots=True)
class Window:
    """A stretch of time with version changes or without."""

    begin: float
    end: float
    changing: bool
    gaps: list[Gap] = field(default_factory=list[Gap])
    firsts: list[Gap] = field(default_factory=list[Gap])
    """The gaps from each request to its first event."""


def lengths(gaps: Iterable[Gap]) -> list[float]:
    """The gaps' lengths in seconds, in ascending order."""
    return sorted(end - begin for begin, end in gaps)


def worst(gaps: Iterable[Gap]) -> float:
    """The longest gap in seconds; 0.0 without any."""
    return max(lengths(gaps), default=0.0)


def sort_into(windows: Sequence[Window], replies: Iterable[Answered]) -> None:
    """Puts every gap and every wait for a first event into its window.

    A gap that touches a window with changes belongs there. A gap outside all windows is left out.
    """
    for reply in replies:
        first = (reply.started, reply.times[0])
        if (window := _window_of(windows, first)) is not None:
            window.firsts.append(first)
        for gap in pairwise(reply.times):
            if (window := _window_of(windows, gap)) is not None:
                window.gaps.append(gap)


def pairs(windows: Sequence[Window]) -> list[tuple[Window, Window]]:
    """Pairs of neighbours: the window with changes, then the one without."""
    both = zip(windows[::2], windows[1::2], strict=True)
    return [(first, second) if first.changing else (second, first) for first, second in both]


def _window_of(windows: Sequence[Window], gap: Gap) -> Window | None:
    """The first window with changes that the gap touches, else the one that contains it."""
    touched = [window for window in windows if gap[0] <= window.end and window.begin <= gap[1]]
    for window in touched:
        if window.changing:
            return window
    return next((w for w in touched if w.begin <= gap[0] and gap[1] <= w.end), None)


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
    """Worst gap of all windows with changes minus the worst of all without."""
    mean: float
    """Mean over pairs of windows of the same difference: less noisy than the worst of all."""
    low: float
    """The mean's 5th percentile over bootstrap samples of the pairs."""
    high: float
    """The mean's 95th percentile."""


def added(windows: Sequence[Window], seed: int = 0) -> Added:
    """Compares each window with changes with the other one of its pair."""
    worsts = [(worst(changing.gaps), worst(quiet.gaps)) for changing, quiet in pairs(windows)]
    rises = [on - off for on, off in worsts]
    draw = Random(seed)
    means = [fmean(draw.choices(rises, k=len(rises))) for _ in range(_DRAWS)]
    overall = max(on for on, _ in worsts) - max(off for _, off in worsts)
    return Added(overall, fmean(rises), quantile(means, 0.05), quantile(means, 0.95))


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
