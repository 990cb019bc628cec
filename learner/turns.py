"""Several lineages that take turns at one trainer.

The base stands in memory once. A lineage's adapter, with all that its next step depends on, is in
the trainer while the lineage trains, and waits on the CPU while another does. A turn is one look at
the lineage and at most one update, then the next lineage has its turn: none can starve another, and
one with nothing to train costs a look into the store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

from learner.trainer import Parked, Update
from nextstate.errors import LearnerError

log = logging.getLogger(__name__)

_REST_S = 600.0
"""For which a lineage that must not go on is left alone; each further time twice as long."""
_LONGEST_REST_S = 6 * 3600.0


class Trainer(Protocol):
    """What a seat needs of a trainer."""

    def parked(self) -> Parked:
        """A copy of all that the next step depends on."""
        ...

    def unpark(self, parked: Parked, /) -> None:
        """Goes on from such a copy."""
        ...


class Seat:
    """The place in the trainer, which one lineage has at a time.

    A lineage that has never had it begins with what the trainer held at first, as if it were alone.
    """

    def __init__(self, trainer: Trainer, lineages: Sequence[str]) -> None:
        self._trainer = trainer
        self._holder = lineages[0] if len(lineages) == 1 else None
        """Whose state the trainer holds: a lineage that is alone never gives its seat away."""
        self._parked: dict[str, Parked] = {}
        self._fresh: Parked | None = None

    def take(self, lineage: str) -> None:
        """From now on the trainer holds this lineage's state; only once training has begun."""
        if lineage == self._holder:
            return
        if self._fresh is None:
            self._fresh = self._trainer.parked()
        if self._holder is not None:
            self._parked[self._holder] = self._trainer.parked()
        self._trainer.unpark(self._parked.pop(lineage, self._fresh))
        self._holder = lineage

    def give_up(self, lineage: str) -> None:
        """Forgets the lineage's state, which may be in the middle of a step."""
        self._parked.pop(lineage, None)
        if self._holder == lineage:
            self._holder = None


class Learner(Protocol):
    """One lineage's side of the stage."""

    @property
    def lineage(self) -> str:
        """Its name."""
        ...

    def resume(self) -> None:
        """Goes on from where the last process ended; before the first turn."""
        ...

    def turn(self) -> Generator[Update, None, bool]:
        """At most one update, and whether there was one; what follows the yield is after its step.

        Raises LearnerError when the lineage must not go on.
        """
        ...

    def recover(self) -> object:
        """Makes the samples ready again that it has leased and not trained."""
        ...


class Turns:
    """Gives each learner its turn, round and round."""

    def __init__(
        self,
        learners: Sequence[Learner],
        seat: Seat,
        before_turn: Callable[[], None],
        stop: threading.Event,
        poll_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`before_turn` returns once an update may begin; after a round without one comes a pause.

        The pause is `poll_s` seconds.
        """
        self._clock = clock
        self._resting: list[tuple[float, Learner]] = []
        """Those that must not go on, each with the time at which it is tried again."""
        self._rests_s: dict[str, float] = {}
        self._seat = seat
        self._before_turn = before_turn
        self._stop = stop
        self._poll_s = poll_s
        self._waiting = deque(learners)
        """In the order of their turns."""
        self._to_resume = deque(learners)
        self._acting = learners[0]
        """Whose code runs, or whose step."""

    @property
    def acting(self) -> str:
        """The lineage whose code runs, or whose step."""
        return self._acting.lineage

    def updates(self) -> Iterator[Update]:
        """The learners' updates, until told to stop; after `drop`, those of the others."""
        without_update = 0
        while not self._stop.is_set():
            self._resume()
            self._before_turn()
            if self._stop.is_set():
                return
            self._acting = self._waiting[0]
            self._waiting.rotate(-1)
            trained = yield from self._acting.turn()
            without_update = 0 if trained else without_update + 1
            if without_update >= len(self._waiting):
                without_update = 0
                self._stop.wait(self._poll_s)

    def _resume(self) -> None:
        """Has those go on that have not yet, or have rested."""
        now = self._clock()
        rested = [learner for until, learner in self._resting if until <= now]
        self._resting = [(until, learner) for until, learner in self._resting if until > now]
        self._waiting.extend(rested)
        self._to_resume.extend(rested)
        while self._to_resume:
            self._acting = self._to_resume.popleft()
            self._acting.resume()

    def drop(self, error: LearnerError) -> None:
        """Leaves the lineage alone whose turn ended with `error`, for some time.

        Raises it where no other lineage is left.
        """
        dropped = self._acting
        self._waiting.remove(dropped)
        self._seat.give_up(dropped.lineage)
        if not self._waiting:
            dropped.recover()
            raise error
        rest_s = self._rests_s.get(dropped.lineage, _REST_S)
        self._rests_s[dropped.lineage] = min(2 * rest_s, _LONGEST_REST_S)
        self._resting.append((self._clock() + rest_s, dropped))
        log.error(
            "training stopped lineage=%s: %s; the other lineages go on. It is left alone for %.0f "
            "min; before that, the next start of the learner tries this one again",
            dropped.lineage,
            error,
            rest_s / 60,
        )
        try:
            dropped.recover()
        except LearnerError as also:
            log.error("samples stay leased for now lineage=%s: %s", dropped.lineage, also)
