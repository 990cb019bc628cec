"""The judge stage: leases turns that have a next state, judges them and settles their verdicts.

It stands between the proxy, which records turns and what followed them, and the learner, which
trains on the verdicts. All three meet only in the store. A turn is settled once: after a crash its
lease expires, and the store refuses a second verdict. A turn without a valid vote, or whose hinted
prompt the engine could not render, goes back into the queue with a growing delay. It is never
charged to the policy. Beside that, the groups of episodes are settled (`judge/groups.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from judge.config import JudgeConfig
from judge.credit import steps_meant
from judge.evidence import build_evidence, message_text, said_in
from judge.feedback import feedback_verdict
from judge.groups import settle_groups
from judge.hinting import Renderer, hinted_prompt
from judge.verdict import verdict_of
from judge.votes import Counts, votes_on
from nextstate.error_text import safe_text
from nextstate.errors import EngineError, JudgeError
from nextstate.hooks import AgentProfile, JudgeKind
from nextstate.pace import Pace
from nextstate.records import Json, NextState, Source, Turn, Verdict
from nextstate.store import Store
from nextstate.store.judging import Judgement
from nextstate.tracing import tracing
from nextstate.wire import objects

log = logging.getLogger(__name__)

IDLE_S = 0.05
"""Seconds between two looks at an empty queue."""
SLOW_IDLE_S = 1.0
"""The same, where each look is a question to a server."""
SPENT_S = 1.0
"""Seconds between two looks at a budget that is used up."""
FINISH_S = 2.0
"""Seconds that votes under way may take after the stage was told to stop."""
_LEASED_PER_PLACE = 2
"""Turns leased for each one judged at a time: fewer, larger leases cost the store less."""
RETRY_INITIAL_S, RETRY_MAX_S = 5.0, 3600.0
"""Wait after a turn's first attempt without a verdict, and the longest such wait."""
_MAX_DOUBLINGS = 30


async def run(
    store: Store,
    config: JudgeConfig,
    judge: JudgeKind,
    engine: Renderer,
    stop: asyncio.Event,
    counts: Counts | None = None,
    pace: Pace | None = None,
    profile: AgentProfile | None = None,
    finish_s: float = FINISH_S,
) -> None:
    """Judges until `stop`; then finishes what is under way, or puts it back after `finish_s`.

    The caller owns `judge` and `engine` and closes them. `counts` is kept up to date if given. A
    `pace` is for a judge that votes on the engine which agents use.
    """
    worker = _Worker(store, config, judge, engine, counts or Counts(), pace, profile)
    held: dict[asyncio.Task[None], str] = {}
    stopping = asyncio.create_task(stop.wait())
    settling = asyncio.create_task(settle_groups(store, stop, config.credit, config.look_s))
    idle_s = SLOW_IDLE_S if store.database.tells_changes else IDLE_S
    try:
        while not stop.is_set():
            free = config.parallel * _LEASED_PER_PLACE - len(held)
            leased = await worker.lease(free, len(held)) if free >= config.parallel else []
            for turn_id in leased:
                held[asyncio.create_task(worker.settle(turn_id))] = turn_id
            if len(held) > config.parallel * (_LEASED_PER_PLACE - 1):
                await asyncio.wait({*held, stopping}, return_when=asyncio.FIRST_COMPLETED)
            elif not leased:
                await asyncio.wait({stopping}, timeout=SPENT_S if worker.spent else idle_s)
            _forget_done(held)
        if held:
            await asyncio.wait(held, timeout=finish_s)
    finally:
        _forget_done(held)
        for task in (stopping, settling, *held):
            task.cancel()
        await asyncio.gather(stopping, settling, *held, return_exceptions=True)
        for turn_id in held.values():
            await worker.put_back(turn_id, 0.0, "the judge was stopped")


async def judge_turn(
    turn: Turn,
    states: Sequence[NextState],
    config: JudgeConfig,
    judge: JudgeKind,
    engine: Renderer,
    counts: Counts | None = None,
    later: Sequence[NextState] = (),
    profile: AgentProfile | None = None,
) -> Verdict:
    """The verdict on one turn; `later` is what the user said at the end of its task.

    The agent's `profile` hides what the agent itself wrote into the conversation.

    Raises JudgeError when no vote was valid, and EngineError when the hinted prompt of a trainable
    turn could not be rendered.
    """
    evidence = build_evidence(turn, states, config.max_chars, later, profile)
    votes = await votes_on(evidence, turn.id, config, judge, counts)
    verdict = verdict_of(turn.id, judge.name, votes, evidence)
    assert verdict is not None
    if verdict.hint is None or not turn.trainable:
        return verdict
    prompt = await hinted_prompt(turn, verdict.hint, engine)
    if not prompt:
        log.info("turn=%s: the engine would cut the hint off its prompt: score only", turn.id)
        return verdict
    return replace(verdict, hinted_prompt_ids=prompt)


def affordable(config: JudgeConfig, calls: int, held: int) -> int:
    """How many more turns may be leased when the last hour took `calls` votes.

    The `held` turns will still ask for all their votes.

    >>> affordable(JudgeConfig(votes=3, calls_per_hour=20), calls=6, held=2)
    2
    """
    if not config.calls_per_hour:
        return config.parallel * _LEASED_PER_PLACE
    left = config.calls_per_hour - calls - held * config.votes
    return max(0, left // config.votes)


def retry_delay_s(attempts: int) -> float:
    """Seconds to wait after the `attempts`-th attempt (from 1): doubling, up to RETRY_MAX_S.

    >>> [retry_delay_s(attempts) for attempts in (1, 2, 3, 99)]
    [5.0, 10.0, 20.0, 3600.0]
    """
    return min(RETRY_MAX_S, RETRY_INITIAL_S * 2.0 ** min(max(attempts - 1, 0), _MAX_DOUBLINGS))


@dataclass(slots=True)
class _Worker:
    """What all turns of one running stage use."""

    store: Store
    config: JudgeConfig
    judge: JudgeKind
    engine: Renderer
    counts: Counts
    pace: Pace | None
    profile: AgentProfile | None
    spent: bool = False
    """Whether the hour's budget is used up."""
    places: asyncio.Semaphore = field(init=False)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Threads that wait for SQLite's write lock sleep for milliseconds; tasks here just queue."""

    def __post_init__(self) -> None:
        self.places = asyncio.Semaphore(self.config.parallel)

    async def lease(self, limit: int, held: int) -> list[str]:
        """Leases up to `limit` turns, as budget and pace allow beside the `held` ones."""
        if self.config.calls_per_hour:
            calls, _ = await asyncio.to_thread(self.store.judging.spent)
            allowed = affordable(self.config, calls, held)
            if self.spent != (allowed == 0 and not held):
                self.spent = not self.spent
                log.info("the hour's budget is %s", "used up" if self.spent else "open again")
            limit = min(limit, allowed)
        if self.pace is not None:
            limit = await self.pace.allowed(limit, held)
        if not limit:
            return []
        async with self.writing:
            return await asyncio.to_thread(self.store.judging.lease, limit, self.config.lease_s)

    async def settle(self, turn_id: str) -> None:
        """Judges one leased turn; after any error the turn is put back."""
        started_ns = time.time_ns()
        try:
            async with self.places:
                work = await asyncio.to_thread(_load, self.store, turn_id)
                verdict = await self._judged(work)
            meant = await asyncio.to_thread(self._steps_meant, work)
            async with self.writing:
                settled = await asyncio.to_thread(self._settle, work, verdict, meant)
            self.counts.judged += settled
            if settled:
                tracing("judge").judged(work.turn, verdict.judge, verdict.score, started_ns)
        except (JudgeError, EngineError) as error:
            log.info("turn=%s has no verdict yet: %s", turn_id, error)
            await self._retry_later(turn_id, str(error))
        except Exception as error:
            log.exception("turn=%s could not be judged", turn_id)
            await self._retry_later(turn_id, safe_text(error))

    def _settle(self, work: Judgement, verdict: Verdict, meant: Sequence[str]) -> bool:
        if work.feedback is not None:
            return self.store.judging.add_hinted_prompt(verdict, also_about=meant)
        return self.store.judging.settle_verdict(
            verdict, task_end=work.task_end, also_about=meant, read=work
        )

    async def put_back(self, turn_id: str, delay_s: float, reason: str) -> None:
        """Returns a leased turn to the queue; a settled one stays settled."""
        async with self.writing:
            await asyncio.to_thread(self.store.judging.defer, turn_id, delay_s, reason)

    async def _judged(self, work: Judgement) -> Verdict:
        """The verdict; whether it succeeds or not, the votes are taken off the budget."""
        if work.feedback is not None:
            return await feedback_verdict(work.feedback, work.turn, self.engine)
        cost, started = Counts(), time.monotonic()
        turn, states, later = work.turn, work.next_states, work.later
        try:
            return await judge_turn(
                turn, states, self.config, self.judge, self.engine, cost, later, self.profile
            )
        finally:
            self.counts.add(cost)
            if self.pace is not None:
                self.pace.worked(time.monotonic() - started)
            if self.config.calls_per_hour:
                # A judge without a model costs nothing: it neither reads tokens nor fails.
                asked = cost.tokens or cost.unparsed or not self.judge.deterministic
                if asked:
                    async with self.writing:
                        await asyncio.to_thread(self.store.judging.spend, cost.calls, cost.tokens)

    def _steps_meant(self, work: Judgement) -> list[str]:
        """The earlier steps of the turn's task that the user's words are also about."""
        said = "\n".join(s.text for s in work.next_states if s.source is Source.USER)
        steps = self.store.judging.earlier_steps(work.turn.id) if said and work.turn.parent else []
        if not steps:
            return []
        request, calls = task_of(work.turn.request, self.profile)
        # Newest first on both sides: a history that was cut has fewer steps than were recorded.
        shown = list(zip(steps, reversed(calls), strict=False))
        return [shown[n][0] for n in steps_meant(said, [call for _, call in shown], request)]

    async def _retry_later(self, turn_id: str, reason: str) -> None:
        work = await asyncio.to_thread(self.store.judging.judgement, turn_id)
        await self.put_back(turn_id, retry_delay_s(work.attempts if work else 1), reason)
        self.counts.deferred += 1


def task_of(request: Json, profile: AgentProfile | None = None) -> tuple[str, list[str]]:
    """What the user asked last in a request, and the text and calls of each reply since then."""
    asked, calls = "", list[str]()
    profile = profile and profile.for_request(request)
    for message in objects(request.get("messages")):
        said = said_in(message, profile)
        if said is not None and said[0] == Source.USER:  # not what the agent itself put there
            asked, calls = said[1], []
        elif message.get("role") == "assistant":
            calls.append(message_text(message))
    return asked, calls


def _load(store: Store, turn_id: str) -> Judgement:
    work = store.judging.judgement(turn_id)
    if work is None:
        raise JudgeError("the turn is no longer in the store")
    return work


def _forget_done(held: dict[asyncio.Task[None], str]) -> None:
    """Takes finished work out of `held`, and logs an error that putting back raised."""
    for task in [task for task in held if task.done()]:
        del held[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a turn stays leased until its lease expires", exc_info=error)
