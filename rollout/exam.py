"""Exams of candidates: held-out tasks that a candidate and its parent play before it serves.

Each task is one episode of the split `eval`, pinned to its version, with the same seed for both.
What a parent has played as a candidate is not played again. The counts go into the store as they
grow, where the learner waits for them (`nextstate/exams.py`). The names of the episodes say whose
exam they are, so a run that was killed goes on where it was; an episode that broke is tried again.
A lineage's candidates wait for exams while a run says that it holds them, and one run does so at a
time (`nextstate/store/examiners.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nextstate.episodes import SOLVED, EpisodeState, EpisodeStatus, Split
from nextstate.errors import RefusedError, StoreError
from nextstate.exams import MISSED, Exam
from nextstate.records import Json, PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.examiners import HELD_S
from nextstate.wire import write_json
from rollout.attempt import Attempt
from rollout.proxy import Opened, ProxyClient
from rollout.tasks import Task

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two looks for a candidate."""
HOLD_S = HELD_S / 4
"""Seconds after which a run says again that it holds the exams."""
_LEAVE_S = 5.0
"""How long a run that ends waits for the store."""
MOST_TRIES = 3
"""A task whose episodes have failed so often is left out."""


@dataclass(frozen=True, slots=True)
class Place:
    """One task of an exam for one version."""

    version: int
    number: int


@dataclass(frozen=True, slots=True)
class Given:
    """What a run plays in its exams, and for whom."""

    lineage: str
    holder: str
    """The run, as others are told of it; the same after a kill, so that it goes on at once."""
    environment: str
    tasks: Callable[[], Sequence[Task]]
    """The held-out tasks: always the same ones."""
    limits: Json
    """The fields of each episode that bound it, as `max_calls`."""
    deadline_s: float
    """Of an episode."""


class Exams:
    """The exam of the candidate that waits, if one does."""

    def __init__(self, given: Given, proxy: ProxyClient, store: Store) -> None:
        self._given = given
        self._proxy = proxy
        self._store = store
        self.played = 0
        """Episodes that have ended."""
        self._held_by: str | None = None
        self._holding: asyncio.Task[str] | None = None
        """The last time it says so to the store; one at a time."""
        self._look_at = 0.0
        self._candidate: PolicyVersion | None = None
        self._tasks: Sequence[Task] = ()
        self._key = ""
        """Tells exams with other tasks or limits apart."""
        self._todo: deque[Place] = deque()
        self._solved: dict[Place, bool] = {}
        self._tries: Counter[Place] = Counter()
        self._playing: set[Place] = set()
        self._changing = asyncio.Lock()
        """An exam does not begin while an outcome is noted."""

    async def hold_on(self) -> None:
        """Says again and again that this run holds the exams; it says the opposite at the end."""
        try:
            while True:
                await self._hold()
                await asyncio.sleep(HOLD_S)
        finally:
            leave = self._store.examiners.leave
            with suppress(StoreError, TimeoutError):  # then it ends by itself
                async with asyncio.timeout(_LEAVE_S):
                    if self._holding is not None:  # it may go on in its thread
                        await asyncio.wait([self._holding])
                    await asyncio.to_thread(leave, self._given.lineage, self._given.holder)

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
        async with self._changing:
            await self._ended(place, attempt)

    async def _ended(self, place: Place, attempt: Attempt) -> None:
        self._playing.discard(place)
        self.played += 1
        if self._candidate is None or place.version not in _both(self._candidate):
            return  # it waits no more
        if attempt.outcome is not None:
            self._solved[place] = attempt.outcome >= SOLVED
        elif self._tries[place] < MOST_TRIES:
            self._todo.append(place)
        await self._note(self._candidate)

    async def _hold(self) -> None:
        if self._holding is None or self._holding.done():
            hold = asyncio.to_thread(
                self._store.examiners.hold, self._given.lineage, self._given.holder
            )
            self._holding = asyncio.create_task(hold)
        held_by = await asyncio.shield(self._holding)
        if held_by not in (self._held_by, self._given.holder):
            log.warning("%s holds the exams of lineage=%s", held_by, self._given.lineage)
        self._held_by = held_by

    async def _look(self) -> None:
        if self._held_by is None:
            await self._hold()
        waits = None
        if self._held_by == self._given.holder:
            for newest in await asyncio.to_thread(
                self._store.versions.newest, self._given.lineage, 1
            ):
                waits = newest if newest.state is VersionState.CANDIDATE else None
        if waits is None:
            self._candidate = None
            self._todo.clear()
        elif self._candidate is None or waits.number != self._candidate.number:
            async with self._changing:
                await self._begin(waits)

    async def _begin(self, candidate: PolicyVersion) -> None:
        self._tasks = tasks = self._given.tasks()
        limits = self._given.limits
        given = [self._given.environment, limits, [[t.id, t.fields] for t in tasks]]
        self._key = hashlib.blake2b(write_json(given), digest_size=4).hexdigest()
        self._todo.clear()
        self._solved, self._tries = {}, Counter()
        for version in _both(candidate):
            await self._find(version)
        self._todo.extend(
            place
            for number in range(len(tasks))
            for place in (Place(version, number) for version in _both(candidate))
            if not (place in self._solved or place in self._playing)
            and self._tries[place] < MOST_TRIES
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
            elif state is EpisodeState.OPEN and place not in self._playing:
                left = Opened(f"{group}-0", state, "", "")
                await self._proxy.give_up(left, EpisodeStatus.ABORTED)

    async def _open(self, place: Place, task: Task) -> Opened:
        tries = self._tries[place] + 1
        (opened,) = await self._proxy.open_group(
            **self._given.limits,
            environment=self._given.environment,
            task=task.id,
            group=self._group(place) + (f"~{tries}" if tries > 1 else ""),
            group_size=1,
            split=Split.EVAL,
            seed=place.number,
            version=place.version,
            lineage=self._given.lineage,
            deadline_s=self._given.deadline_s,
        )
        self._tries[place] = tries
        return opened

    def _is_given_up(self, place: Place) -> bool:
        """Whether its episodes have failed too often; the last one allowed may still run."""
        failed = place not in self._solved and place not in self._playing
        return failed and self._tries[place] >= MOST_TRIES

    def _group(self, place: Place) -> str:
        return f"exam.{self._given.lineage}.{place.version}.{self._key}.{place.number}"

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
        exam = Exam.of_pairs(len(self._tasks) - left_out, pairs)
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
