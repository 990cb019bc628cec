"""Many episodes at once, up to a bound; groups are opened as places become free."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass

from nextstate.agreement import proportion_interval
from nextstate.episodes import EpisodeStatus
from nextstate.errors import NextStateError, RolloutError
from nextstate.hooks import EnvironmentKind, Shared
from rollout.attempt import Attempt, play
from rollout.config import open_s
from rollout.pictures import Pictures
from rollout.proxy import Opened, ProxyClient
from rollout.tasks import Task, family_of

SOLVED = 1.0
"""An outcome of at least this counts as solved, as in judge/advantages.py."""

_MOST_FAMILIES = 20
"""More are not shown one by one: then the ids have no families."""


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
) -> list[Attempt]:
    """Plays every task's group once; `told` gets each episode as it ends, in no order.

    Raises RolloutError if the proxy opens no group, or if so many episodes failed in a row that
    it is not the tasks' fault: two for each place.
    """
    attempts: list[Attempt] = []
    queue = _episodes(plan, tasks, proxy)
    taking = asyncio.Lock()

    async def work() -> None:
        while True:
            async with taking:
                found = await anext(queue, None)
            if found is None:
                return
            opened, task, seed = found
            environment = kind.make()
            if pictures is not None:
                environment = pictures.of(opened.episode, environment)
            attempt = await play(
                proxy, opened, environment, task, seed, plan.max_calls, plan.deadline_s
            )
            attempts.append(attempt)
            told(attempt)
            last = attempts[-2 * plan.parallel :]
            if len(last) == 2 * plan.parallel and all(
                one.status is EpisodeStatus.FAILED for one in last
            ):
                raise RolloutError(f"the last {len(last)} episodes failed: {attempt.reason}")

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(plan.parallel):
                workers.create_task(work())
    except* NextStateError as errors:
        raise errors.exceptions[0] from None
    finally:
        await queue.aclose()
        if isinstance(kind, Shared):
            await kind.release()
    return attempts


async def _episodes(
    plan: Plan, tasks: Iterable[Task], proxy: ProxyClient
) -> AsyncGenerator[tuple[Opened, Task, int]]:
    """(episode, task, seed) one after the other; a group is opened when its first one is taken."""
    waiting: list[Opened] = []
    try:
        for number, task in enumerate(tasks):
            waiting = await proxy.open_group(
                environment=plan.environment,
                task=task.id,
                group_size=plan.group_size,
                split=task.split,
                seed=plan.seed + number,
                max_calls=plan.max_calls,
                max_tokens=plan.max_tokens,
                deadline_s=plan.open_s,
                group=plan.name and f"{plan.name}-{number}",
                lineage=plan.lineage,
                version=plan.version,
            )
            if plan.name:
                waiting = [one for one in waiting if await proxy.can_begin(one, plan.deadline_s)]
            while waiting:
                yield waiting.pop(0), task, plan.seed + number
    finally:
        # A run with a name will find them, and play them then.
        for opened in [] if plan.name else waiting:
            await proxy.give_up(opened, EpisodeStatus.ABORTED)


def summary(attempts: Sequence[Attempt], wall_s: float) -> str:
    """What a run came to, in lines for a person; a line for each family if there are a few."""
    line = f"{len(attempts)} episodes in {wall_s:.1f} s: solved {_solved(attempts)}"
    statuses = [one.status for one in attempts]
    others = [
        f"{statuses.count(status)} {status}"
        for status in (EpisodeStatus.TRUNCATED, EpisodeStatus.FAILED)
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
    return "\n".join([", ".join([line, *others]), *shown, spent])


def _solved(attempts: Sequence[Attempt]) -> str:
    """How many of those with an outcome are solved, with the share and its interval."""
    outcomes = [one.outcome for one in attempts if one.outcome is not None]
    solved = sum(outcome >= SOLVED for outcome in outcomes)
    told = f"{solved} of {len(outcomes)}"
    if not outcomes:
        return told
    low, high = proportion_interval(solved, len(outcomes))
    return f"{told} ({solved / len(outcomes):.0%}; with 90 % confidence {low:.0%} to {high:.0%})"
