"""The two charts of the first page as geometry: the templates draw it as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 12, 28


@dataclass(frozen=True, slots=True)
class Score:
    """The mean score of what one version answered, from -1 to 1."""

    version: int
    value: float
    low: float | None
    high: float | None
    """Where the true mean lies with 90 % confidence; None with too few sessions."""
    turns: int
    sessions: int


@dataclass(frozen=True, slots=True)
class Mark:
    """One place of a chart, in its own units: x to the right, y down."""

    x: float
    y: float
    label: str
    """On the axis; may be empty."""
    title: str
    low: float | None = None
    high: float | None = None
    height: float = 0.0
    width: float = 0.0


def score_marks(scores: Sequence[Score]) -> list[Mark]:
    """A point with its interval for each version."""
    step = (WIDTH - _LEFT - _RIGHT) / max(len(scores), 1)
    labelled = max(len(scores) // 10, 1)
    return [
        Mark(
            x=round(_LEFT + step * (place + 0.5), 1),
            y=_level(score.value),
            label=f"v{score.version}" if place % labelled == 0 else "",
            title=score_text(score),
            low=None if score.low is None else _level(score.low),
            high=None if score.high is None else _level(score.high),
        )
        for place, score in enumerate(scores)
    ]


def score_lines() -> list[tuple[float, str]]:
    """The (y, label) of the score's axis."""
    return [(_level(value), f"{value:+.0f}" if value else "0") for value in (1, 0, -1)]


def score_text(score: Score) -> str:
    """A version's score in words."""
    where = f"version {score.version}: {score.value:+.2f}"
    if score.low is not None and score.high is not None:
        where += f" ({score.low:+.2f} to {score.high:+.2f})"
    return f"{where}, {score.turns} judged turns in {score.sessions} sessions"


def day_marks(days: Sequence[tuple[str, int]]) -> list[Mark]:
    """A bar for each (day, count)."""
    most = max((count for _, count in days), default=0) or 1
    step, room = (WIDTH - _LEFT - _RIGHT) / max(len(days), 1), HEIGHT - _TOP - _BOTTOM
    return [
        Mark(
            x=round(_LEFT + step * place + step * 0.15, 1),
            y=round(HEIGHT - _BOTTOM - room * count / most, 1),
            label=day[5:] if (len(days) - 1 - place) % 3 == 0 else "",
            title=f"{day}: {count}",
            height=round(room * count / most, 1),
            width=round(step * 0.7, 1),
        )
        for place, (day, count) in enumerate(days)
    ]


def _level(value: float) -> float:
    room = HEIGHT - _TOP - _BOTTOM
    return round(_TOP + room * (1 - min(max(value, -1.0), 1.0)) / 2, 1)
