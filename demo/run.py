"""`nextstate demo`: the report's experiment in small, on the whole stack.

Personas talk to the seed policy through the proxy. Whenever a new version serves, they pause, and
the version answers held-out questions. Nothing here reads the store: all numbers come from the
replies, their headers and the proxy's /metrics and /healthz.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import openai

from demo.configuration import Served, write_configuration
from demo.course import POLICY, Course
from demo.progress import serving_version, stored_counts
from demo.report import Display, Record, print_summary, write_record
from demo.score import Score, score_of, shortfalls
from demo.talk import Answer, Talk, ask_all, client_for
from demo.world import HeldOut
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.errors import StartError

log = logging.getLogger(__name__)

ASKED_AT_ONCE = 16
MEASURE_ATTEMPTS = 4
POLL_S = 0.1
QUIET_POLLS = 8
"""The learner polls every 0.5 s: after this many polls it found no full batch."""
UNDER_WAY = ("judgements/pending", "judgements/leased", "samples/leased", "versions/candidate")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    course: Course
    method: str
    seed: int
    updates: int
    out: Path


def run_demo(course: Course, *, method: str, seed: int, updates: int, out: Path) -> int:
    """Runs the demo; 0 if the loop learned, 1 if it did not. `updates` 0: as the course says."""
    plan = Plan(course, method, seed, updates or course.updates, out.absolute())
    logging.getLogger().setLevel(logging.WARNING)
    return asyncio.run(_run(plan))


async def _run(plan: Plan) -> int:
    try:
        settings = write_settings(plan)
    except OSError as error:
        raise StartError(
            f"--out {str(plan.out)!r} cannot hold a demo: {error}; name another folder"
        ) from error
    stack = Stack(settings)
    main = asyncio.current_task()
    assert main is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, main.cancel)
    started = time.monotonic()
    try:
        with Display(plan.updates) as display:
            display.step("starting vLLM, proxy, judge and learner (about a minute)")
            async with stack.running() as running:
                await stack.wait_ready(running)
                display.step(f"ready after {time.monotonic() - started:.0f} s")
                url = settings.proxy.url
                async with client_for(f"{url}/v1") as client, aiohttp.ClientSession(url) as http:
                    run = _Experiment(plan, stack, running, display, client, http)
                    record = await run.record()
    except asyncio.CancelledError:
        print("stopped; everything has been shut down")
        return 130
    files = write_record(record, plan.out)
    wanted = record.scores[-1].version if record.starved else plan.updates
    first, last = record.scores[0], record.scores[-1]
    problems = shortfalls(first, last, record.failed, wanted, plan.course.goals(first))
    print_summary(record, files, settings, problems, time.monotonic() - started)
    return 1 if problems else 0


def write_settings(plan: Plan) -> Settings:
    """Writes the demo's configuration and reads it back; see `demo/configuration.py`."""
    course = plan.course
    if course.model == POLICY and not (POLICY / "model.safetensors").is_file():
        raise StartError(f"the seed policy is missing from {POLICY}: run `make seed-policy`")
    learner = {"method": plan.method, **course.learner}
    return write_configuration(
        plan.out, Served(course.model, course.served_name, course.dtype, "rules", learner)
    )


class _Experiment:
    """One run of the personas against a stack that is ready."""

    def __init__(
        self,
        plan: Plan,
        stack: Stack,
        running: asyncio.Task[None],
        display: Display,
        client: openai.AsyncOpenAI,
        http: aiohttp.ClientSession,
    ) -> None:
        self._plan = plan
        self._stack = stack
        self._running = running
        self._display = display
        self._client = client
        self._http = http
        course = plan.course
        self._course = course
        self._talk = Talk(
            client, course.served_name, course.world, course.conversations, course.max_tokens
        )
        self._tasks = course.world.held_out[: course.all_questions]
        self._failed = 0

    async def record(self) -> Record:
        """Talks until the last version serves, and measures versions on the way."""
        plan, talk = self._plan, self._talk
        after = before = await self._ask(self._tasks)
        scores = [self._scored(before, 0)]
        talking = asyncio.create_task(talk.run())
        try:
            version, starved = 0, False
            while version < plan.updates and not starved:
                wanted = min(version + self._course.measure_every, plan.updates)
                starved = not await self._wait_version(talking, wanted)
                talk.pause()
                version, after = await self._settled_answers(last=starved)
                scores.append(self._scored(after, version))
                if version < plan.updates and not starved:
                    talk.resume()
        finally:
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)
        return Record(
            method=plan.method,
            persona=plan.course.world.title,
            seed=plan.seed,
            scores=scores,
            replies=talk.talked.replies,
            reactions={k.value: n for k, n in talk.talked.reactions.items()},
            stored=await stored_counts(self._http),
            starved=starved,
            failed=self._failed + talk.talked.failed,
            versions_met=sorted(talk.talked.versions),
            goal=plan.course.goals(scores[0]).score,
            example=_example(before, after),
        )

    async def _ask(self, tasks: Sequence[HeldOut]) -> list[Answer]:
        self._display.phase("measuring")
        name, tokens = self._course.served_name, self._course.max_tokens
        answers = await ask_all(self._client, name, tasks, ASKED_AT_ONCE, tokens)
        self._failed += sum(answer.reply is None for answer in answers)
        return answers

    def _scored(self, answers: list[Answer], version: int) -> Score:
        score = score_of(answers, version)
        self._display.scored(score)
        return score

    async def _settled_answers(self, *, last: bool) -> tuple[int, list[Answer]]:
        """The serving version with its answers; asks again if the version changed meanwhile."""
        for _ in range(MEASURE_ATTEMPTS):
            version = await self._settled_version()
            everything = last or version >= self._plan.updates
            answers = await self._ask(
                self._tasks if everything else self._tasks[: self._course.questions]
            )
            if all(answer.version in (version, -1) for answer in answers):
                return version, answers
        raise StartError(f"the version changed in each of {MEASURE_ATTEMPTS} measurements")

    async def _settled_version(self) -> int:
        """Waits until the last full batch is trained and serves; the personas are paused."""
        self._display.phase("finishing")
        deadline = time.monotonic() + self._course.update_timeout_s
        quiet = 0
        while quiet < QUIET_POLLS and time.monotonic() < deadline:
            stored = await stored_counts(self._http)
            self._display.live(self._talk.talked, stored, await serving_version(self._http))
            quiet = 0 if any(stored.get(name) for name in UNDER_WAY) else quiet + 1
            await asyncio.sleep(POLL_S)
        return await serving_version(self._http)

    async def _wait_version(self, talking: asyncio.Task[None], wanted: int) -> bool:
        """Waits until version `wanted` or a newer one serves; False if opd ran out of hints."""
        self._display.phase("personas talk")
        started = changed = time.monotonic()
        last = await serving_version(self._http)
        while time.monotonic() - started < self._course.update_timeout_s:
            if talking.done():
                talking.result()
            if self._running.done():
                self._running.result()
                raise StartError("the stack ended before the demo did")
            version = await serving_version(self._http)
            self._display.live(self._talk.talked, await stored_counts(self._http), version)
            if version >= wanted:
                return True
            if version != last:
                last, changed = version, time.monotonic()
            waited_s = time.monotonic() - changed
            if (
                self._plan.method.startswith("opd")
                and version > 0
                and waited_s > self._course.starved_s
            ):
                return False
            await asyncio.sleep(POLL_S)
        raise StartError(
            f"version {wanted} did not come into service within "
            f"{self._course.update_timeout_s:.0f} s: see "
            f"{self._stack.dir / 'logs' / 'learner.log'}"
        )


def _example(before: list[Answer], after: list[Answer]) -> tuple[str, str, str]:
    """(question, reply before, reply after): the first reply that became better."""
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a.reply and b.reply]
    changed = [
        (a, b)
        for a, b in pairs
        if score_of([b], b.version).score == 1 and score_of([a], a.version).satisfied == 0
    ]
    first, second = (changed or pairs)[0]
    return first.task.question, first.reply or "", second.reply or ""
