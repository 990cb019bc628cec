"""When the learner may compute: always, while the engine is idle, or at one time of the day.

An update that has begun is finished. What waits is the next update (`window`) or the next
micro-batch (`idle`). Stopping the learner ends every wait.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from datetime import datetime
from datetime import time as time_of_day
from typing import Literal

from nextstate.errors import EngineError

log = logging.getLogger(__name__)

Kind = Literal["always", "idle", "window"]
Window = tuple[time_of_day, time_of_day]
"""The local times at which training may begin and at which it ends, on the next day if earlier."""
LiveRequests = Callable[[], int]
"""Requests that the engine runs or queues now; raises EngineError if it cannot be asked."""

_WINDOW = re.compile(r"((?:[01]\d|2[0-3]):[0-5]\d)-((?:[01]\d|2[0-3]):[0-5]\d)")
_LOOK_S = 0.5
"""Pause between two looks at a busy engine."""


def parse_schedule(text: str) -> tuple[Kind, Window | None]:
    """`always`, `idle`, or the window `22:00-07:00`; raises ValueError for anything else."""
    if text == "always" or text == "idle":
        return text, None
    found = _WINDOW.fullmatch(text)
    if found is None or found[1] == found[2]:
        raise ValueError(
            "expected always, idle, or two different times of the day, such as 22:00-07:00"
        )
    return "window", (time_of_day.fromisoformat(found[1]), time_of_day.fromisoformat(found[2]))


def contains(window: Window, moment: time_of_day) -> bool:
    """True if the time of the day is in the window; its end is not."""
    start, end = window
    if start < end:
        return start <= moment < end
    return moment >= start or moment < end


class Schedule:
    """Makes the learner wait where it must; see the module."""

    def __init__(
        self,
        kind: Kind,
        wait: Callable[[float], bool],
        *,
        window: Window | None = None,
        live_requests: LiveRequests | None = None,
        patience_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        local_time: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`wait` sleeps for some seconds or until the learner must stop; True if it must.

        `idle` needs `live_requests`, `window` needs `window`.
        """
        self._kind = kind
        self._wait = wait
        self._window = window
        self._live_requests = live_requests
        self._patience_s = patience_s
        self._clock = clock
        self._local_time = local_time
        self._announced = False
        """Whether it was said that training waits for its window."""
        self._trouble: str | None = None
        """Why the engine could not be asked the last time."""

    def may_update(self) -> bool:
        """Whether an update may begin now."""
        if self._window is None:
            return True
        is_open = contains(self._window, self._local_time().time())
        if not is_open and not self._announced:
            log.info("training waits for its window until=%s", self._window[0])
        self._announced = not is_open
        return is_open

    def before_pass(self) -> None:
        """Returns once the engine is idle, the patience is over or the learner must stop."""
        if self._kind != "idle":
            return
        until = self._clock() + self._patience_s
        while self._busy():
            remaining_s = until - self._clock()
            if remaining_s <= 0 or self._wait(min(remaining_s, _LOOK_S)):
                return

    def _busy(self) -> bool:
        """True if the engine has requests, or does not answer: it starts or is overloaded."""
        assert self._live_requests is not None
        try:
            live = self._live_requests()
        except EngineError as error:
            if str(error) != self._trouble:
                log.warning("training cannot see whether the engine is idle: %s", error)
            self._trouble = str(error)
            return True
        self._trouble = None
        return live > 0
