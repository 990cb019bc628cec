"""How often each key may do something: a bucket that refills."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

REQUESTS_AT_ONCE = 3000
"""Requests that a key may send at once, to one worker. Many agents may share a key."""
REQUESTS_A_MINUTE = 6000.0
"""How many it may send in each minute after that: 100 a second, for a client that runs wild."""


class Allowance:
    """How often each caller may still do something. Callers are keys, so they are few."""

    def __init__(
        self, at_once: int, a_minute: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._at_once, self._a_minute, self._clock = at_once, a_minute, clock
        self._left: dict[str, tuple[float, float]] = {}
        """(what was left, when), by caller."""

    def wait_s(self, caller: str) -> int:
        """0 if the caller may do it now, which counts it; else the seconds to wait."""
        now = self._clock()
        left, since = self._left.get(caller, (float(self._at_once), now))
        left = min(self._at_once, left + (now - since) * self._a_minute / 60)
        if left < 1:
            return math.ceil((1 - left) * 60 / self._a_minute)
        self._left[caller] = left - 1, now
        return 0
