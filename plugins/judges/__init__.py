"""The judges; what those without a model have in common."""

from __future__ import annotations

from collections.abc import Callable

from nextstate.hooks import Evidence
from nextstate.records import Vote


class WithoutModel:
    """A judge whose vote depends on the evidence alone."""

    deterministic = True

    def __init__(self, name: str, vote_on: Callable[[Evidence], Vote]) -> None:
        self.name = name
        self._vote_on = vote_on

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """The vote; unsure where the judge knows nothing."""
        return self._vote_on(evidence)

    async def close(self) -> None:
        """Nothing to release."""
