"""The votes on one turn: asked for at once, each within a time limit, and counted.

A vote that meets a busy server waits a moment and tries again.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass, fields

from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from judge.config import JudgeConfig
from nextstate.errors import BusyError, JudgeError
from nextstate.hooks import Evidence, JudgeKind
from nextstate.records import Vote

FIRST_RETRY_S = 0.5
"""About how many seconds a vote waits for a busy server the first time; it doubles."""
_ATTEMPTS = 3


@dataclass(slots=True)
class Counts:
    """What a judge stage has done since it started."""

    judged: int = 0
    """Turns whose verdict this stage settled."""
    deferred: int = 0
    """Attempts that ended without a verdict."""
    unparsed: int = 0
    """Votes without an answer: unreadable, late or refused."""
    calls: int = 0
    """Votes that were asked for."""
    tokens: int = 0
    """Tokens of the valid votes."""

    def add(self, other: Counts) -> None:
        """Adds the numbers of `other`."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


async def votes_on(
    evidence: Evidence,
    name: str,
    config: JudgeConfig,
    judge: JudgeKind,
    counts: Counts | None = None,
    first_retry_s: float = FIRST_RETRY_S,
) -> list[Vote]:
    """The valid votes; `name` seeds them. Raises JudgeError when no vote is valid.

    Of a judge that turns out not to be deterministic while it votes, the missing ones are asked.
    """
    first_seed = zlib.crc32(name.encode()) >> 1
    answers: list[Vote | JudgeError] = []
    while len(answers) < (wanted := 1 if judge.deterministic else config.votes):
        seeds = range(first_seed + len(answers), first_seed + wanted)
        asked = (_vote(judge, evidence, s, config.timeout_s, first_retry_s) for s in seeds)
        answers += await asyncio.gather(*asked)
    failures = [answer for answer in answers if isinstance(answer, JudgeError)]
    votes = [answer for answer in answers if isinstance(answer, Vote)]
    if counts is not None:
        counts.unparsed += len(failures)
        counts.calls += len(answers)
        counts.tokens += sum(vote.tokens for vote in votes)
    if not votes:
        raise JudgeError(f"none of {len(answers)} votes was valid: {failures[0]}") from failures[0]
    return votes


async def _vote(
    judge: JudgeKind, evidence: Evidence, seed: int, timeout_s: float, first_retry_s: float
) -> Vote | JudgeError:
    patiently = AsyncRetrying(
        retry=retry_if_exception_type(BusyError),
        wait=wait_random_exponential(multiplier=first_retry_s, max=timeout_s / 4),
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
