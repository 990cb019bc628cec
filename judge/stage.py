"""The judge stage: leases turns that have a next state, judges them, settles their verdicts.

It stands between the proxy, which records turns with what followed them, and the learner, which
trains on the verdicts; all three meet only in the store. A turn is settled once: a crash leaves a
lease that expires, and a second verdict on the same turn is refused by the store. A turn without a
valid vote, or whose hinted prompt the engine could not render, goes back with a growing delay and
is never charged to the policy.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

from judge.config import JudgeConfig
from judge.evidence import build_evidence
from judge.hinting import hinted_messages, rendering_options
from judge.verdict import verdict_of
from nextstate.errors import EngineError, JudgeError
from nextstate.hooks import Evidence, JudgeKind
from nextstate.records import Json, NextState, Turn, Verdict, Vote
from nextstate.store import Store

log = logging.getLogger(__name__)

IDLE_S = 0.05
"""Between two looks at an empty queue."""
FINISH_S = 2.0
"""How long votes under way may take once the stage is told to stop."""
_HELD_PER_PLACE = 2
"""Turns leased for each one judged at a time: leasing in batches keeps the store's share small."""
_MAX_DOUBLINGS = 30


class Renderer(Protocol):
    """The engine, as far as judging needs it."""

    async def tokenize(
        self, messages: list[Json], tools: list[Json] | None, extra: Json
    ) -> list[int]:
        """The ids of the prompt that the chat template makes of `messages`. Raises EngineError."""
        ...


@dataclass(slots=True)
class Counts:
    """What the stage has done since it started."""

    judged: int = 0
    """Turns whose verdict this stage settled."""
    deferred: int = 0
    """Attempts that ended without a verdict."""
    unparsed: int = 0
    """Votes that gave no answer: unreadable, late or refused."""


async def run(
    store: Store,
    config: JudgeConfig,
    judge: JudgeKind,
    engine: Renderer,
    stop: asyncio.Event,
    counts: Counts | None = None,
) -> None:
    """Judges until `stop`; then finishes what is under way, or puts it back after FINISH_S.

    The caller owns `judge` and `engine` and closes them. `counts` is kept up to date when given.
    """
    worker = _Worker(store, config, judge, engine, counts or Counts())
    held: dict[asyncio.Task[None], str] = {}
    stopping = asyncio.create_task(stop.wait())
    try:
        while not stop.is_set():
            free = config.parallel * _HELD_PER_PLACE - len(held)
            leased = await worker.lease(free) if free >= config.parallel else []
            for turn_id in leased:
                held[asyncio.create_task(worker.settle(turn_id))] = turn_id
            if len(held) > config.parallel * (_HELD_PER_PLACE - 1):
                await asyncio.wait({*held, stopping}, return_when=asyncio.FIRST_COMPLETED)
            elif not leased:
                await asyncio.wait({stopping}, timeout=IDLE_S)
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
) -> Verdict:
    """The verdict on one turn.

    Raises JudgeError when no vote was valid, EngineError when the hinted prompt of a trainable
    turn could not be rendered.
    """
    evidence = build_evidence(turn, states, config.tail_messages, config.max_chars)
    votes = await votes_on(evidence, turn.id, config, judge, counts)
    verdict = verdict_of(turn.id, judge.name, votes, evidence.reply)
    assert verdict is not None
    if verdict.hint is None or not turn.trainable:
        return verdict
    messages = cast("list[Json]", turn.request.get("messages") or [])
    tools = cast("list[Json] | None", turn.request.get("tools"))
    ids = await engine.tokenize(
        hinted_messages(messages, verdict.hint), tools, rendering_options(turn.request)
    )
    return replace(verdict, hinted_prompt_ids=tuple(ids))


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
    if counts is not None:
        counts.unparsed += len(failures)
    votes = [answer for answer in answers if isinstance(answer, Vote)]
    if not votes:
        raise JudgeError(f"none of {wanted} votes was valid: {failures[0]}") from failures[0]
    return votes


def retry_delay_s(attempts: int, initial_s: float, max_s: float) -> float:
    """The wait after the `attempts`-th attempt (from 1): doubling, bounded.

    >>> [retry_delay_s(n, 5.0, 60.0) for n in (1, 2, 3, 9)]
    [5.0, 10.0, 20.0, 60.0]
    """
    return min(max_s, initial_s * 2.0 ** min(max(attempts - 1, 0), _MAX_DOUBLINGS))


async def _vote(
    judge: JudgeKind, evidence: Evidence, seed: int, timeout_s: float
) -> Vote | JudgeError:
    try:
        async with asyncio.timeout(timeout_s):
            return await judge.vote(evidence, seed)
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
    ) -> None:
        self._store = store
        self._config = config
        self._judge = judge
        self._engine = engine
        self._counts = counts
        self._places = asyncio.Semaphore(config.parallel)
        # Threads that meet at SQLite's write lock sleep for milliseconds; tasks here just queue.
        self._writing = asyncio.Lock()

    async def lease(self, limit: int) -> list[str]:
        """Takes up to `limit` turns out of the store's queue."""
        async with self._writing:
            return await asyncio.to_thread(
                self._store.lease_judgements, limit, self._config.lease_s
            )

    async def settle(self, turn_id: str) -> None:
        """Judges one leased turn; whatever goes wrong, the row is settled or put back."""
        try:
            async with self._places:
                turn, states = await asyncio.to_thread(_load, self._store, turn_id)
                verdict = await judge_turn(
                    turn, states, self._config, self._judge, self._engine, self._counts
                )
            async with self._writing:
                settled = await asyncio.to_thread(self._store.settle_verdict, verdict)
            self._counts.judged += settled
        except (JudgeError, EngineError) as error:
            log.info("no verdict yet: %s", error, extra={"turn": turn_id})
            await self._retry_later(turn_id, str(error))
        except Exception as error:
            log.exception("judging failed", extra={"turn": turn_id})
            await self._retry_later(turn_id, f"{type(error).__name__}: {error}")

    async def put_back(self, turn_id: str, delay_s: float, reason: str) -> None:
        """Returns a leased turn to the queue; a settled one stays settled."""
        async with self._writing:
            await asyncio.to_thread(self._store.defer_judgement, turn_id, delay_s, reason)

    async def _retry_later(self, turn_id: str, reason: str) -> None:
        attempts = await asyncio.to_thread(self._store.judgement_attempts, turn_id)
        config = self._config
        delay_s = retry_delay_s(attempts, config.retry_initial_s, config.retry_max_s)
        await self.put_back(turn_id, delay_s, reason)
        self._counts.deferred += 1


def _load(store: Store, turn_id: str) -> tuple[Turn, tuple[NextState, ...]]:
    turn = store.turn(turn_id)
    if turn is None:
        raise JudgeError("the turn is no longer in the store")
    return turn, store.next_states(turn_id)


def _forget_done(held: dict[asyncio.Task[None], str]) -> None:
    """Takes finished work out of `held`; an error that putting back raised is logged here."""
    for task in [task for task in held if task.done()]:
        del held[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a turn stays leased until its lease expires", exc_info=error)
