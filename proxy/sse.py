"""Server-sent events cut out of a byte stream that may be split anywhere."""

from __future__ import annotations

import re

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class EventSplitter:
    """Collects bytes and gives back whole events, each with its terminator, unchanged."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes."""
        self._rest += data
        if b"\r" not in self._rest:  # vLLM sends none
            *whole, self._rest = self._rest.split(b"\n\n")
            return [event + b"\n\n" for event in whole]
        events: list[bytes] = []
        start = 0
        for match in _END.finditer(self._rest):
            # "\r\n\r" at the end could still become "\r\n\r\n"; the pattern needs both.
            events.append(self._rest[start : match.end()])
            start = match.end()
        self._rest = self._rest[start:]
        return events

    @property
    def rest(self) -> bytes:
        """Bytes of an event that has not ended: what a cut stream leaves."""
        return self._rest


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
