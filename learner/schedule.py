"""When the learner may compute: always, while the engine is idle, or in windows of the day.

An update that has begun is finished; what waits is the next update (`window`) or the next
micro-batch (`idle`). Whoever ends the learner ends every wait.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from datetime import time as time_of_day
from typing import Literal

from nextstate.errors import EngineError

log = logging.getLogger(__name__)

Kind = Literal["always", "idle", "window"]
LiveRequests = Callable[[], int]
"""Requests that the engine runs or has waiting now; raises EngineError if it cannot be asked."""

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = "|".join(_DAYS)
_WINDOW = re.compile(
    rf"(?:(?P<first>{_DAY})(?:-(?P<last>{_DAY}))? )?"
    r"(?P<start>\d\d:\d\d)-(?P<end>\d\d:\d\d)"
)
_MINUTES_A_DAY = 24 * 60
_LOOK_S = 0.5
"""Pause between two looks at a busy engine."""
_LONGEST_WAIT_S = 60.0
"""A wait for a window looks at the clock at least this often: it may be set or change its zone."""


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of local time on some days of the week."""

    start: int
    """Minute of the day at which it begins, from 0 to 1439."""
    end: int
    """Minute at which it is over, from 1 to 1440; at most `start` means on the next day."""
    days: frozenset[int]
    """Days on which it begins, Monday is 0."""

    def contains(self, moment: datetime) -> bool:
        """Whether the local time `moment` lies in the window; its end does not."""
        minute = moment.hour * 60 + moment.minute
        if self.start < self.end:
            return moment.weekday() in self.days and self.start <= minute < self.end
        began_today = moment.weekday() in self.days and minute >= self.start
        began_yesterday = (moment.weekday() - 1) % 7 in self.days and minute < self.end
        return began_today or began_yesterday


def parse_windows(text: str) -> tuple[Window, ...]:
    """Windows as `22:00-07:00` or `sat-sun 00:00-24:00`, several with commas between them.

    Days are those on which a window begins; without them it is every day. Raises ValueError that
    says what is wrong.
    """
    return tuple(_parse_window(part.strip()) for part in text.split(","))


def next_opening(windows: Sequence[Window], moment: datetime) -> datetime:
    """The first local time from `moment` on that lies in a window."""
    if any(window.contains(moment) for window in windows):
        return moment
    midnight = datetime.combine(moment.date(), time_of_day())
    starts = (
        midnight + timedelta(days=ahead, minutes=window.start)
        for ahead in range(8)
        for window in windows
        if (moment.weekday() + ahead) % 7 in window.days
    )
    return min(start for start in starts if start > moment)


class Schedule:
    """Makes the learner wait where it has to; see the module."""

    def __init__(
        self,
        kind: Kind,
        wait: Callable[[float], bool],
        *,
        windows: Sequence[Window] = (),
        live_requests: LiveRequests | None = None,
        patience_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        local_time: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`wait` sleeps that many seconds or until the learner must end, and says whether it must.

        `idle` needs `live_requests`, `window` at least one of `windows`.
        """
        self._kind = kind
        self._wait = wait
        self._windows = windows
        self._live_requests = live_requests
        self._patience_s = patience_s
        self._clock = clock
        self._local_time = local_time
        self._trouble: str | None = None
        """Why the engine could not be asked the last time."""

    def before_update(self) -> None:
        """Returns once an update may begin, or the learner must end."""
        if self._kind != "window":
            return
        announced = False
        while True:
            now = self._local_time()
            opening = next_opening(self._windows, now)
            if opening == now:
                return
            if not announced:
                log.info(
                    "training waits for its window until=%s", opening.isoformat(" ", "minutes")
                )
                announced = True
            if self._wait(min((opening - now).total_seconds(), _LONGEST_WAIT_S)):
                return

    def before_micro_batch(self) -> None:
        """Returns once the engine serves nothing, its patience is over, or the learner must end."""
        if self._kind != "idle":
            return
        until = self._clock() + self._patience_s
        while self._busy():
            remaining_s = until - self._clock()
            if remaining_s <= 0 or self._wait(min(remaining_s, _LOOK_S)):
                return

    def _busy(self) -> bool:
        """Whether the engine serves; one that does not say so starts or is overloaded."""
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


def _parse_window(text: str) -> Window:
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not like '22:00-07:00' or 'sat-sun 00:00-24:00'")
    start, end = _minute(found["start"]), _minute(found["end"])
    if start == _MINUTES_A_DAY or end == 0:
        raise ValueError(f"{text!r}: a day begins at 00:00 and ends at 24:00")
    if start == end:
        raise ValueError(f"{text!r} is empty; the whole day is 00:00-24:00")
    if found["first"] is None:
        return Window(start, end, frozenset(range(7)))
    first = _DAYS.index(found["first"])
    last = _DAYS.index(found["last"] or found["first"])
    return Window(start, end, frozenset((first + n) % 7 for n in range((last - first) % 7 + 1)))


def _minute(text: str) -> int:
    hour, minute = map(int, text.split(":"))
    if minute > 59 or hour * 60 + minute > _MINUTES_A_DAY:
        raise ValueError(f"{text!r} is not a time of day")
    return hour * 60 + minute
