"""Exams of candidates: held-out tasks that a candidate and its parent play before it serves.

Each task is one episode of the split `eval`, pinned to its version, with the same seed for both.
What a parent has played as a candidate is not played again. The counts go into the store as they
grow, where the learner waits for them (`nextstate/exams.py`). The names of the episodes say whose
exam they are, so a run that was killed goes on where it was; an episode that broke is tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from nextstate.episodes import EpisodeState, EpisodeStatus, Split
from nextstate.errors import RefusedError
from nextstate.exams import MISSED, Exam
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.wire import write_json
from rollout.attempt import Attempt
from rollout.config import RolloutConfig
from rollout.proxy import Opened, ProxyClient
from rollout.runner import SOLVED
from rollout.sources import Source
from rollout.tasks import Task

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two looks for a candidate."""
MOST_TRIES = 3
"""A task whose episodes have failed so often is left out."""


@dataclass(frozen=True, slots=True)
class Place:
    """One task of an exam for one version."""

    version: int
    number: int


class Exams:
    """The exam of the candidate that waits, if one does."""

    def __init__(
        self, config: RolloutConfig, source: Source, proxy: ProxyClient, store: Store
    ) -> None:
        self._config = config
        self._source = source
        self._proxy = proxy
        self._store = store
        self._look_at = 0.0
        self._candidate: PolicyVersion | None = None
        self._tasks: Sequence[Task] = ()
        self._key = ""
        """Tells exams with other tasks or limits apart."""
        self._todo: deque[Place] = deque()
        self._solved: dict[Place, bool] = {}
        self._tries: Counter[Place] = Counter()
        self._playing: set[Place] = set()

    async def next(self) -> tuple[Place, Opened, Task] | None:
        """The next episode, opened; None if there is none to play now. Raises RolloutError."""
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_S
            await self._look()
        if not self._todo:
            return None
        place = self._todo[0]
        task = self._tasks[place.number]
        try:
            opened = await self._open(place, task)
        except RefusedError as error:
            if error.status >= 500:
                raise
            await self._miss(str(error))
            return None
        self._todo.popleft()
        self._playing.add(place)
        return place, opened, task

    async def ended(self, place: Place, attempt: Attempt) -> None:
        """Notes an outcome; an episode without one is tried again."""
        self._playing.discard(place)
        if self._candidate is None or place.version not in _both(self._candidate):
            return  # it waits no more
        if attempt.outcome is not None:
            self._solved[place] = attempt.outcome >= SOLVED
        elif self._tries[place] < MOST_TRIES:
            self._todo.append(place)
        await self._note(self._candidate)

    async def _look(self) -> None:
        lineage = self._config.lineage
        newest = await asyncio.to_thread(self._store.versions.newest, lineage, 1)
        waits = [version for version in newest if version.state is VersionState.CANDIDATE]
        known = self._candidate.number if self._candidate else None
        if not waits:
            self._candidate = None
            self._todo.clear()
        elif waits[0].number != known:
            await self._begin(waits[0])

    async def _begin(self, candidate: PolicyVersion) -> None:
        tasks = self._source.held_out(self._config.exam_tasks)
        given = [self._config.name, self._config.max_calls, [[t.id, t.fields] for t in tasks]]
        self._tasks = tasks
        self._key = hashlib.blake2b(write_json(given), digest_size=4).hexdigest()
        self._todo.clear()
        self._solved, self._tries = {}, Counter()
        for version in _both(candidate):
            await self._find(version)
        self._todo.extend(
            place
            for number in range(len(tasks))
            for place in (Place(version, number) for version in _both(candidate))
            if place not in self._solved and self._tries[place] < MOST_TRIES
        )
        self._candidate = candidate
        log.info("exam version=%d episodes=%d", candidate.number, len(self._todo))
        await self._note(candidate)

    async def _find(self, version: int) -> None:
        """What a version has played; what a killed run left open is aborted."""
        beginning = self._group(Place(version, 0))[:-1]
        for group, state, outcome in await asyncio.to_thread(
            self._store.groups.attempts, beginning
        ):
            number = group.removeprefix(beginning).partition("~")[0]
            if not number.isdecimal():  # not one of ours
                continue
            place = Place(version, int(number))
            self._tries[place] += 1
            if outcome is not None:
                self._solved[place] = outcome >= SOLVED
            elif state is EpisodeState.OPEN:
                left = Opened(f"{group}-0", state, "", "")
                await self._proxy.give_up(left, EpisodeStatus.ABORTED)

    async def _open(self, place: Place, task: Task) -> Opened:
        tries = self._tries[place] + 1
        (opened,) = await self._proxy.open_group(
            environment=self._config.name,
            task=task.id,
            group=self._group(place) + (f"~{tries}" if tries > 1 else ""),
            group_size=1,
            split=Split.EVAL,
            seed=place.number,
            version=place.version,
            lineage=self._config.lineage,
            max_calls=self._config.max_calls,
            deadline_s=self._config.deadline_s,
        )
        self._tries[place] = tries
        return opened

    def _is_given_up(self, place: Place) -> bool:
        """Whether its episodes have failed too often; the last one allowed may still run."""
        failed = place not in self._solved and place not in self._playing
        return failed and self._tries[place] >= MOST_TRIES

    def _group(self, place: Place) -> str:
        return f"exam.{self._config.lineage}.{place.version}.{self._key}.{place.number}"

    async def _note(self, candidate: PolicyVersion) -> None:
        """Writes the counts so far into the store."""
        ours, parents = _both(candidate)
        pairs: list[tuple[bool, bool]] = []
        left_out = 0
        for number in range(len(self._tasks)):
            places = Place(ours, number), Place(parents, number)
            found = [self._solved.get(place) for place in places]
            if found[0] is not None and found[1] is not None:
                pairs.append((found[0], found[1]))
            else:
                left_out += any(map(self._is_given_up, places))
        exam = Exam(
            planned=len(self._tasks) - left_out,
            tasks=len(pairs),
            solved=sum(solved for solved, _ in pairs),
            gained=pairs.count((True, False)),
            lost=pairs.count((False, True)),
        )
        note = self._store.versions.note
        await asyncio.to_thread(note, candidate.lineage, candidate.number, exam.metrics())
        if not exam.planned:
            await self._miss("there are no held-out tasks, or all their episodes failed")

    async def _miss(self, why: str) -> None:
        """Gives the exam up: the candidate need not wait."""
        if (candidate := self._candidate) is None:
            return
        self._todo.clear()
        log.warning("version=%d has no whole exam: %s", candidate.number, why)
        note = self._store.versions.note
        await asyncio.to_thread(note, candidate.lineage, candidate.number, {MISSED: 1.0})


def _both(candidate: PolicyVersion) -> tuple[int, int]:
    return candidate.number, candidate.parent or 0
