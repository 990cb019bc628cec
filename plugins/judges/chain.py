"""A chain of judges: each is asked in turn, and the first sure vote counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from nextstate.errors import JudgeError, PluginError
from nextstate.hooks import Evidence, JudgeKind
from nextstate.records import Vote

_KEPT = 256
"""Deterministic votes that are kept: more than a stage needs at the same time."""


class Chain:
    """Several judges as one; it owns them."""

    def __init__(self, judges: Sequence[JudgeKind]) -> None:
        self.name = ",".join(judge.name for judge in judges)
        self._judges = judges
        self._kept: dict[tuple[int, Evidence], Vote] = {}

    @property
    def deterministic(self) -> bool:
        """Whether every judge is."""
        return all(judge.deterministic for judge in self._judges)

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """The first sure vote, or the last judge's vote.

        After a JudgeError the next judge is asked. Raises the last judge's JudgeError.
        """
        *others, last = range(len(self._judges))
        for place in others:
            try:
                vote = await self._vote(place, evidence, seed)
            except JudgeError:
                continue
            if vote.sure:
                return vote
        return await self._vote(last, evidence, seed)

    async def close(self) -> None:
        """Closes every judge."""
        for judge in self._judges:
            await judge.close()

    async def _vote(self, place: int, evidence: Evidence, seed: int) -> Vote:
        """One judge's vote; a deterministic judge is asked once for each turn."""
        judge = self._judges[place]
        if not judge.deterministic:
            return _named(await judge.vote(evidence, seed), judge)
        key = (place, evidence)
        if key not in self._kept:
            self._kept[key] = _named(await judge.vote(evidence, seed), judge)
            if len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]


def _named(vote: Vote, judge: JudgeKind) -> Vote:
    return replace(vote, judge=vote.judge or judge.name)


def create(settings: object) -> JudgeKind:
    """The plugin's entry: `settings` are the judges, in order. Raises PluginError."""
    if not isinstance(settings, Sequence):
        raise PluginError(
            '[judge] kind = "chain" is not a judge: write the names with commas between them, '
            'such as kind = "rules,engine"'
        )
    return Chain(cast("Sequence[JudgeKind]", settings))
