"""What a client says of a turn through `POST /v1/feedback`, read and checked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from nextstate.config import nearest
from nextstate.errors import RecordError
from nextstate.records import Feedback, Json
from nextstate.wire import json_object

AT_ONCE = 60
"""Feedback that a caller may give at once; a person clicks less than that in a minute."""
A_MINUTE = 60.0
"""How much more of it they may give in each minute."""
_EXAMPLE = '{"turn_id": "turn_…", "score": -1, "hint": "Answer in one sentence."}'


@dataclass(frozen=True, slots=True)
class Said:
    """A checked body: it names a turn, or a session and with it the newest main turn there."""

    turn_id: str | None
    session_id: str | None
    score: int
    hint: str | None
    comment: str | None

    def of(self, turn: str) -> Feedback:
        """The feedback on `turn`. Raises RecordError."""
        return Feedback(turn, self.score, self.hint, self.comment)


class Allowance:
    """How much feedback each caller may still give: a bucket of `AT_ONCE` that fills again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}
        """By caller, one for each key: what was left, and when."""

    def wait_s(self, caller: str) -> int:
        """0 if the caller may give feedback now, which is counted; else the seconds until then."""
        now = self._clock()
        left, since = self._left.get(caller, (float(AT_ONCE), now))
        left = min(AT_ONCE, left + (now - since) * A_MINUTE / 60)
        if left < 1:
            return math.ceil((1 - left) * 60 / A_MINUTE)
        self._left[caller] = left - 1, now
        return 0


_FIELDS = ("turn_id", "session_id", "score", "hint", "comment")


def read_feedback(data: bytes) -> Said:
    """The body of a request for feedback. Raises RecordError with what to change in it."""
    body = json_object(data)
    if body is None:
        raise RecordError(f"the body is not a JSON object: expected {_EXAMPLE}")
    for field in body:
        if field not in _FIELDS:
            raise RecordError(f"unknown field {field!r:.80}; {nearest(field, _FIELDS)}")
    if "score" not in body:
        raise RecordError(f"score is missing: expected {_EXAMPLE}")
    turn, session = _text(body, "turn_id"), _text(body, "session_id")
    if (turn is None) == (session is None):
        found = "neither is there" if turn is None else "both are there"
        raise RecordError(
            "expected either turn_id, from the reply's x-nextstate-turn header, or session_id, "
            f"for the newest turn of a session; {found}"
        )
    said = Said(turn, session, body["score"], _text(body, "hint"), _text(body, "comment"))
    said.of(turn or "")  # its bounds, before any turn is looked for
    return said


def _text(body: Json, field: str) -> str | None:
    """A text that says something; None for an absent, null or blank one."""
    value = cast(object, body.get(field))
    if value is not None and not isinstance(value, str):
        raise RecordError(f"{field} = {value!r:.80}: expected a text")
    return (value or "").strip() or None
