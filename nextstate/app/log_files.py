"""The log files of the child processes: kept short, and read from their end.

A child keeps its log file open and appends to it. So a log is copied and truncated, not renamed:
no pipe or process stands between a child and its log.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

MAX_BYTES = 10 << 20
"""Of one log file; a child may write more between two calls of `rotate`."""
_KEPT = 3
"""Older copies of each log; `proxy.log.1` is the newest."""
_TAIL_BYTES = 256 << 10
_CHUNK_BYTES = 1 << 20
_LONGEST_LINE = 64 << 10
"""So much of a line that was cut is left out; what follows of it is kept."""


def rotate(path: Path, max_bytes: int = MAX_BYTES) -> bool:
    """Moves a log's content to `path`.1 if it is longer than `max_bytes`; True if it did.

    The writer must append. Of more than twice `max_bytes` the newest whole lines are kept, and up
    to `max_bytes` of what is written meanwhile: a copy has at most three times `max_bytes`. A line
    that is written in the microseconds between the last read and the truncation is lost. If this
    process is killed in between, lines are kept twice. If the disk has no room for the copy, the
    old lines are lost: a log must not fill the disk.
    """
    size = path.stat().st_size if path.exists() else 0
    if size <= max_bytes:
        return False
    draft = path.with_name(f"{path.name}.draft")
    try:
        with path.open("rb") as source, draft.open("wb") as copy:
            if size > 2 * max_bytes:
                source.seek(size - 2 * max_bytes)
                source.readline(_LONGEST_LINE)
            _copy(source, copy, 2 * max_bytes)
            for number in range(_KEPT - 1, 0, -1):
                if (older := _older(path, number)).exists():
                    older.replace(_older(path, number + 1))
            draft.replace(_older(path, 1))
            _copy(source, copy, max_bytes)  # what was written meanwhile
            os.truncate(path, 0)
    except OSError as error:
        log.error("the lines of %s are lost: no copy could be made: %s", path, error)
        draft.unlink(missing_ok=True)
        os.truncate(path, 0)
    return True


def _copy(source: BinaryIO, copy: BinaryIO, most: int) -> None:
    """Copies up to `most` bytes. After the read that finds no more nothing else is done."""
    while most > 0 and (chunk := source.read(min(most, _CHUNK_BYTES))):
        most -= copy.write(chunk)
        copy.flush()


def tail(path: Path, start: int = 0) -> str:
    """The end of what was written to a log since it had `start` bytes; "" if it does not exist."""
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
