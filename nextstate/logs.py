"""Where a process writes what it has to say: to its standard error, one line an event.

A supervisor appends its parts' output to files, which it keeps short: `rotate`. A part goes on
writing to the same open file, so its content is copied away; nothing stands between a part and its
file that could be killed or fill up.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from nextstate.error_text import safe_traceback

log = logging.getLogger(__name__)

MOST_BYTES = 10 << 20
"""Of one log file, but for what a part writes between two looks at it."""
_KEPT = 3
"""Older files of each log: `proxy.log.1` is the newest."""
_TAIL_BYTES = 256 << 10
_COPIED_BYTES = 1 << 20


class _Formatter(logging.Formatter):
    """One line an event; of an error where it happened and what is `told` of it."""

    def formatException(self, ei: Any) -> str:
        return safe_traceback(ei[1])

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name == "asyncio":  # then come a callback's arguments, or the error of a task
            record.message = re.split(r"[\n(]", record.message, maxsplit=1)[0]
        return super().formatMessage(record)


def to_stderr() -> None:
    """Configures logging; for `__main__` only. What ends the process is told alike."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    sys.excepthook = _last_words


def _last_words(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    log.critical("the process ends", exc_info=error)


def rotate(path: Path, most_bytes: int = MOST_BYTES) -> bool:
    """Moves what a log holds to `path`.1 once that is more than `most_bytes`; says whether it did.

    Whoever writes must append. What is written between the copy and the cut, a moment, is lost;
    killed in between, it is there twice. A disk without room for the copy loses the old lines: a
    log must not be what fills it.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return False
    if size <= most_bytes:
        return False
    draft = path.with_name(f"{path.name}.draft")
    try:
        with path.open("rb") as source, draft.open("wb") as copy:
            source.seek(max(0, size - most_bytes))  # of one that grew faster, the newest lines
            left = 2 * most_bytes  # what is written meanwhile, too, but not without end
            while left > 0 and (part := source.read(min(left, _COPIED_BYTES))):
                left -= copy.write(part)
        for number in range(_KEPT - 1, 0, -1):
            older = _older(path, number)
            if older.exists():
                older.replace(_older(path, number + 1))
        draft.replace(_older(path, 1))
    except OSError as error:
        log.error("the lines of %s are lost: no copy could be made: %s", path, error)
        draft.unlink(missing_ok=True)
    os.truncate(path, 0)
    return True


def tail(path: Path, start: int = 0) -> str:
    """The end of what was written to a log since it had `start` bytes, however long that is.

    Nothing for a log that has been removed.
    """
    if not path.exists():
        return ""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < start:  # rotated meanwhile
            start = 0
        file.seek(max(start, size - _TAIL_BYTES))
        return file.read(_TAIL_BYTES).decode(errors="replace")


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
