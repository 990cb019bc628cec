"""The status screen of `nextstate up`: one look at the loop, drawn for a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nextstate.app.live import Lineage, Seen
from nextstate.app.page.charts import Score
from nextstate.app.terminal import fitted

_BAR = 24
_LABEL = 11
_LONGEST_LINES = 3
"""So many lines of the screen one text may take."""
_OTHER_ROWS = 16
"""Of the screen, beside the lineages."""
_LINEAGE_ROWS = 4
"""Of a lineage, beside the scores of its versions."""
_WELL = "up"


@dataclass(frozen=True, slots=True)
class Frame:
    """What the screen shows beside the look itself."""

    url: str
    """The proxy's address."""
    next_step: str
    """What a person may do next."""
    started: float
    width: int
    height: int
    marks: Mapping[str, str]
    """The characters that the terminal's encoding has: see `marks_for`."""


def marks_for(encoding: str) -> dict[str, str]:
    """The characters of the drawing; without UTF-8 those of ASCII."""
    if encoding.lower().startswith("utf"):
        return {"dot": "●", "bar": "█", "rest": "░", "sep": "·"}
    return {"dot": "*", "bar": "#", "rest": ".", "sep": "-"}


def screen(seen: Seen, frame: Frame, now: float) -> RenderableType:
    """The whole screen."""
    sep = f"  {frame.marks['sep']}  "
    head = Text.assemble(
        ("NextState", "bold"), sep, f"{frame.url}/v1", sep, f"up {_duration(now - frame.started)}"
    )
    rows: list[RenderableType] = [head, "", _parts(seen.parts, frame), _turns(seen.counts)]
    rows.append(_verdicts(seen.counts, frame))
    most = max((frame.height - _OTHER_ROWS) // max(len(seen.lineages), 1) - _LINEAGE_ROWS, 1)
    shown = seen.lineages[: max((frame.height - _OTHER_ROWS) // (_LINEAGE_ROWS + 1), 1)]
    for lineage in shown:
        rows += ["", *_lineage(lineage, most, frame)]
    if len(shown) < len(seen.lineages):
        rows.append(_row("", f"and {len(seen.lineages) - len(shown)} more: `nextstate status`"))
    rows.append("")
    rows += [_row("Wrong now", problem, frame, "red") for problem in seen.problems[:_LONGEST_LINES]]
    rows.append(_last_error(seen, frame))
    rows += ["", Text(frame.next_step, "dim"), Text("Ctrl-C ends it", "dim")]
    return Padding(Group(*rows), (1, 2))


def _parts(parts: Mapping[str, str], frame: Frame) -> RenderableType:
    line = Text()
    for name, state in parts.items():
        style = "green" if state == _WELL else "red"
        line.append(f"{frame.marks['dot']} ", style)
        line.append(f"{name} " if state == _WELL else f"{name} ({state.partition(':')[0]}) ")
        line.append(" ")
    return _row("Parts", line)


def _turns(counts: Mapping[str, int]) -> RenderableType:
    main, side = counts.get("turns/main", 0), counts.get("turns/side", 0)
    if not main + side:
        return _row("Turns", "none yet: they appear when your agent asks")
    text = f"{main}" + (f" and {side} side turns" if side else "")
    return _row("Turns", f"{text}; {counts.get('turns/trainable', 0)} can train")


def _verdicts(counts: Mapping[str, int], frame: Frame) -> RenderableType:
    good, neutral, bad = (counts.get(f"verdicts/{score}", 0) for score in (1, 0, -1))
    waiting = counts.get("judgements/pending", 0) + counts.get("judgements/leased", 0)
    line = Text.assemble(
        (f"{good} good", "green" if good else ""),
        f"  {neutral} neither  ",
        (f"{bad} bad", "red" if bad else ""),
    )
    if waiting:
        line.append(f"  {frame.marks['sep']}  {waiting} wait for the judge", "dim")
    return _row("Verdicts", line)


def _lineage(lineage: Lineage, most: int, frame: Frame) -> Iterator[RenderableType]:
    line = Text.assemble((f"version {lineage.serving} serves", "bold"))
    yield _row(lineage.name, line)
    yield _row("Learning?", lineage.answer, frame)
    yield from (_score(score, lineage.serving, frame) for score in lineage.scores[-most:])
    yield _row("Next", lineage.waits, frame, "red" if lineage.stopped else "")


def _score(score: Score, serving: int, frame: Frame) -> RenderableType:
    marks = frame.marks
    full = round((score.value + 1) / 2 * _BAR)
    line = Text.assemble(
        f"{score.value:+.2f} ",
        (marks["bar"] * full, "cyan" if score.version == serving else ""),
        (marks["rest"] * (_BAR - full), "dim"),
    )
    if score.low is not None and score.high is not None:
        line.append(f" {score.low:+.2f} to {score.high:+.2f}")
    line.append(f"  {score.turns} turns", "dim")
    return _row(f"  v{score.version}", line)


def _last_error(seen: Seen, frame: Frame) -> RenderableType:
    error = seen.last_error
    if error is None:
        return _row("Last error", Text("none", "dim"))
    at = time.strftime("%H:%M:%S", time.localtime(error.at))
    return _row("Last error", f"{at} {error.part}: {error.text}", frame)


def _row(
    label: str, text: str | Text, frame: Frame | None = None, style: str = ""
) -> RenderableType:
    """A label and a text. A text from elsewhere needs the frame: it is made harmless."""
    if frame is not None and isinstance(text, str):
        text = fitted(text, _LONGEST_LINES * max(frame.width - _LABEL - 6, 20))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=_LABEL, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label, "dim"), Text(text, style) if isinstance(text, str) else text)
    return grid


def _duration(seconds: float) -> str:
    """A time in words.

    >>> _duration(59), _duration(3700), _duration(200_000)
    ('59 s', '1 h 1 min', '2 d 7 h')
    """
    left = max(int(seconds), 0)
    if left < 60:
        return f"{left} s"
    units = ((left // 86400, "d"), (left // 3600 % 24, "h"), (left // 60 % 60, "min"))
    found = [f"{count} {unit}" for count, unit in units if count]
    return " ".join(found[:2])
