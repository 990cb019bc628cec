"""The judge stage: leases turns that have a next state, judges them, settles their verdicts.

It stands between the proxy, which records turns with what followed them, and the learner, which
trains on the verdicts; all three meet only in the store. A turn is settled once: a crash leaves a
lease that expires, and a second verdict on the same turn is refused by the store. A vote waits a
moment for a busy server and tries again. A turn without a valid vote, or whose hinted prompt the
engine could not render, goes back with a growing delay and is never charged to the policy.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from judge.config import JudgeConfig
from judge.credit import steps_meant
from judge.evidence import build_evidence, message_text, said_in
from judge.feedback import feedback_verdict
from judge.hinting import Renderer, hinted_prompt
from judge.pace import Pace
from judge.verdict import verdict_of
from nextstate.error_text import safe_text
from nextstate.errors import BusyError, EngineError, JudgeError
from nextstate.hooks import AgentProfile, Evidence, JudgeKind
from nextstate.records import HintedPrompt, Json, NextState, Source, Turn, Verdict, Vote
from nextstate.store.store import Judgement, Store
from nextstate.wire import objects

log = logging.getLogger(__name__)

IDLE_S = 0.05
"""Between two looks at an empty queue."""
SPENT_S = 1.0
"""Between two looks at a budget that is used up."""
FINISH_S = 2.0
"""How long votes under way may take once the stage is told to stop."""
_HELD_PER_PLACE = 2
"""Turns leased for each one judged at a time: leasing in batches keeps the store's share small."""
_MAX_DOUBLINGS = 30
FIRST_RETRY_S = 0.5
"""About how long a vote waits for a busy server the first time; doubles."""
_ATTEMPTS = 3


@dataclass(slots=True)
class Counts:
    """What the stage has done since it started."""

    judged: int = 0
    """Turns whose verdict this stage settled."""
    deferred: int = 0
    """Attempts that ended without a verdict."""
    unparsed: int = 0
    """Votes that gave no answer: unreadable, late or refused."""
    calls: int = 0
    """Votes that were asked for."""
    tokens: int = 0
    """What the valid ones cost."""

    def add(self, other: Counts) -> None:
        """Adds another's figures."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


async def run(
    store: Store,
    config: JudgeConfig,
    judge: JudgeKind,
    engine: Renderer,
    stop: asyncio.Event,
    counts: Counts | None = None,
    pace: Pace | None = None,
    profile: AgentProfile | None = None,
) -> None:
    """Judges until `stop`; then finishes what is under way, or puts it back after FINISH_S.

    The caller owns `judge` and `engine` and closes them. `counts` is kept up to date when given;
    `pace` is for a judge that votes on the engine which agents use; `profile` knows the agent.
    """
    worker = _Worker(store, config, judge, engine, counts or Counts(), pace, profile)
    held: dict[asyncio.Task[None], str] = {}
    stopping = asyncio.create_task(stop.wait())
    try:
        while not stop.is_set():
            free = config.parallel * _HELD_PER_PLACE - len(held)
            leased = await worker.lease(free, len(held)) if free >= config.parallel else []
            for turn_id in leased:
                held[asyncio.create_task(worker.settle(turn_id))] = turn_id
            if len(held) > config.parallel * (_HELD_PER_PLACE - 1):
                await asyncio.wait({*held, stopping}, return_when=asyncio.FIRST_COMPLETED)
            elif not leased:
                await asyncio.wait({stopping}, timeout=SPENT_S if worker.spent else IDLE_S)
            _forget_done(held)
        if held:
            await asyncio.wait(held, timeout=FINISH_S)
    finally:
        _forget_done(held)
        for task in (stopping, *held):
            task.cancel()
        await asyncio.gather(stopping, *held, return_exceptions=True)
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

    With the agent's `profile`, what the agent itself wrote into the conversation is not shown.

    Raises JudgeError when no vote was valid, EngineError when the hinted prompt of a trainable
    turn could not be rendered.
    """
    evidence = build_evidence(turn, states, config.tail_messages, config.max_chars, later, profile)
    votes = await votes_on(evidence, turn.id, config, judge, counts)
    verdict = verdict_of(turn.id, judge.name, votes, evidence, config.vote_rule)
    assert verdict is not None
    if verdict.hint is None or not turn.trainable:
        return replace(verdict, others=())
    hints = (verdict.hint, *(other.hint for other in verdict.others))[: config.hints]
    prompts = [(h, await hinted_prompt(turn, h, engine)) for h in hints]
    first, *others = [HintedPrompt(hint, ids or ()) for hint, ids in prompts]
    others = tuple(other for other in others if other.prompt_ids)
    if not first.prompt_ids:
        log.info("turn=%s: the engine would cut the hint off its prompt: score only", turn.id)
        return replace(verdict, others=())
    return replace(verdict, hinted_prompt_ids=first.prompt_ids, others=others)


async def votes_on(
    evidence: Evidence,
    name: str,
    config: JudgeConfig,
    judge: JudgeKind,
    counts: Counts | None = None,
) -> list[Vote]:
    """The valid votes, at least one; `name` seeds them. Raises JudgeError when there is none."""
    wanted = 1 if judge.deterministic else config.votes
    first_seed = zlib.crc32(name.encode()) >> 1
    answers = await asyncio.gather(
        *(_vote(judge, evidence, first_seed + i, config.timeout_s) for i in range(wanted))
    )
    failures = [answer for answer in answers if isinstance(answer, JudgeError)]
    votes = [answer for answer in answers if isinstance(answer, Vote)]
    if counts is not None:
        counts.unparsed += len(failures)
        counts.calls += wanted
        counts.tokens += sum(vote.tokens for vote in votes)
    if not votes:
        raise JudgeError(f"none of {wanted} votes was valid: {failures[0]}") from failures[0]
    return votes


def affordable(config: JudgeConfig, calls: int, tokens: int, held: int) -> int:
    """How many more turns may be leased when the last hour has cost `calls` and `tokens`.

    The `held` ones will still ask for all their votes; what these and the next take in tokens is
    not known beforehand.

    >>> affordable(JudgeConfig(votes=3, calls_per_hour=20), calls=6, tokens=900, held=2)
    2
    >>> affordable(JudgeConfig(tokens_per_hour=900), calls=6, tokens=900, held=0)
    0
    """
    if config.tokens_per_hour and tokens >= config.tokens_per_hour:
        return 0
    if not config.calls_per_hour:
        return config.parallel * _HELD_PER_PLACE
    left = config.calls_per_hour - calls - held * config.votes
    return max(0, left // config.votes)


def retry_delay_s(attempts: int, initial_s: float, max_s: float) -> float:
    """The wait after the `attempts`-th attempt (from 1): doubling, bounded.

    >>> [retry_delay_s(n, 5.0, 60.0) for n in (1, 2, 3, 9)]
    [5.0, 10.0, 20.0, 60.0]
    """
    return min(max_s, initial_s * 2.0 ** min(max(attempts - 1, 0), _MAX_DOUBLINGS))


async def _vote(
    judge: JudgeKind, evidence: Evidence, seed: int, timeout_s: float
) -> Vote | JudgeError:
    """One vote within `timeout_s`; a server that is busy is asked again after a moment."""
    patiently = AsyncRetrying(
        retry=retry_if_exception_type(BusyError),
        wait=wait_random_exponential(multiplier=FIRST_RETRY_S, max=timeout_s / 4),
        stop=stop_after_attempt(_ATTEMPTS),
        reraise=True,
    )
    try:
        async with asyncio.timeout(timeout_s):
            return await patiently(judge.vote, evidence, seed)
    except JudgeError as error:
        return error
    except TimeoutError:
        return JudgeError(f"no answer within timeout_s = {timeout_s}")


class _Worker:
    """What one running stage shares among the turns that it holds."""

    def __init__(
        self,
        store: Store,
        config: JudgeConfig,
        judge: JudgeKind,
        engine: Renderer,
        counts: Counts,
        pace: Pace | None,
        profile: AgentProfile | None,
    ) -> None:
        self._store = store
        self._config = config
        self._judge = judge
        self._engine = engine
        self._counts = counts
        self._pace = pace
        self._profile = profile
        self._budget = not judge.deterministic and (
            config.calls_per_hour > 0 or config.tokens_per_hour > 0
        )
        self.spent = False
        """Whether the hour's budget is used up."""
        self._places = asyncio.Semaphore(config.parallel)
        # Threads that meet at SQLite's write lock sleep for milliseconds; tasks here just queue.
        self._writing = asyncio.Lock()

    async def lease(self, limit: int, held: int) -> list[str]:
        """Takes up to `limit` turns from the queue, as the budget allows beside the `held`."""
        if self._budget:
            calls, tokens = await asyncio.to_thread(self._store.spent)
            allowed = affordable(self._config, calls, tokens, held)
            if self.spent != (allowed == 0 and not held):
                self.spent = not self.spent
                log.info("the hour's budget is %s", "used up" if self.spent else "open again")
            limit = min(limit, allowed)
        if self._pace is not None:
            limit = await self._pace.allowed(limit, held)
        if not limit:
            return []
        async with self._writing:
            return await asyncio.to_thread(
                self._store.lease_judgements, limit, self._config.lease_s
            )

    async def settle(self, turn_id: str) -> None:
        """Judges one leased turn; whatever goes wrong, the row is settled or put back."""
        try:
            async with self._places:
                work = await asyncio.to_thread(_load, self._store, turn_id)
                verdict = await self._judged(work)
            meant = await asyncio.to_thread(self._steps_meant, work)
            async with self._writing:
                settled = await asyncio.to_thread(
                    self._store.settle_verdict, verdict, task_end=work.task_end, meant=meant
                )
            self._counts.judged += settled
        except (JudgeError, EngineError) as error:
            log.info("no verdict yet: %s", error, extra={"turn": turn_id})
            await self._retry_later(turn_id, str(error))
        except Exception as error:
            log.exception("judging failed", extra={"turn": turn_id})
            await self._retry_later(turn_id, safe_text(error))

    async def put_back(self, turn_id: str, delay_s: float, reason: str) -> None:
        """Returns a leased turn to the queue; a settled one stays settled."""
        async with self._writing:
            await asyncio.to_thread(self._store.defer_judgement, turn_id, delay_s, reason)

    async def _judged(self, work: Judgement) -> Verdict:
        """`judge_turn`, with what it cost taken off the budget whether it succeeds or not."""
        if work.feedback is not None:
            return await feedback_verdict(work.feedback, work.turn, self._engine)
        cost, started = Counts(), time.monotonic()
        try:
            return await judge_turn(
                work.turn,
                work.next_states,
                self._config,
                self._judge,
                self._engine,
                cost,
                work.later,
                self._profile,
            )
        finally:
            self._counts.add(cost)
            if self._pace is not None:
                self._pace.judged(time.monotonic() - started)
            if self._budget:
                async with self._writing:
                    await asyncio.to_thread(self._store.spend, cost.calls, cost.tokens)

    def _steps_meant(self, work: Judgement) -> list[str]:
        """The earlier steps of the turn's task that the user's words are about as well."""
        said = "\n".join(s.text for s in work.next_states if s.source is Source.USER)
        steps = self._store.earlier_steps(work.turn.id) if said and work.turn.parent else []
        if not steps:
            return []
        request, calls = task_of(work.turn.request, self._profile)
        # Newest first on both sides: a history that was cut has fewer than were recorded.
        shown = list(zip(steps, reversed(calls), strict=False))
        return [shown[n][0] for n in steps_meant(said, [call for _, call in shown], request)]

    async def _retry_later(self, turn_id: str, reason: str) -> None:
        work = await asyncio.to_thread(self._store.judgement, turn_id)
        config = self._config
        attempts = work.attempts if work else 1
        delay_s = retry_delay_s(attempts, config.retry_initial_s, config.retry_max_s)
        await self.put_back(turn_id, delay_s, reason)
        self._counts.deferred += 1


def task_of(request: Json, profile: AgentProfile | None = None) -> tuple[str, list[str]]:
    """What the user asked last in a request, and what each reply since then says and calls."""
    asked, calls = "", list[str]()
    profile = profile and profile.of(request)
    for message in objects(request.get("messages")):
        said = said_in(message, profile)
        if said is not None and said[0] == Source.USER:  # not what the agent put there itself
            asked, calls = said[1], []
        elif message.get("role") == "assistant":
            calls.append(message_text(message))
    return asked, calls


def _load(store: Store, turn_id: str) -> Judgement:
    work = store.judgement(turn_id)
    if work is None:
        raise JudgeError("the turn is no longer in the store")
    return work


def _forget_done(held: dict[asyncio.Task[None], str]) -> None:
    """Takes finished work out of `held`; an error that putting back raised is logged here."""
    for task in [task for task in held if task.done()]:
        del held[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a turn stays leased until its lease expires", exc_info=error)
