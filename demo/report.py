"""What the demo shows while it runs, and the record that it writes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import orjson
from rich.console import Console
from rich.markup import escape

from demo.curve import draw_curve
from demo.score import Score
from demo.talk import Talked
from nextstate.app.settings import Settings


@dataclass(frozen=True, slots=True)
class Record:
    """The result of one demo run."""

    method: str
    persona: str
    seed: int
    scores: Sequence[Score]
    replies: int
    """Replies to the personas, without those to held-out questions."""
    reactions: Mapping[str, int]
    stored: Mapping[str, int]
    starved: bool
    """True if opd ended early because too few complaints were left to learn from."""
    failed: int
    versions_met: Sequence[int]
    """Versions that answered a persona."""
    goal: float
    """Of the last score."""
    example: tuple[str, str, str]
    """A held-out question with its reply before and after training."""


class Display:
    """A live status line on a terminal, and lines that stay everywhere."""

    def __init__(self, updates: int) -> None:
        self._console = Console(highlight=False)
        spinner = "dots" if self._console.encoding.startswith("utf") else "line"
        self._status = self._console.status("", spinner=spinner)
        self._updates = updates
        self._phase = self._counts = ""
        self._version = self._turns = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def step(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text)

    def phase(self, text: str) -> None:
        """Shows what happens now."""
        self._phase = text
        self._refresh()

    def live(self, talked: Talked, stored: Mapping[str, int], version: int) -> None:
        """Shows the counts so far and the serving version."""
        self._version = version
        self._turns = stored.get("turns/main", 0)
        good, neither, bad = (stored.get(f"verdicts/{score}", 0) for score in (1, 0, -1))
        self._counts = f"{self._turns} turns  +{good} ·{neither} −{bad}  {talked.failed} failed"
        self._refresh()

    def scored(self, score: Score) -> None:
        """Prints a version's score."""
        bar = ("█" if self._console.encoding.startswith("utf") else "#") * round(20 * score.score)
        self._console.print(
            f"version {score.version:2d}  [bold]{score.score:4.2f}[/bold] {bar:20} "
            f"satisfied {score.satisfied:4.2f}  right {score.right:4.2f}  "
            f"[dim]{self._turns} turns[/dim]"
        )

    def _refresh(self) -> None:
        line = f"version {self._version}/{self._updates}  {self._phase}  {self._counts}"
        self._status.update(escape(line))


def record_files(out: Path) -> tuple[Path, Path]:
    """The files of a demo's record: data and picture."""
    return out / "curve.json", out / "curve.png"


def write_record(record: Record, out: Path) -> tuple[Path, Path]:
    """Writes the record and its picture and returns their paths."""
    data, picture = record_files(out)
    data.write_bytes(orjson.dumps(asdict(record), option=orjson.OPT_INDENT_2))
    draw_curve(record.scores, record.goal, f"{record.persona}, {record.method}", picture)
    return data, picture


def print_summary(
    record: Record,
    files: tuple[Path, Path],
    settings: Settings,
    problems: Sequence[str],
    seconds: float,
) -> None:
    """Prints replies before and after, what happened, and where everything is."""
    console = Console(highlight=False)
    first, last = record.scores[0], record.scores[-1]
    question, before, after = record.example
    console.rule("the same held-out question")
    for title, text in (("asked", question), ("before", before), ("after", after)):
        console.print(f"[bold]{title:>7}[/bold]  " + escape(textwrap.indent(text, " " * 9).strip()))
    console.rule("what happened")
    reactions = ", ".join(f"{count} {kind}" for kind, count in record.reactions.items())
    console.print(
        f"{record.replies} replies to the {record.persona} ({reactions}); versions "
        f"{record.versions_met[0]}–{record.versions_met[-1]} answered; {record.failed} requests "
        "failed"
    )
    if record.starved:
        console.print("opd ended early: too few complaints were left to fill a batch with hints")
    console.print(
        f"held-out score with {record.method}: {first.score:.2f} ± {first.margin:.2f} → "
        f"[bold]{last.score:.2f} ± {last.margin:.2f}[/bold] "
        f"(satisfied {last.satisfied:.2f}, right {last.right:.2f}; {last.questions} questions)"
    )
    console.rule("where it is")
    config = settings.file
    for title, text in (
        ("curve", f"{files[1]}  {files[0]}"),
        ("records", f"nextstate turns --config {config}"),
        ("versions", f"nextstate versions --config {config}"),
        ("adapters", str(settings.store.path / "versions")),
        ("logs", str(settings.store.path / "logs")),
        ("serve it", f"nextstate up --config {config}"),
    ):
        console.print(f"[bold]{title:>9}[/bold]  {escape(text)}", soft_wrap=True)
    for problem in problems:
        console.print(f"[bold red]not learned:[/bold red] {problem}")
    verdict = "the loop did not learn" if problems else "the policy learned from being used"
    console.print(f"{verdict} ({seconds:.0f} s)")
