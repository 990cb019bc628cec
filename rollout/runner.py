"""Many episodes at once, up to a bound; groups are opened as places become free."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass

from nextstate.agreement import proportion_interval
from nextstate.episodes import SOLVED, EpisodeState, EpisodeStatus, family_of
from nextstate.errors import NextStateError, RefusedError, RolloutError
from nextstate.hooks import EnvironmentKind
from nextstate.pace import Pace
from nextstate.records import Json
from rollout.attempt import Attempt
from rollout.config import open_s
from rollout.exam import Exams
from rollout.pictures import Pictures
from rollout.player import Here, Player
from rollout.proxy import Opened, ProxyClient
from rollout.tasks import Task

log = logging.getLogger(__name__)

MOST_TRIES = 3
"""Episodes for one place of a group."""
REST_S = 0.2
"""Seconds between two looks whether the next episode may begin, or whether there is one."""
_MOST_FAMILIES = 20
"""More are not shown one by one: then the ids have no families."""


_BROKEN = (EpisodeStatus.FAILED, EpisodeStatus.ABORTED)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the episodes of a run are played."""

    environment: str
    """Its name."""
    parallel: int = 8
    """Episodes at once."""
    group_size: int = 4
    """Attempts at each task."""
    seed: int = 0
    """The seed of the first task's group; the next one's is one more."""
    max_calls: int = 10
    max_tokens: int | None = None
    """Of all replies of an episode. None: only the engine's context bounds them; vLLM refuses a
    number that is larger than its context."""
    deadline_s: float = 600.0
    """Of an episode, from its first step."""
    name: str | None = None
    """Of the run: one of the same name goes on with it. None: it is a new one."""
    lineage: str | None = None
    """None: the one of the key."""
    version: int | None = None
    """None: the version that serves."""
    sampling: Json | None = None
    """What takes the place of an agent's own sampling settings, or leaves them out."""

    @property
    def open_s(self) -> float:
        """The deadline of a group: its episodes may have to wait for places after each other."""
        return open_s(self.deadline_s, self.group_size, self.parallel)


async def run(
    plan: Plan,
    tasks: Iterable[Task],
    kind: EnvironmentKind,
    proxy: ProxyClient,
    told: Callable[[Attempt], None],
    pictures: Pictures | None = None,
    player: Player | None = None,
    pace: Pace | None = None,
    exams: Exams | None = None,
) -> list[Attempt]:
    """Plays every task's group once; `told` gets each episode as it ends, in no order.

    `player` says where, by default in this process, and `pace` when the next one may begin. An
    episode that the player lost is aborted, and another takes its place in the group. While a
    candidate waits for one of the `exams`, that goes first; `told` does not get its episodes.

    Raises RolloutError if the proxy opens no group, or if so many episodes failed in a row that
    it is not the tasks' fault: two for each place.
    """
    attempts: list[Attempt] = []
    queue = _episodes(plan, tasks, proxy)
    player = player or Here(kind, proxy, plan.max_calls, plan.deadline_s, pictures)
    taking = asyncio.Lock()

    playing = 0

    async def play(opened: Opened, task: Task, seed: int) -> Attempt:
        began = time.monotonic()
        attempt = await player.play(opened, task, seed)
        if pace is not None:
            pace.worked(time.monotonic() - began)
        return attempt

    async def play_all_tries(opened: Opened, task: Task, seed: int) -> Attempt:
        while True:
            attempt = await play(opened, task, seed)
            if attempt.status is not EpisodeStatus.ABORTED:
                return attempt
            if (another := await _another(plan, opened, task, seed, proxy)) is None:
                return attempt
            opened = another

    async def work() -> None:
        nonlocal playing
        while True:
            async with taking:
                while pace is not None and not await pace.allowed(1, playing):
                    await asyncio.sleep(REST_S)
                exam = await exams.next() if exams else None
                found = None if exam else await anext(queue, None)
                if exam or found:
                    playing += 1
            if exam is None and found is None:
                if exams is None or not playing:
                    return
                await asyncio.sleep(REST_S)  # a candidate may come of what is played
                continue
            try:
                if exams and exam:
                    place, opened, task = exam
                    await exams.ended(place, await play(opened, task, place.number))
                    continue
                assert found is not None
                attempt = await play_all_tries(*found)
            finally:
                playing -= 1
            attempts.append(attempt)
            told(attempt)
            last = attempts[-2 * plan.parallel :]
            if len(last) == 2 * plan.parallel and all(one.status in _BROKEN for one in last):
                raise RolloutError(f"the last {len(last)} episodes failed: {attempt.reason}")

    try:
        async with asyncio.TaskGroup() as made:
            holding = made.create_task(exams.hold_on()) if exams else None
            await asyncio.wait([made.create_task(work()) for _ in range(plan.parallel)])
            if holding is not None:
                holding.cancel()
    except* NextStateError as errors:
        raise errors.exceptions[0] from None
    finally:
        await queue.aclose()
        await player.release()
    return attempts


async def _episodes(
    plan: Plan, tasks: Iterable[Task], proxy: ProxyClient
) -> AsyncGenerator[tuple[Opened, Task, int]]:
    """(episode, task, seed) one after the other; a group is opened when its first one is taken."""
    waiting: list[Opened] = []
    try:
        for number, task in enumerate(tasks):
            seed = plan.seed + number
            group = plan.name and f"{plan.name}-{number}"
            asked = asked_of(plan, task, seed)
            opening = asyncio.ensure_future(proxy.open_group(group=group, **asked))
            try:
                waiting = await asyncio.shield(opening)
            except asyncio.CancelledError:  # the proxy may have opened it
                waiting = await opening
                raise
            if plan.name:
                waiting += await _later_tries(plan, waiting, task, seed, proxy)
                waiting = [one for one in waiting if await proxy.can_begin(one, plan.deadline_s)]
            while waiting:
                yield waiting.pop(0), task, seed
    finally:
        # A run with a name will find them, and play them then.
        for opened in [] if plan.name else waiting:
            await proxy.give_up(opened, EpisodeStatus.ABORTED)


async def _later_tries(
    plan: Plan, first: Sequence[Opened], task: Task, seed: int, proxy: ProxyClient
) -> list[Opened]:
    """What a killed run has opened in the places of lost episodes, if it is still open."""
    found: list[Opened] = []
    for lost in first:
        for tries in range(2, MOST_TRIES + 1):
            name = f"{lost.episode}~{tries}"
            state = None if lost.state is EpisodeState.OPEN else await proxy.state(name)
            if state is None:
                break
            if state is EpisodeState.OPEN:
                found.append(await _open_one(plan, name, task, seed, proxy))
    return found


async def _another(
    plan: Plan, lost: Opened, task: Task, seed: int, proxy: ProxyClient
) -> Opened | None:
    """An episode in the place of one that was lost; None if its group takes no more."""
    name, _, tries = lost.episode.partition("~")
    if int(tries or 1) >= MOST_TRIES:
        return None
    try:
        return await _open_one(plan, f"{name}~{int(tries or 1) + 1}", task, seed, proxy)
    except RefusedError as error:
        log.info("no episode in the place of %s: %s", lost.episode, error)
        return None


async def _open_one(plan: Plan, name: str, task: Task, seed: int, proxy: ProxyClient) -> Opened:
    group = name.partition("~")[0].rpartition("-")[0]
    return await proxy.open_episode(episode=name, group=group, **asked_of(plan, task, seed))


def asked_of(plan: Plan, task: Task, seed: int) -> Json:
    """What the episodes of a group have in common."""
    return {
        "environment": plan.environment,
        "task": task.id,
        "group_size": plan.group_size,
        "split": task.split,
        "seed": seed,
        "max_calls": plan.max_calls,
        "max_tokens": plan.max_tokens,
        "deadline_s": plan.open_s,
        "lineage": plan.lineage,
        "version": plan.version,
        "sampling": plan.sampling,
    }


def summary(attempts: Sequence[Attempt], wall_s: float) -> str:
    """What a run came to, in lines for a person; a line for each family if there are a few."""
    line = f"{len(attempts)} episodes in {wall_s:.1f} s: solved {_solved(attempts)}"
    statuses = [one.status for one in attempts]
    others = [
        f"{statuses.count(status)} {status}"
        for status in (EpisodeStatus.TRUNCATED, *_BROKEN)
        if status in statuses
    ]
    families: defaultdict[str, list[Attempt]] = defaultdict(list)
    for one in attempts:
        families[family_of(one.task.id)].append(one)
    each = [f"  {name}: {_solved(some)}" for name, some in sorted(families.items())]
    model, world = (sum(getattr(one, n) for one in attempts) for n in ("model_s", "environment_s"))
    spent = f"an episode waits {model / max(1, len(attempts)):.2f} s for the model, "
    spent += f"{world / max(1, len(attempts)):.2f} s for its environment"
    shown = each if 1 < len(each) <= _MOST_FAMILIES else []
    known = [spent] if model or world else []  # other machines do not tell
    return "\n".join([", ".join([line, *others]), *shown, *known])


def _solved(attempts: Sequence[Attempt]) -> str:
    """How many of those with an outcome are solved, with the share and its interval."""
    outcomes = [one.outcome for one in attempts if one.outcome is not None]
    solved = sum(outcome >= SOLVED for outcome in outcomes)
    told = f"{solved} of {len(outcomes)}"
    if not outcomes:
        return told
    low, high = proportion_interval(solved, len(outcomes))
    return f"{told} ({solved / len(outcomes):.0%}; with 90 % confidence {low:.0%} to {high:.0%})"
