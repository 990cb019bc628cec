"""The endless run of `[rollout]`, which `nextstate up` keeps running beside judge and learner.

It plays groups of episodes, one after the other, up to `parallel` episodes at once. Group number N
has task N and seed N, and its name holds N, so after a kill the run goes on with the next number.
Episodes that were half are aborted, and others take their places in their groups; those that had
not begun are played. While a candidate waits to serve, its exam goes first (`rollout/exam.py`).
While people use the engine, one episode is played at a time, in a share of the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nextstate.episodes import EpisodeState, EpisodeStatus, Split
from nextstate.errors import NextStateError, RefusedError, RolloutError
from nextstate.hooks import EnvironmentKind
from nextstate.pace import Pace
from nextstate.store import Store
from rollout.attempt import Attempt
from rollout.config import RolloutConfig
from rollout.exam import Exams, Given, Place
from rollout.pictures import Pictures
from rollout.player import Here, Player
from rollout.progress import WRITE_EVERY_S, Progress
from rollout.proxy import Opened, ProxyClient
from rollout.runner import MOST_TRIES, REST_S
from rollout.sources import Source
from rollout.tasks import Task

log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""Seconds before a proxy that is away is asked again."""
_DIGITS = 9
"""Of the number in a group's name."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """An episode that is to be played."""

    opened: Opened
    task: Task
    seed: int
    """Of a training episode also the number of its group."""
    place: Place | None = None
    """In an exam."""


async def run(
    config: RolloutConfig,
    kind: EnvironmentKind,
    source: Source,
    proxy: ProxyClient,
    store: Store,
    folder: Path,
    stop: asyncio.Event,
    player: Player | None = None,
) -> None:
    """Plays until `stop`; `player` says where, by default in this process.

    Raises RolloutError if so many episodes failed in a row that neither tasks nor policy are the
    cause: two for each place.
    """
    pictures = Pictures(store.dir / "pictures")
    player = player or Here(kind, proxy, config.max_calls, config.deadline_s, pictures)
    stage = _Stage(config, player, source, proxy, store)
    try:
        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(stage.work()) for _ in range(config.parallel)]
            made.append(tasks.create_task(_report(stage.progress, folder)))
            made.append(tasks.create_task(stage.exams.hold_on()))
            await stop.wait()
            for task in made:
                task.cancel()
    except* NextStateError as errors:
        raise errors.exceptions[0] from None
    finally:
        stage.progress.write(folder)
        await player.release()


async def _report(progress: Progress, folder: Path) -> None:
    while True:
        progress.write(folder)
        await asyncio.sleep(WRITE_EVERY_S)


class _Stage:
    def __init__(
        self,
        config: RolloutConfig,
        player: Player,
        source: Source,
        proxy: ProxyClient,
        store: Store,
    ) -> None:
        self.progress = Progress(config.name, time.time())
        self._config = config
        self._player = player
        self._source = source
        self._proxy = proxy
        self._store = store
        given = Given(
            lineage=config.lineage,
            holder="nextstate rollout",
            environment=config.name,
            tasks=partial(source.held_out, config.exam_tasks),
            limits={"max_calls": config.max_calls},
            deadline_s=config.deadline_s,
        )
        self.exams = Exams(given, proxy, store)
        self._pace = Pace(config.share, proxy.people)
        self._taking = asyncio.Lock()
        self._training = self._groups()
        self._again: deque[Chosen] = deque()
        """Episodes that were lost; others are to take their places."""
        self._last: deque[Attempt] = deque(maxlen=2 * config.parallel)
        self._beginning = f"train.{config.lineage}.{config.name}."
        self._trouble = ""

    async def work(self) -> None:
        """Plays one episode after the other."""
        while True:
            async with self._taking:
                chosen = await self._take()
                self.progress.playing += 1
            began = time.monotonic()
            try:
                attempt = await self._player.play(chosen.opened, chosen.task, chosen.seed)
            finally:
                self.progress.playing -= 1
                self._pace.worked(time.monotonic() - began)
            self.progress.ended(attempt, exam=chosen.place is not None)
            if chosen.place is not None:
                await self.exams.ended(chosen.place, attempt)
            elif attempt.status in (EpisodeStatus.FAILED, EpisodeStatus.ABORTED):
                self._again.append(chosen)
            self._check(attempt)

    def _check(self, attempt: Attempt) -> None:
        self._last.append(attempt)
        failed = [one.status is EpisodeStatus.FAILED for one in self._last]
        if len(failed) == self._last.maxlen and all(failed):
            raise RolloutError(f"the last {len(failed)} episodes failed: {attempt.reason}")

    async def _take(self) -> Chosen:
        """The next episode, once it may begin."""
        while True:
            allowed = await self._patiently(self._pace.allowed, 1, self.progress.playing)
            self.progress.yields = self._pace.yields
            if not allowed:
                await asyncio.sleep(REST_S)
                continue
            exam = await self._patiently(self.exams.next)
            if exam is not None:
                place, opened, task = exam
                return Chosen(opened, task, place.number, place)
            while self._again:
                if (
                    found := await self._patiently(self._another, self._again.popleft())
                ) is not None:
                    return found
            return await anext(self._training)

    async def _patiently(self, ask: Callable[..., Awaitable[Any]], *given: Any) -> Any:
        """What the proxy answers, as soon as there is one that does. Raises RefusedError."""
        while True:
            try:
                found = await ask(*given)
            except RefusedError as error:
                if error.status < 500:
                    raise
                trouble = str(error)
            except RolloutError as error:
                trouble = str(error)
            else:
                self._trouble = ""
                return found
            if trouble != self._trouble:
                log.warning("waiting for the proxy: %s", trouble)
            self._trouble = trouble
            await asyncio.sleep(AGAIN_S)

    async def _groups(self) -> AsyncGenerator[Chosen]:
        """The episodes of all groups: first of those that a killed run left, then of new ones."""
        groups, beginning = self._store.groups, self._beginning
        for name in await asyncio.to_thread(groups.unfinished, beginning):
            number = name.removeprefix(beginning)
            if len(number) == _DIGITS and number.isdecimal():  # others may begin so too
                async for chosen in self._left(int(number)):
                    yield chosen
        last = await asyncio.to_thread(groups.last, beginning, _DIGITS)
        number = 0 if last is None else int(last.removeprefix(beginning)) + 1
        while True:
            task = self._source.training(number)
            for opened in await self._patiently(self._open, number, task):
                yield Chosen(opened, task, number)
            number += 1

    async def _left(self, number: int) -> AsyncGenerator[Chosen]:
        """What a killed run left of a group: what has begun is aborted and replaced."""
        task = self._source.training(number)
        members = await asyncio.to_thread(self._store.groups.open_members, self._group(number))
        for name in members:
            try:
                opened = await self._patiently(self._open_one, name, number, task)
            except RefusedError as error:  # the tasks or the configuration have changed
                log.warning("group %d is not finished: %s", number, error)
                return
            if opened.state is not EpisodeState.OPEN:
                continue
            chosen = Chosen(opened, task, number)
            if await self._patiently(self._proxy.can_begin, opened, self._config.deadline_s):
                yield chosen
            else:
                self._again.append(chosen)

    async def _another(self, lost: Chosen) -> Chosen | None:
        """An episode in the place of one that was lost; None if its group needs no more."""
        name, _, tries = lost.opened.episode.partition("~")
        if int(tries or 1) >= MOST_TRIES:
            return None
        # If the proxy was away when it ended, it is open still and holds its place.
        await self._proxy.give_up(lost.opened, EpisodeStatus.FAILED)
        try:
            again = f"{name}~{int(tries or 1) + 1}"
            opened = await self._open_one(again, lost.seed, lost.task)
        except RefusedError as error:
            if error.status >= 500:
                raise
            log.info("no episode in the place of %s: %s", lost.opened.episode, error)
            return None
        return Chosen(opened, lost.task, lost.seed)

    async def _open(self, number: int, task: Task) -> list[Opened]:
        return await self._proxy.open_group(**self._asked(number, task))

    async def _open_one(self, name: str, number: int, task: Task) -> Opened:
        return await self._proxy.open_episode(episode=name, **self._asked(number, task))

    def _group(self, number: int) -> str:
        return f"{self._beginning}{number:0{_DIGITS}d}"

    def _asked(self, number: int, task: Task) -> dict[str, Any]:
        config = self._config
        return {
            "environment": config.name,
            "task": task.id,
            "group": self._group(number),
            "group_size": config.group_size,
            "split": Split.TRAIN,
            "seed": number,
            "lineage": config.lineage,
            "max_calls": config.max_calls,
            "deadline_s": config.open_s,
        }
