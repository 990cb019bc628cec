# pyright: basic
"""The demo's learning curve as a picture."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo.score import Score


@contextmanager
def _drawn(levels: Sequence[float], path: Path) -> Generator[Any]:
    """Axes for shares by version; grey lines are at `levels`. What is drawn becomes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=150)
    yield axes
    for level in levels:
        axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.03)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def draw_curve(scores: Sequence[Score], goal: float, title: str, path: Path) -> None:
    """Draws the score of each version with its 95 % interval, and the goal, into a PNG."""
    from matplotlib.ticker import MaxNLocator

    versions = [score.version for score in scores]
    low = [max(0.0, s.score - s.margin) for s in scores]
    high = [min(1.0, s.score + s.margin) for s in scores]
    with _drawn((scores[0].score, goal), path) as axes:
        axes.fill_between(versions, low, high, alpha=0.2, color="tab:blue", linewidth=0)
        score, right = [s.score for s in scores], [s.right for s in scores]
        axes.plot(versions, score, "o-", color="tab:blue", label="as the user wants it, and right")
        axes.plot(versions, right, "--", color="tab:green", label="right")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("policy version (one update of 16 judged turns each)")
        axes.set_ylabel("share of held-out replies")
        axes.set_title(title)
        axes.legend(loc="lower right", frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)


def draw_solved(points: Sequence[tuple[int, float, float, float]], goal: float, path: Path) -> None:
    """Draws (version, share solved, low, high) and the goal into a PNG."""
    versions, solved, low, high = zip(*points, strict=True)
    with _drawn((solved[0], goal), path) as axes:
        axes.fill_between(versions, low, high, alpha=0.2, color="tab:blue", linewidth=0)
        axes.plot(versions, solved, "o-", color="tab:blue")
        axes.set_xlabel("policy version")
        axes.set_ylabel("share of held-out tasks solved at the first attempt")
