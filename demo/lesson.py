"""A small policy learns an environment, on the whole stack: the tool demo, and a benchmark.

It plays generated tasks through the proxy, with the runner that `nextstate rollout` has: eight
attempts at each task. Outcomes become advantages, and the learner makes versions. The score is the
share of held-out tasks that a version solves at the first attempt.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Protocol

import aiohttp
import orjson
from rich.console import Console
from rich.markup import escape

from demo.configuration import Served, write_configuration
from demo.curve import draw_solved
from demo.progress import serving_version, stored_counts
from demo.report import record_files
from nextstate.agreement import proportion_interval
from nextstate.app.stack import Stack
from nextstate.episodes import SOLVED, Split, family_of
from nextstate.errors import StartError
from nextstate.hooks import (
    Acted,
    AgentProgram,
    Environment,
    EnvironmentKind,
    GeneratesTasks,
    Scored,
    Shared,
)
from nextstate.records import Json
from rollout.attempt import Attempt
from rollout.proxy import ProxyClient
from rollout.runner import Plan, run
from rollout.tasks import Task

MEASURE_EVERY = 6
HELD_OUT, BETWEEN = 120, 60
"""Held-out tasks of the first and the last measurement, and of one on the way."""
GROUPS, GROUP_SIZE, PARALLEL = 6, 8, 32
"""Groups are played before it is looked whether the learner keeps up."""
BATCH = 64
LEARNER = {
    "method": "binary",
    "batch_size": BATCH,
    "kl_coef": 0.0,
    "epochs": 2,
    "step_kl": 0.03,
    "gradient_checkpointing": False,
    "micro_batch_tokens": 4096,
    "threads": 1,
}
_DEADLINE_S, _UPDATE_S, _POLL_S = 60, 120.0, 0.1
_SEED_STEP = 1_000_000
"""Runs with other seeds train on tasks that are so many numbers away."""


class Kind(EnvironmentKind, GeneratesTasks, Protocol):
    """An environment that makes its tasks."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned, by whom and how long."""

    environment: str
    kind: Kind
    policy: Path
    """The folder of the policy that it begins with."""
    goal: float
    """The share of held-out tasks that are to be solved."""
    updates: int
    max_calls: int
    most_s: float = math.inf
    """After so many seconds since the start no further tasks are played to learn from."""
    learner: Mapping[str, bool | int | float | str] = field(default_factory=lambda: LEARNER)
    judge: Sequence[str] = ()
    """A command that is run as judge, with the configuration's file; empty: `nextstate judge`."""


@dataclass(frozen=True, slots=True)
class Point:
    """What a version solves of the held-out tasks."""

    version: int
    tasks: int
    solved: float
    low: float
    high: float
    """The 90 % interval of `solved`."""
    families: dict[str, float]
    seconds: float
    """Since the start of the demo."""


class _Heard:
    """An episode whose words are kept."""

    def __init__(self, inner: Environment, episodes: dict[str, list[tuple[str, str]]]) -> None:
        self._inner, self._episodes = inner, episodes
        self._said: list[tuple[str, str]] = []

    async def reset(self, task: Json, seed: int) -> str:
        shown = await self._inner.reset(task, seed)
        self._said.append(("task", task.get("instruction", shown)))
        self._episodes[key_of(task)] = self._said
        return shown

    async def step(self, action: str) -> Acted:
        acted = await self._inner.step(action)
        self._said += [("call", action), ("answer", acted.observation)]
        return acted

    async def score(self) -> Scored:
        return await self._inner.score()

    async def close(self) -> None:
        await self._inner.close()


class HeardKind:
    """Keeps what was said in the episodes that it made."""

    def __init__(self, inner: EnvironmentKind) -> None:
        self._inner = inner
        self.episodes: dict[str, list[tuple[str, str]]] = {}
        """What was said in the last episode of each task, by `key_of` it."""

    def check_task(self, task: Json) -> None:
        self._inner.check_task(task)

    async def check_machine(self) -> None:
        await self._inner.check_machine()

    def make(self) -> _Heard:
        made = self._inner.make()
        assert not isinstance(made, AgentProgram)
        return _Heard(made, self.episodes)

    async def release(self) -> None:
        if isinstance(self._inner, Shared):
            await self._inner.release()


def learn(lesson: Lesson, *, seed: int, updates: int, out: Path) -> int:
    """Runs a lesson; 0 if the held-out score reached the goal. `updates` 0: the lesson's own."""
    logging.getLogger().setLevel(logging.WARNING)
    return asyncio.run(_run(lesson, seed, updates or lesson.updates, out.absolute()))


async def _run(lesson: Lesson, seed: int, updates: int, out: Path) -> int:
    await lesson.kind.check_machine()
    console, started = Console(highlight=False), time.monotonic()
    model = f"{lesson.environment}-policy"
    settings = write_configuration(
        out, Served(lesson.policy, model, "float32", "outcome", lesson.learner)
    )
    stack = Stack(settings)
    if lesson.judge:
        stack.children["judge"].argv = [*lesson.judge, str(settings.file)]
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, main.cancel)
    try:
        console.print("starting vLLM, proxy, judge and learner (about a minute)")
        async with stack.running() as running:
            await stack.wait_ready(running)
            console.print(f"ready after {time.monotonic() - started:.0f} s")
            url = settings.proxy.url
            async with aiohttp.ClientSession(url) as http, aiohttp.ClientSession() as calls:
                proxy = ProxyClient(calls, url, None, model, _DEADLINE_S)
                play = _Course(lesson, proxy, http, running, console, seed, started)
                await play.learn(updates)
    except asyncio.CancelledError:
        print("stopped; everything has been shut down")
        return 130
    first, last = play.points[0], play.points[-1]
    data, picture = record_files(out)
    shown = play.example()
    record = {
        "environment": lesson.environment,
        "seed": seed,
        "points": [asdict(p) for p in play.points],
        "goal": lesson.goal,
        "episodes": play.episodes,
        "failed": play.failed,
        "seconds": time.monotonic() - started,
        "spent": play.spent,
        "example": shown,
    }
    data.write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))
    draw_solved([(p.version, p.solved, p.low, p.high) for p in play.points], lesson.goal, picture)
    for title, lines in shown.items():
        console.rule(f"a held-out task, {title}")
        for who, text in lines:
            console.print(f"[bold]{who:>7}[/bold]  {escape(text)}", soft_wrap=True)
    console.rule("what happened")
    console.print(
        f"{play.episodes} episodes trained or were compared, {play.failed} failed; solved of "
        f"{last.tasks} held-out tasks: {first.solved:.2f} → [bold]{last.solved:.2f}[/bold] "
        f"(90 % interval {last.low:.2f} to {last.high:.2f})"
    )
    console.print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in play.spent.items()))
    console.print(f"[bold]curve[/bold]  {picture}  {data}", soft_wrap=True)
    console.print(
        f"[bold]steps[/bold]  nextstate episodes --config {settings.file}", soft_wrap=True
    )
    learned = last.solved >= lesson.goal and not play.failed
    verdict = "the policy learned it" if learned else f"it did not reach {lesson.goal:.2f}"
    console.print(f"{verdict} ({time.monotonic() - started:.0f} s)")
    return 0 if learned else 1


class _Course:
    """One run against a stack that is ready."""

    def __init__(
        self,
        lesson: Lesson,
        proxy: ProxyClient,
        http: aiohttp.ClientSession,
        running: asyncio.Task[None],
        console: Console,
        seed: int,
        started: float,
    ) -> None:
        self.points: list[Point] = []
        self.episodes = self.failed = 0
        self.spent: dict[str, float] = dict.fromkeys(
            ("start", "playing", "measuring", "learner", "all waits for model", "for world"), 0.0
        )
        """Seconds: the first four one after the other, the last two summed over episodes."""
        self.spent["start"] = time.monotonic() - started
        self._lesson = lesson
        self._proxy, self._http, self._running = proxy, http, running
        self._console, self._seed, self._started = console, seed, started
        self._before: dict[str, list[tuple[str, str]]] = {}
        self._after: dict[str, list[tuple[str, str]]] = {}
        self._held_out = list(islice(tasks(lesson.kind, Split.EVAL, 0), HELD_OUT))

    async def learn(self, updates: int) -> None:
        """Plays tasks until `updates` versions were made; measures on the way."""
        self._before = await self._measure(HELD_OUT)
        training = tasks(self._lesson.kind, Split.TRAIN, self._seed)
        next_look, plan = MEASURE_EVERY, self._plan(GROUP_SIZE)
        while (
            version := await serving_version(self._http)
        ) < updates and time.monotonic() < self._started + self._lesson.most_s:
            if version >= next_look:
                await self._measure(BETWEEN)
                next_look = version + MEASURE_EVERY
            chosen = list(islice(training, GROUPS))
            with self._timed("playing"):
                self._count(await run(plan, chosen, self._lesson.kind, self._proxy, lambda _: None))
            with self._timed("learner"):
                await self._trained()
        self._after = await self._measure(HELD_OUT)

    def example(self) -> dict[str, list[tuple[str, str]]]:
        """One held-out task before and after: the first that is solved only after."""
        solved = {text for text, said in self._after.items() if said[-1][0] == "right"}
        better = [text for text in self._before if text in solved]
        better = [text for text in better if self._before[text][-1][0] != "right"] or [
            *self._before
        ]
        return {"before": self._before[better[0]], "after": self._after[better[0]]}

    async def _measure(self, count: int) -> dict[str, list[tuple[str, str]]]:
        kind, version = HeardKind(self._lesson.kind), await serving_version(self._http)
        plan = replace(self._plan(1), version=version or None)
        with self._timed("measuring"):
            attempts = await run(plan, self._held_out[:count], kind, self._proxy, lambda _: None)
        self.failed += sum(one.outcome is None for one in attempts)
        solved = {one.task.id: _is_solved(one) for one in attempts}
        for one in attempts:
            kind.episodes[key_of(one.task.fields)].append(
                ("right" if solved[one.task.id] else "wrong", "")
            )
        each: defaultdict[str, list[bool]] = defaultdict(list)
        for name, ok in solved.items():
            each[family_of(name)].append(ok)
        families = {name: _share(found) for name, found in sorted(each.items())}
        low, high = proportion_interval(sum(solved.values()), len(solved))
        share, spent = _share([*solved.values()]), time.monotonic() - self._started
        self.points.append(Point(version, len(solved), share, low, high, families, spent))
        bar = ("█" if self._console.encoding.startswith("utf") else "#") * round(20 * share)
        parts = "  ".join(f"{name} {value:4.2f}" for name, value in families.items())
        self._console.print(
            f"version {version:2d}  [bold]{share:4.2f}[/bold] {bar:20} {parts}  "
            f"[dim]{self.episodes} episodes, {spent:.0f} s[/dim]"
        )
        return kind.episodes

    def _plan(self, group_size: int) -> Plan:
        most = self._lesson.max_calls
        return Plan(self._lesson.environment, PARALLEL, group_size, 0, most, deadline_s=_DEADLINE_S)

    @contextmanager
    def _timed(self, name: str) -> Generator[None]:
        began = time.monotonic()
        yield
        self.spent[name] += time.monotonic() - began

    def _count(self, attempts: Sequence[Attempt]) -> None:
        self.episodes += len(attempts)
        self.spent["all waits for model"] += sum(one.model_s for one in attempts)
        self.spent["for world"] += sum(one.environment_s for one in attempts)
        self.failed += sum(one.outcome is None for one in attempts)

    async def _trained(self) -> None:
        """Returns when less than a batch waits for the learner, which may still be at work."""
        until = time.monotonic() + _UPDATE_S
        while time.monotonic() < until:
            if self._running.done():
                self._running.result()
                raise StartError("the stack ended before the demo did")
            stored = await stored_counts(self._http)
            waiting, ready = (stored.get(f"samples/{state}", 0) for state in ("waiting", "ready"))
            if not waiting and ready < int(self._lesson.learner["batch_size"]):
                return
            await asyncio.sleep(_POLL_S)
        raise StartError(
            f"the learner took no batch within {_UPDATE_S:.0f} s: see logs/learner.log"
        )


def tasks(kind: GeneratesTasks, split: Split, seed: int) -> Iterator[Task]:
    """The generated tasks of a split without end; the families take turns."""
    for number in count(_SEED_STEP * seed):
        fields = kind.generate(split.value, number)
        name = fields.pop("id")
        del fields["split"]
        yield Task(name, split, fields)


def key_of(fields: Json) -> str:
    """Tells tasks apart: many have the same instruction."""
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS).decode()


def _is_solved(attempt: Attempt) -> bool:
    return attempt.outcome is not None and attempt.outcome >= SOLVED


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
