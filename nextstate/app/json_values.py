"""The JSON objects of a file, one after the other, however long it is and whatever is broken."""

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
_BOM = b"\xef\xbb\xbf"
_NO_TEXT = {
    b"\x1f\x8b": "it is packed: unpack it with gunzip",
    b"PK\x03\x04": "it is packed: unpack it with unzip",
    b"\xff\xfe": "it is UTF-16: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16: save it as UTF-8",
}
"""What a file begins with that is no JSON as it is, and what to do."""


class Found(NamedTuple):
    """An object in a file."""

    line: int
    """Where it begins, from 1."""
    value: Json
    read: int
    """How many bytes of the file have been read."""


class Broken(NamedTuple):
    """Something in a file that cannot be taken."""

    text: str
    """The file, the line and why."""
    read: int


def json_objects(file: IO[bytes], name: str) -> Iterator[Found | Broken]:
    """The objects of a file: one a line, or one after the other, or those of one list.

    What is broken is told, and the next line goes on; in a list only where the brackets match. It
    holds one object at a time in memory. Raises ConfigError for a file that is no text.
    """
    head = file.read(_CHUNK)
    for sign, why in _NO_TEXT.items():
        if head.startswith(sign):
            raise ConfigError(f"{name} cannot be read: {why}")
    file.seek(0)
    is_list = head.removeprefix(_BOM).lstrip()[:1] == b"["
    yield from _of_list(file, name) if is_list else _Lines(name).read_all(file)


def _of_list(file: IO[bytes], name: str) -> Iterator[Found | Broken]:
    scan = _Scan(name, top=1)
    try:
        while chunk := file.read(_CHUNK):
            for line, text in scan.add(chunk if scan.read else chunk.removeprefix(_BOM)):
                yield _found(name, line, text, scan.read)
    except ConfigError as error:
        yield Broken(f"{error}. What follows in this list is not read", scan.read)
        return
    try:
        scan.end()
    except ConfigError as error:
        yield Broken(str(error), scan.read)


class _Lines:
    """The objects of a file without a list around them.

    When an object does not end, only what is one line whole counts from then on: nobody knows
    where the other one was to end.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._read = 0
        self._open: list[tuple[int, bytes]] = []
        """The lines of an object that has not ended, with their numbers."""
        self._scan = _Scan(name)
        self._is_strict = False

    def read_all(self, file: IO[bytes]) -> Iterator[Found | Broken]:
        number = 0
        while line := file.readline(MOST_BYTES + 1):
            number += 1
            self._read += len(line)
            if number == 1:
                line = line.removeprefix(_BOM)
            if len(line) <= MOST_BYTES:
                yield from (self._go_on if self._open else self._begin)(number, line)
                continue
            yield from self._give_up("the next line is too long")
            most = f"a line has more than {MOST_BYTES >> 20} MiB"
            yield Broken(f"{self._name}, line {number}: {most}", self._read)
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
                self._read += len(line)
        yield from self._give_up("the file ends within this value: it is not valid JSON")

    def _begin(self, number: int, line: bytes) -> Iterator[Found | Broken]:
        # When a machine stops, zeros may stand where something was to be written.
        text = line.strip(b"\0" + _BETWEEN)
        if not line.strip(_BETWEEN) or (self._is_strict and line[:1] in b" \t]}"):
            return
        if self._is_strict or json_object(text) is not None:
            yield _found(self._name, number, text, self._read)
        else:
            self._scan = _Scan(self._name, line=number)
            yield from self._go_on(number, line)

    def _go_on(self, number: int, line: bytes) -> Iterator[Found | Broken]:
        self._open.append((number, line))
        try:
            for start, text in self._scan.add(line):
                yield _found(self._name, start, text, self._read)
            self._scan.end_line()
        except ConfigError as error:
            yield from self._give_up(error)
        else:
            if not self._scan.is_open:
                self._open.clear()

    def _give_up(self, why: str | ConfigError) -> Iterator[Found | Broken]:
        """Tells of the object that has not ended, and looks at each of its other lines."""
        if not self._open:
            return
        lines, self._open = self._open, []
        text = f"{self._name}, line {lines[0][0]}: {why}" if isinstance(why, str) else str(why)
        yield Broken(text, self._read)
        self._is_strict = self._is_strict or len(lines) > 1
        for number, line in lines[1:]:
            yield from self._begin(number, line)


def _found(name: str, line: int, text: bytes, read: int) -> Found | Broken:
    value = json_object(text)
    if value is not None:
        return Found(line, value, read)
    why = "this is no valid JSON object"
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError:
            why = "this is not UTF-8"
    return Broken(f"{name}, line {line}: {why}", read)


class _Scan:
    """Finds where each object ends, looking at each byte once."""

    def __init__(self, name: str, *, top: int = 0, line: int = 1) -> None:
        """`top`: how many brackets are around the objects. `line`: the number of the first one."""
        self.read = 0
        self._name = name
        self._line = line
        self._kept = bytearray()
        """What was read since the end of the last object."""
        self._depth, self._top = 0, top
        """How many brackets are open; how many of them are around the objects."""
        self._start: int | None = None
        """Where the present object begins in `_kept`."""
        self._in_text = False
        self._skip = -1
        """The position after a backslash."""

    @property
    def is_open(self) -> bool:
        """Whether an object has begun and not ended."""
        return self._start is not None

    def add(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """Each object that ends in the next bytes of the file: (line, text)."""
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

    def end_line(self) -> None:
        """Raises ConfigError if a line cannot end here."""
        if self._in_text:
            raise self._error("the line ends within a text: it is not valid JSON")
        if not self.is_open:
            self.end()

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
