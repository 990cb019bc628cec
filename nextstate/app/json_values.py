"""The JSON objects of a file, one after the other, however long it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from nextstate.errors import ConfigError
from nextstate.records import Json
from nextstate.wire import json_object

MOST_BYTES = 64 << 20
"""Of one object."""
_CHUNK = 1 << 20
_MARKS = re.compile(rb'["\\{}\[\]]')
_BETWEEN = b" \t\r\n,"


class Found(NamedTuple):
    """An object in a file."""

    line: int
    """Where it begins, from 1."""
    value: Json
    read: int
    """How many bytes of the file have been read."""


def json_objects(file: IO[bytes], name: str) -> Iterator[Found]:
    """The objects of a file: one a line, or one after the other, or those of one list.

    Raises ConfigError with the line for anything else. It holds one object at a time in memory.
    """
    scan = _Scan(name)
    while chunk := file.read(_CHUNK):
        for line, text in scan.add(chunk):
            value = json_object(text)
            if value is None:
                raise ConfigError(f"{name}, line {line}: this is no valid JSON object")
            yield Found(line, value, scan.read)
    scan.end()


class _Scan:
    """Finds where each object ends, looking at each byte once."""

    def __init__(self, name: str) -> None:
        self.read = 0
        self._name = name
        self._line = 1
        self._kept = bytearray()
        """What was read since the end of the last object."""
        self._depth, self._top = 0, 0
        """How many brackets are open; how many of them are around the objects."""
        self._start: int | None = None
        """Where the present object begins in `_kept`."""
        self._in_text = False
        self._skip = -1
        """The position after a backslash."""

    def add(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """Each object that ends in the next bytes of the file: (line, text)."""
        if not self.read:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
            self._top = int(chunk.lstrip()[:1] == b"[")
        self.read += len(chunk)
        base = len(self._kept)
        self._kept += chunk
        cut = 0
        for mark in _MARKS.finditer(chunk):
            at = base + mark.start()
            if at == self._skip:
                continue
            ends = self._mark(mark[0], at, cut)
            if ends:
                start = self._start
                assert start is not None
                text = bytes(self._kept[start : at + 1])
                line = self._line + self._kept.count(b"\n", cut, start)
                yield line, text
                self._line = line + text.count(b"\n")
                self._start, cut = None, at + 1
        del self._kept[:cut]
        self._skip -= cut
        if self._start is not None:
            self._start -= cut
        if len(self._kept) > MOST_BYTES:
            raise self._error(f"an object has more than {MOST_BYTES >> 20} MiB")

    def end(self) -> None:
        """Raises ConfigError unless the file ended with its last object."""
        if self._depth:
            raise self._error("the file ends within this value: it is not valid JSON")
        self._check_between(0, len(self._kept))

    def _mark(self, mark: bytes, at: int, cut: int) -> bool:
        """Takes a mark into account; True if an object ends with it."""
        if self._in_text:
            if mark == b"\\":
                self._skip = at + 1
            elif mark == b'"':
                self._in_text = False
            return False
        if mark == b'"':
            self._in_text = True
        elif mark in b"{[":
            if self._depth == self._top:
                self._check_between(cut, at)
                self._start = at
            self._depth += 1
        elif mark in b"}]":
            self._depth -= 1
            if self._depth < 0:
                raise self._error("a bracket closes that none opens")
            return self._depth == self._top and self._start is not None
        return False

    def _check_between(self, start: int, end: int) -> None:
        """Raises ConfigError if something stands between two objects."""
        between = bytes(self._kept[start:end]).strip(_BETWEEN + b"[]" * bool(self._top))
        if between:
            raise self._error("expected JSON objects, one a line or in one list")

    def _error(self, text: str) -> ConfigError:
        before = bytes(self._kept[: self._start or 0])
        blank = len(before) - len(before.lstrip())
        line = self._line + (before.count(b"\n") if self._start else before[:blank].count(b"\n"))
        return ConfigError(f"{self._name}, line {line}: {text}")
