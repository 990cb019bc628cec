"""Cuts server-sent events out of a byte stream that may be split anywhere."""

from __future__ import annotations

import re

_RETURN = ord("\r")
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class EventSplitter:
    """Collects bytes and returns whole events, unchanged, each with its terminator."""

    def __init__(self) -> None:
        self.data = b""
        self.at = 0
        """Where the bytes in `data` begin that were not returned yet."""

    def add(self, data: bytes) -> None:
        """Appends what has come."""
        self.data = self.rest + data
        self.at = 0

    def next(self) -> bytes | None:
        """The next event, or None if it is not whole yet."""
        if self.at == len(self.data):
            return None
        if _RETURN not in self.data:  # vLLM sends none
            end = self.data.find(b"\n\n", self.at) + 2
            if end < 2:
                return None
        else:
            # "\r\n\r" at the end could still become "\r\n\r\n"; the pattern needs both.
            match = _END.search(self.data, self.at)
            if match is None:
                return None
            end = match.end()
        event = self.data[self.at : end]
        self.at = end
        return event

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes."""
        self.add(data)
        return list(iter(self.next, None))

    @property
    def rest(self) -> bytes:
        """The bytes of an event that has not ended."""
        return self.data[self.at :]


def event_data(event: bytes) -> bytes | None:
    """The payload of an event's `data:` lines joined by newlines; None for comments."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return event[6:-2]  # one line and "\n\n": what vLLM sends
    lines = [
        line[5:].removeprefix(b" ")
        for line in re.split(rb"\r\n|\n|\r", event)
        if line.startswith(b"data:")
    ]
    return b"\n".join(lines) if lines else None
