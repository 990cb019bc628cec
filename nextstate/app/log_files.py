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
_REMEMBERED_BYTES = 64
"""A line's time and text: after a rotation they are not at the same place."""


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


def parts(folder: Path) -> list[str]:
    """The names of the processes that have a log in a folder."""
    return sorted(file.stem for file in folder.glob("*.log"))


def last_lines(path: Path, count: int) -> list[str]:
    """The newest `count` lines of a log, with those of its older copies, oldest first.

    So many bytes are read as these lines have, and a little more; of one of more than 64 KiB the
    end comes back.
    """
    found: list[str] = []
    for file in (path, *(_older(path, number) for number in range(1, _KEPT + 1))):
        if len(found) >= count or not file.exists():
            break
        found[:0] = _end_of(file, count - len(found))
    return found


class Follower:
    """Hands out what is written to a log from now on, also across a rotation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0
        self._seen = _bytes_before(path, self._at)
        """The last bytes before the position: they tell whether it is still the same content."""
        self._begun = b""

    def lines(self) -> list[str]:
        """The whole lines that are new since the last call.

        If the log was rotated and the lines in between are not at their place in its newest copy,
        they are left out: they are in the copy.
        """
        new = b""
        if _bytes_before(self._path, self._at) != self._seen:
            older = _older(self._path, 1)
            if _bytes_before(older, self._at) == self._seen:
                while more := _read(older, self._at):
                    new += more
                    self._at += len(more)
            self._at, self._seen = 0, b""
        new += (more := _read(self._path, self._at))
        self._at += len(more)
        self._seen = (self._seen + more)[-_REMEMBERED_BYTES:]
        *whole, self._begun = (self._begun + new).split(b"\n")
        if len(self._begun) > _LONGEST_LINE:
            whole, self._begun = [*whole, self._begun], b""
        return [line.decode(errors="replace") for line in whole]


def _end_of(file: Path, count: int) -> list[str]:
    """The newest `count` lines of one file."""
    with file.open("rb") as log_file:
        at = log_file.seek(0, os.SEEK_END)
        data = b""
        while at > 0 and data.count(b"\n") <= count and len(data) < count * _LONGEST_LINE:
            step = min(at, _TAIL_BYTES)
            at = log_file.seek(at - step)
            data = log_file.read(step) + data
    lines = data.decode(errors="replace").removesuffix("\n").split("\n") if data else []
    return [line[-_LONGEST_LINE:] for line in lines[-count:]] if count else []


def _bytes_before(file: Path, at: int) -> bytes:
    """The last bytes of a file before a position; fewer if it is shorter."""
    start = max(at - _REMEMBERED_BYTES, 0)
    return _read(file, start, at - start)


def _read(file: Path, at: int, most: int = _CHUNK_BYTES) -> bytes:
    """What a file has from a position on, a piece of it."""
    try:
        with file.open("rb") as log_file:
            log_file.seek(at)
            return log_file.read(most)
    except FileNotFoundError:
        return b""


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
