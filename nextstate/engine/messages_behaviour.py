"""What vLLM's own /v1/messages does with three things that its chat route reads differently.

They depend on the model's chat template and on the server's options. The server shows neither, so
it is asked how many tokens a few small prompts have.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nextstate.errors import EngineError
from nextstate.records import Json

if TYPE_CHECKING:
    from nextstate.engine.client import EngineClient

log = logging.getLogger(__name__)

_Found = TypeVar("_Found")
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_HELLO: list[Json] = [{"role": "user", "content": "Hi"}]
_FIRST, _LATER = "Be brief. ", "Be kind."


@dataclass(frozen=True, slots=True)
class MessagesBehaviour:
    """Each field is None if it is not known."""

    merges_system: bool | None = None
    """Whether system messages among the others are moved into the one at the start."""
    disabled_effort: str | None = None
    """The reasoning effort that `thinking: {"type": "disabled"}` stands for."""
    shows_no_tools: bool | None = None
    """Whether an empty list of tools gives another prompt than no list."""


async def learn_messages_behaviour(engine: EngineClient) -> MessagesBehaviour:
    """Asks the engine. Never raises EngineError: a question that fails leaves None."""
    return MessagesBehaviour(
        await _or_unknown(_merges_system(engine)),
        await _or_unknown(_disabled_effort(engine)),
        await _or_unknown(_shows_no_tools(engine)),
    )


async def _or_unknown(learning: Awaitable[_Found]) -> _Found | None:
    try:
        return await learning
    except EngineError as error:
        log.debug("the behaviour of /v1/messages cannot be found out: %s", error)
        return None


async def _merges_system(engine: EngineClient) -> bool:
    talk: list[Json] = [{"role": "assistant", "content": "Hello."}, *_HELLO]
    among = [*_HELLO, {"role": "system", "content": _LATER}, *talk]
    given = await engine.count_tokens(among, {"system": _FIRST})
    return given == await engine.count_tokens([*_HELLO, *talk], {"system": _FIRST + _LATER})


async def _disabled_effort(engine: EngineClient) -> str | None:
    """By vLLM's own rule: "none" if the template renders it unlike every effort, else "low".

    None if the engine's options say otherwise.
    """
    counted = await engine.count_tokens(_HELLO, {"thinking": {"type": "disabled"}})
    rendered = {effort: await _rendered(engine, effort) for effort in ("none", *_EFFORTS)}
    none = rendered["none"]
    ignored = none is None or none in [rendered[effort] for effort in _EFFORTS]
    effort = "low" if ignored else "none"
    prompt = rendered[effort]
    return effort if prompt is not None and len(prompt) == counted else None


async def _rendered(engine: EngineClient, effort: str) -> list[int] | None:
    switches = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    try:
        return await engine.tokenize(_HELLO, None, {"chat_template_kwargs": switches})
    except EngineError:
        return None


async def _shows_no_tools(engine: EngineClient) -> bool:
    return await engine.count_tokens(_HELLO, {}) != await engine.count_tokens(_HELLO, {"tools": []})
