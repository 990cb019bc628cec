"""Whether agents use the engine that the judge votes on.

A request that arrives during a vote waits for the engine's current step. So while agents use the
engine, the judge keeps to `[judge] share` of the time (`nextstate/pace.py`). On an engine that only
the judge uses, there is no limit.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from nextstate.errors import EngineError
from nextstate.hooks import Evidence, JudgeKind
from nextstate.records import Vote

log = logging.getLogger(__name__)


class Counted:
    """A judge that counts its votes under way, so that an agent's requests are seen beside them."""

    def __init__(self, judge: JudgeKind, live_requests: Callable[[], Awaitable[int]]) -> None:
        """`live_requests` counts the engine's requests, including the judge's own votes."""
        self.name = judge.name
        self.asking = 0
        """Votes under way."""
        self._judge = judge
        self._live_requests = live_requests
        self._trouble = ""
        """The last error of `live_requests`, so that it is logged once."""

    @property
    def deterministic(self) -> bool:
        """Whether the judge is."""
        return self._judge.deterministic

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """The judge's vote."""
        self.asking += 1
        try:
            return await self._judge.vote(evidence, seed)
        finally:
            self.asking -= 1

    async def close(self) -> None:
        """Closes the judge."""
        await self._judge.close()

    async def agents(self) -> bool:
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
