"""Waiting for a store that cannot be used for now: locked by another process, on a full disk, …

A stage waits for as long as it takes, a command for a while. Whoever is told to stop soon gives up.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from nextstate.errors import WaitError
from nextstate.store.sqlite import is_passing

log = logging.getLogger(__name__)
T = TypeVar("T")

LIMIT_S = 10.0
_PAUSE_S = 0.1
_TELL_EVERY_S = 60.0


class Patience:
    """How long a process waits for its store; one for all of its threads."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        """`limit_s` is what one piece of work may take: `math.inf` for as long as it takes."""
        self._limit_s = limit_s
        self._end = float("inf")
        self._tell_at = 0.0

    def end(self, within_s: float) -> None:
        """From so many seconds on nobody waits any more: the process is to stop."""
        self._end = min(self._end, time.monotonic() + within_s)

    def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, a whole transaction, tried until the store lets it.

        Raises WaitError when that takes too long, and at once whatever does not pass.
        """
        give_up = time.monotonic() + self._limit_s
        while True:
            try:
                return work()
            except (SQLAlchemyError, sqlite3.Error, OSError) as error:
                if not is_passing(error):
                    raise
                if time.monotonic() >= min(give_up, self._end):
                    raise WaitError(
                        f"the store cannot be used for now: {_cause(error)}; make room on its "
                        "disk, end what locks it or make its files writable, and try again"
                    ) from error
                self.pause(error)

    def pause(self, error: Exception, what: str = "work") -> None:
        """Waits a moment; says what waits and why, but not every time."""
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + _TELL_EVERY_S
            log.warning("%s waits for the store: %s", what, _cause(error))
        time.sleep(_PAUSE_S)


def _cause(error: Exception) -> BaseException:
    """What the driver or the system said, without the statement."""
    return getattr(error, "orig", None) or error.__cause__ or error
