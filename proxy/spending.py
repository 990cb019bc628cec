"""How the calls of an episode share what is left of its tokens.

A call that runs holds what its replies may have at most. Others get what is then left, or wait for
its end. It holds that until its turn, with which its tokens count, is in the store. All of this is
forgotten when the proxy ends, as its calls are: after a kill nothing is counted twice or held.
Several workers tell each other by the store what their calls hold; of one that is silent, as after
a kill, nothing counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nextstate.records import Json
from nextstate.store.episodes import Left
from nextstate.wire import integer
from proxy.answers import Refused
from proxy.dialects import chat
from proxy.guard import prompts_of
from proxy.serving import CHAT, COMPLETIONS, RESPONSES

_WAIT_S = 60.0
"""How long a call waits for the tokens that others hold."""
_LOOK_S, _RARE_LOOK_S = 0.1, 2.0
"""Between two looks whether another worker has freed some: it doubles, up to the second."""
_COMPLETIONS_DEFAULT = 16
"""Tokens of a reply to `/v1/completions` whose request names no number."""


class Budget:
    """The tokens of one episode, as long as calls use it."""

    def __init__(self) -> None:
        self.held = 0
        """By calls that run."""
        self.users = 0
        """Calls that run or wait."""
        self.next = asyncio.Lock()
        """Of the call that begins."""
        self.freed = asyncio.Event()


class Budgets:
    """Those of the episodes that have calls now."""

    def __init__(self, wait_s: float = _WAIT_S, *, alone: bool = True) -> None:
        self._wait_s = wait_s
        self._looks_s = (wait_s, wait_s) if alone else (_LOOK_S, _RARE_LOOK_S)
        self._of: dict[str, Budget] = {}

    async def begin(
        self, episode: str, begin: Callable[[int], Awaitable[Left | None]], path: str, body: Json
    ) -> tuple[Json, Left, Callable[[], None]]:
        """(the request, cut to what is left, the budgets, what to call once its turn is stored).

        `begin` takes the tokens that other calls hold, and returns None if that is too much.
        Raises Refused if it stays so, and what `begin` does.
        """
        budget = self._of.setdefault(episode, Budget())
        budget.users += 1
        held = 0

        def free() -> None:
            budget.held -= held
            budget.users -= 1
            budget.freed.set()
            if not budget.users:
                del self._of[episode]

        try:
            async with asyncio.timeout(self._wait_s), budget.next:
                look_s, rare_s = self._looks_s
                while True:
                    budget.freed.clear()
                    if (left := await begin(budget.held)) is not None:
                        break
                    with suppress(TimeoutError):
                        await asyncio.wait_for(budget.freed.wait(), look_s)
                    look_s = min(2 * look_s, rare_s)
        except BaseException as error:
            free()
            if isinstance(error, TimeoutError):
                raise Refused(
                    429,
                    "Calls of this episode that still run may use all that is left of its "
                    "max_tokens: name max_tokens in each request, or send one after the other.",
                ) from None
            raise
        if left.tokens is not None:
            body, held = within(path, body, left.tokens)
            budget.held += held
        return body, left, free


def within(path: str, body: Json, tokens: int) -> tuple[Json, int]:
    """(a request whose replies have at most `tokens` tokens together, how many they may have).

    `tokens` is at least one for each reply.
    """
    replies = replies_of(path, body)
    most = tokens // replies
    name, asked = _asked(path, body)
    if asked is None or asked > most:
        return {**body, name: most}, most * replies
    return body, asked * replies


def wanted(path: str, body: Json) -> int | None:
    """How many tokens a request's replies may have together; None: as many as there are."""
    _, asked = _asked(path, body)
    return None if asked is None else asked * replies_of(path, body)


def _asked(path: str, body: Json) -> tuple[str, int | None]:
    """(the field that says how long each reply may be, its number or None if it says none).

    0 if that is no number: the engine says what is wrong with it.
    """
    name = {RESPONSES: "max_output_tokens"}.get(path, "max_tokens")
    if path == CHAT and body.get("max_completion_tokens") is not None:
        name = "max_completion_tokens"
    asked = body.get(name)
    if asked is None:
        return name, _COMPLETIONS_DEFAULT if path == COMPLETIONS else None
    return name, max(0, integer(asked) or 0)


def replies_of(path: str, body: Json) -> int:
    """How many replies a request asks for."""
    return chat.count(body) * prompts_of(body) if path in (CHAT, COMPLETIONS) else 1
