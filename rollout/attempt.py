"""One episode: the agent asks the model for actions and gives them to the environment.

The agent is this loop: a message from the environment, a reply, the next message. Or the
environment brings a program that asks the model itself. The episode is closed in every case:

    done        the agent ended it             truncated   at a budget; what it reached counts
    failed      environment or proxy broke     aborted     the runner was stopped
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from nextstate.episodes import EpisodeStatus
from nextstate.errors import LateError, RefusedError, RolloutError
from nextstate.hooks import AgentProgram, Environment, ModelAccess
from nextstate.records import Json
from rollout.proxy import Opened, ProxyClient
from rollout.tasks import Task

log = logging.getLogger(__name__)

_CLOSE_S = 30.0
"""How long an environment may take to release what it has."""
_BUDGET = "EpisodeBudgetError"


@dataclass(slots=True)
class Attempt:
    """What came of one episode."""

    episode: str
    task: Task
    status: EpisodeStatus = EpisodeStatus.FAILED
    outcome: float | None = None
    calls: int = 0
    """Replies of the model."""
    model_s: float = 0.0
    environment_s: float = 0.0
    reason: str | None = None
    """Why it failed."""
    rewards: list[tuple[str | int, float]] = field(default_factory=list[tuple[str | int, float]])
    """(turn or number of the step, process reward) of the steps that have one."""


async def play(
    proxy: ProxyClient,
    opened: Opened,
    environment: Environment | AgentProgram,
    task: Task,
    seed: int,
    max_calls: int,
    deadline_s: float,
) -> Attempt:
    """Plays one episode and closes it; a failure is told in the result, and not raised."""
    attempt = Attempt(opened.episode, task)
    limit = asyncio.timeout(deadline_s)
    try:
        try:
            async with limit:
                if isinstance(environment, AgentProgram):
                    shown = await _program(proxy, opened, environment, attempt, seed, deadline_s)
                else:
                    shown = await _steps(proxy, opened, environment, attempt, seed, max_calls)
        except TimeoutError:
            if not limit.expired():
                raise  # the environment's own
            attempt.status, shown = EpisodeStatus.TRUNCATED, None
        if isinstance(environment, AgentProgram):
            attempt.calls = await proxy.calls(opened)
        if not attempt.calls:
            if shown is None:
                raise RolloutError(f"the model did not reply within {deadline_s:g} s")
            raise RolloutError(f"the agent's program did not call the model: {shown[-200:]!r}")
        try:
            with _Clock(attempt, "environment_s"):
                async with asyncio.timeout(deadline_s):
                    scored = await environment.score()
        except TimeoutError:
            raise RolloutError(f"the outcome was not known after {deadline_s:g} s") from None
        attempt.outcome = scored.outcome
        attempt.rewards += scored.steps.items()
        told = "\n".join(text for text in (shown, scored.observation) if text) or None
        await proxy.close(opened, attempt.status, scored.outcome, told, attempt.rewards)
    except Exception as error:  # of the proxy, the environment, or a mistake in its plugin
        known = isinstance(error, RolloutError)
        attempt.status, attempt.outcome = EpisodeStatus.FAILED, None
        attempt.reason = str(error) if known else f"the environment raised {type(error).__name__}"
        log.warning("failed: %s episode=%s", attempt.reason, opened.episode, exc_info=not known)
        await proxy.give_up(opened, EpisodeStatus.FAILED)
    except BaseException:
        await proxy.give_up(opened, EpisodeStatus.ABORTED)
        raise
    finally:
        await _close(environment)
    return attempt


async def _program(
    proxy: ProxyClient,
    opened: Opened,
    program: AgentProgram,
    attempt: Attempt,
    seed: int,
    deadline_s: float,
) -> str:
    """Runs an agent that calls the model itself; returns what it said last."""
    access = ModelAccess(opened.base_url, opened.api_key, proxy.model, deadline_s)
    with _Clock(attempt, "environment_s"):
        try:
            shown = await program.play(attempt.task.fields, seed, access)
        except LateError as late:
            attempt.status = EpisodeStatus.TRUNCATED
            return str(late)
    attempt.status = EpisodeStatus.DONE
    return shown


async def _steps(
    proxy: ProxyClient,
    opened: Opened,
    environment: Environment,
    attempt: Attempt,
    seed: int,
    max_calls: int,
) -> str:
    """Steps until the agent ends the episode or a budget does; returns the last observation."""
    with _Clock(attempt, "environment_s"):
        shown = await environment.reset(attempt.task.fields, seed)
    messages: list[Json] = [{"role": "user", "content": shown}]
    attempt.status = EpisodeStatus.TRUNCATED
    while attempt.calls < max_calls:
        try:
            with _Clock(attempt, "model_s"):
                reply = await proxy.call(opened, messages)
        except RefusedError as error:
            # What changes from call to call is the length of the messages: vLLM refuses with 400
            # those that are longer than its context.
            if attempt.calls and (error.kind == _BUDGET or error.status == 400):
                break
            raise
        attempt.calls += 1
        with _Clock(attempt, "environment_s"):
            # Without a reasoning parser in the engine, thoughts stand in the text.
            acted = await environment.step(reply.text.rpartition("</think>")[2])
        shown = acted.observation
        if acted.reward is not None and reply.turn is not None:
            attempt.rewards.append((reply.turn, acted.reward))
        if acted.done:
            attempt.status = EpisodeStatus.DONE
            break
        messages.append({"role": "assistant", "content": reply.text})
        messages.append({"role": "user", "content": shown})
    return shown


async def _close(environment: Environment | AgentProgram) -> None:
    try:
        async with asyncio.timeout(_CLOSE_S):
            await environment.close()
    except Exception:  # a mistake in a plugin; the episode has ended
        log.exception("an environment was not closed")


class _Clock:
    """Adds the seconds of a block to a field of an attempt."""

    def __init__(self, attempt: Attempt, name: str) -> None:
        self._attempt, self._name = attempt, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = getattr(self._attempt, self._name) + time.monotonic() - self._began
        setattr(self._attempt, self._name, spent)
