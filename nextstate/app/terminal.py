"""Text from others on a terminal: without control characters, and as wide as there is room."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from rich.cells import cell_len

from nextstate.wire import one_line

_WITHOUT_TERMINAL = 120
"""Columns where the output goes into a file or a pipe, unless COLUMNS says otherwise."""
_LEAST_COLUMNS = 80
_CHARS_A_CELL = 4
"""Characters without a width of their own, such as accents, may follow each other without end."""
_COLOURS = re.compile(r"\x1b\[[0-9;?]{0,30}[A-Za-z]")


def columns() -> int:
    """How many columns a line may have."""
    return max(shutil.get_terminal_size((_WITHOUT_TERMINAL, 24)).columns, _LEAST_COLUMNS)


def fitted(text: str, cells: int) -> str:
    """The beginning of a text on one line, at most `cells` wide; what is cut ends with `…`.

    >>> fitted("two\\n\\n  words", 20), fitted("a long text", 6), fitted("日本語", 5)
    ('two words', 'a lon…', '日本…')
    """
    most = _CHARS_A_CELL * cells
    beginning = text.lstrip()[: 2 * most]
    line = " ".join(one_line(_COLOURS.sub("", beginning)).split())
    if len(line) <= most and cell_len(line) <= cells and len(beginning) < 2 * most:
        return line
    kept: list[str] = []
    room = cells - 1
    for character in line[:most]:
        room -= cell_len(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept).rstrip() + "…"


def harmless_lines(text: str) -> Iterator[str]:
    """The lines of a text, each without control characters."""
    return (one_line(_COLOURS.sub("", line)) for line in text.split("\n"))
