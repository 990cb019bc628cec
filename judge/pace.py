"""How the judge makes room for agents where it votes on the very engine that serves them.

A vote under way cannot be hurried, and a prompt that arrives meanwhile waits for the engine's step
that it runs in. So while agents use the engine, turns are judged one at a time, and after each the
judge rests until its votes have taken no more than their `share` of the time. It never starves, and
on an engine that only the judge uses nothing is held back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from nextstate.errors import EngineError
from nextstate.hooks import Evidence, JudgeKind
from nextstate.records import Vote

log = logging.getLogger(__name__)

QUIET_S = 120.0
"""So long after the last sign of an agent the engine counts as the judge's own."""
LOOK_S = 1.0
"""Between two looks at the engine."""
LONGEST_REST_S = 60.0


class Pace:
    """Says how many turns may be taken up; see the module."""

    def __init__(
        self,
        share: float,
        live_requests: Callable[[], Awaitable[int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`live_requests` counts the engine's requests, the judge's own votes among them."""
        self.asking = 0
        """Votes under way."""
        self._share = share
        self._live_requests = live_requests
        self._clock = clock
        self._agents_until = 0.0
        self._rest_until = 0.0
        self._look_at = 0.0
        self._trouble = ""
        """Why the engine could not be asked the last time."""

    async def allowed(self, wanted: int, held: int) -> int:
        """How many of the `wanted` turns may be taken up while `held` are being judged."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            if await self._agents():
                self._agents_until = now + QUIET_S
        if now >= self._agents_until:
            return wanted
        return min(wanted, 1) if not held and now >= self._rest_until else 0

    def judged(self, seconds: float) -> None:
        """Notes that the votes on a turn took so long."""
        self._rest_until = self._clock() + rest_s(seconds, self._share)

    async def _agents(self) -> bool:
        """Whether agents use the engine; one that cannot say so is taken to be the judge's own."""
        before = self.asking
        try:
            # A vote begins here before it does there, and ends there before it does here.
            return await self._live_requests() > max(before, self.asking)
        except EngineError as error:
            if str(error) != self._trouble:
                log.warning("the judge cannot see agents, and holds nothing back: %s", error)
            self._trouble = str(error)
            return False


class Counted:
    """A judge whose votes under way are known to a pace."""

    def __init__(self, judge: JudgeKind, pace: Pace) -> None:
        self.name = judge.name
        self.deterministic = judge.deterministic
        self._judge = judge
        self._pace = pace

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """The judge's vote."""
        self._pace.asking += 1
        try:
            return await self._judge.vote(evidence, seed)
        finally:
            self._pace.asking -= 1

    async def close(self) -> None:
        """Closes the judge."""
        await self._judge.close()


def rest_s(worked_s: float, share: float) -> float:
    """The rest after which work of `worked_s` has taken `share` of the time.

    >>> rest_s(0.5, 0.2), rest_s(0.5, 1.0), rest_s(1000.0, 0.5)
    (2.0, 0.0, 60.0)
    """
    return min(LONGEST_REST_S, worked_s / share - worked_s)
