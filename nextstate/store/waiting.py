"""How long a process waits for a store that cannot be used for now: locked, on a full disk, ….

A stage waits as long as it takes, a command for some seconds. A process that must stop waits less.
"""

from __future__ import annotations

import logging
import time

from nextstate.errors import WaitError

log = logging.getLogger(__name__)

LIMIT_S = 10.0
_LOG_EVERY_S = 60.0


class Patience:
    """How long a process waits for its store; one for all of its threads."""

    def __init__(
        self, limit_s: float = LIMIT_S, pause_s: float = 0.1, lock_wait_s: float = 1.0
    ) -> None:
        """`limit_s` is the limit for one transaction: `math.inf` waits without end."""
        self.limit_s = limit_s
        self.pause_s = pause_s
        """The time between two attempts."""
        self.lock_wait_s = lock_wait_s
        """How long the database itself waits for a lock; between its waits ours can be stopped."""
        self._end = float("inf")
        self._log_at = 0.0

    def end(self, within_s: float) -> None:
        """Nobody waits any more after `within_s` seconds: the process must stop."""
        self._end = min(self._end, time.monotonic() + within_s)

    def give_up_at(self) -> float:
        """When a transaction that starts now has waited long enough."""
        return time.monotonic() + self.limit_s

    def is_over(self, give_up_at: float) -> bool:
        """True if a transaction must not wait any longer."""
        return time.monotonic() >= min(give_up_at, self._end)

    def pause(self, error: WaitError, what: str = "work") -> None:
        """Waits a moment. Logs what waits and why, at most once a minute."""
        now = time.monotonic()
        if now >= self._log_at:
            self._log_at = now + _LOG_EVERY_S
            cause = str(error.__cause__ or error).partition("\n")[0]
            log.warning("%s waits for the store: %s", what, cause)
        time.sleep(self.pause_s)
