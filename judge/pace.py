"""How the judge leaves room for agents when it votes on the engine that serves them.

A request that arrives during a vote waits for the engine's current step. So while agents use the
engine, the judge takes one turn at a time and then rests until its votes have used no more than
`[judge] share` of the time. It always goes on in the end. On an engine that only the judge uses,
there is no limit.
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
"""Seconds without an agent's request after which the judge has the engine for itself."""
LOOK_S = 1.0
"""Seconds between two looks at the engine."""
LONGEST_REST_S = 60.0


class Pace:
    """Says how many turns the judge may start; see the module."""

    def __init__(
        self,
        share: float,
        live_requests: Callable[[], Awaitable[int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`live_requests` counts the engine's requests, including the judge's own votes."""
        self.asking = 0
        """Votes under way."""
        self._share = share
        self._live_requests = live_requests
        self._clock = clock
        self._agents_until = 0.0
        self._rest_until = 0.0
        self._look_at = 0.0
        self._trouble = ""
        """The last error of `live_requests`, so that it is logged once."""

    async def allowed(self, wanted: int, held: int) -> int:
        """How many of the `wanted` turns may start while `held` turns are being judged."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            if await self._agents():
                self._agents_until = now + QUIET_S
        if now >= self._agents_until:
            return wanted
        return min(wanted, 1) if not held and now >= self._rest_until else 0

    def judged(self, seconds: float) -> None:
        """Notes how long the votes on a turn took."""
        self._rest_until = self._clock() + rest_s(seconds, self._share)

    async def _agents(self) -> bool:
        """Whether agents use the engine; an engine that cannot tell counts as unused."""
        before = self.asking
        try:
            # A vote begins here before the engine counts it, and ends here after the engine has.
            return await self._live_requests() > max(before, self.asking)
        except EngineError as error:
            if str(error) != self._trouble:
                log.warning(
                    "the judge cannot see agents, so it does not slow down for them: %s", error
                )
            self._trouble = str(error)
            return False


class Counted:
    """A judge that counts its votes under way in a `Pace`."""

    def __init__(self, judge: JudgeKind, pace: Pace) -> None:
        self.name = judge.name
        self._judge = judge
        self._pace = pace

    @property
    def deterministic(self) -> bool:
        """Whether the judge is."""
        return self._judge.deterministic

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
    """Seconds to rest so that `worked_s` seconds of work are `share` of the time.

    >>> rest_s(0.5, 0.2), rest_s(0.5, 1.0), rest_s(1000.0, 0.5)
    (2.0, 0.0, 60.0)
    """
    return min(LONGEST_REST_S, worked_s / share - worked_s)
