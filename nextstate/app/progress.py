"""How far long work has come: bars on a terminal, now and then a line where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

LINE_S = 30.0
"""How often a line is written: work that takes less time writes none."""

Step = Callable[[str, int, int | None], None]
"""What is done, how far, and of how many: None where nobody knows."""


@contextmanager
def progress(every_s: float = LINE_S) -> Generator[Step]:
    """Shows each step on standard error; where that is no terminal, one in `every_s` as a line."""
    if not sys.stderr.isatty():
        yield _lines(every_s)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        bars: dict[str, Any] = {}

        def step(what: str, done: int, of: int | None) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=of)
            shown.update(bars[what], completed=done, total=of)

        yield step


def _lines(every_s: float) -> Step:
    last = time.monotonic()

    def step(what: str, done: int, of: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            text = f"{what}: {done:,}" + ("" if of is None else f" of {of:,}")
            print(text, file=sys.stderr, flush=True)

    return step
