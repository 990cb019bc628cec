"""How work that can wait leaves room on an engine that people's agents use.

While they use it, one piece of work is done at a time, and then rests until the work has taken no
more than its share of the time. It always goes on in the end. Without them there is no limit.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

QUIET_S = 120.0
"""Seconds without an agent's request after which the work has the engine for itself."""
LOOK_S = 1.0
"""Seconds between two looks for agents."""
LONGEST_REST_S = 60.0


class Pace:
    """Says how much work may start; see the module."""

    def __init__(
        self,
        share: float,
        agents: Callable[[], Awaitable[bool]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`agents` says whether agents use the engine now."""
        self._share = share
        self._agents = agents
        self._clock = clock
        self._agents_until = 0.0
        self._rest_until = 0.0
        self._look_at = 0.0

    @property
    def yields(self) -> bool:
        """Whether agents used the engine when it was last looked."""
        return self._clock() < self._agents_until

    async def allowed(self, wanted: int, held: int) -> int:
        """How many of the `wanted` pieces may start while `held` pieces are under way."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            if await self._agents():
                self._agents_until = now + QUIET_S
        if now >= self._agents_until:
            return wanted
        return min(wanted, 1) if not held and now >= self._rest_until else 0

    def worked(self, seconds: float) -> None:
        """Notes how long a piece of work took."""
        self._rest_until = self._clock() + rest_s(seconds, self._share)


def rest_s(worked_s: float, share: float) -> float:
    """Seconds to rest so that `worked_s` seconds of work are `share` of the time.

    >>> rest_s(0.5, 0.2), rest_s(0.5, 1.0), rest_s(1000.0, 0.5)
    (2.0, 0.0, 60.0)
    """
    return min(LONGEST_REST_S, worked_s / share - worked_s)
