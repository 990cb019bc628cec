"""The turn's prompt as it would be if the user had given the hint beforehand."""

from __future__ import annotations

from typing import Protocol, cast

from nextstate.records import Json, Turn
from nextstate.wire import integer, obj, objects

HINT_HEADER = "\n\n[hint]\n"
_RENDERING = (
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
    "media_io_kwargs",
    "mm_processor_kwargs",
)
_TEMPLATE_VARIABLES = ("documents", "reasoning_effort")


class Renderer(Protocol):
    """The part of the engine that judging needs."""

    async def tokenize(
        self, messages: list[Json], tools: list[Json] | None, extra: Json
    ) -> list[int]:
        """The token ids of the prompt that the chat template makes. Raises EngineError."""
        ...


async def hinted_prompt(turn: Turn, hint: str, engine: Renderer) -> tuple[int, ...] | None:
    """The token ids of the turn's prompt with the hint in it. Raises EngineError.

    None if the engine would cut the hint off, or did not render the turn's own prompt itself.
    """
    messages = [_renamed(message) for message in objects(turn.request.get("messages"))]
    tools = cast("list[Json] | None", turn.request.get("tools"))
    if obj(turn.request.get("kv_transfer_params")).get("prompt_token_ids") is not None:
        return None
    options = rendering_options(turn.request)
    ids = await engine.tokenize(hinted_messages(messages, hint), tools, options)
    return _truncated(tuple(ids), turn, hint)


def _truncated(ids: tuple[int, ...], turn: Turn, hint: str) -> tuple[int, ...] | None:
    """The prompt after the turn's `truncate_prompt_tokens`, which `/tokenize` does not know."""
    longest = integer(turn.request.get("truncate_prompt_tokens"))
    if longest is None:
        return ids
    if longest < 0:  # as long as fits; longer by more than the hint: the turn's own prompt was cut
        own, block = len(turn.prompt_ids or ()), len((HINT_HEADER + hint).encode())
        longest = own if len(ids) > own + block else len(ids)
    if len(ids) <= longest:
        return ids
    cut_at_end = turn.request.get("truncation_side") == "right"  # where the hint is
    return None if cut_at_end or not longest else ids[-longest:]


def _renamed(message: Json) -> Json:
    """The message with the new name of its thoughts; `/tokenize` does not know the old one."""
    thought = message.get("reasoning_content")
    if thought is None or message.get("reasoning") is not None:
        return message
    return {**message, "reasoning": thought}


def hinted_messages(messages: list[Json], hint: str) -> list[Json]:
    """A copy of `messages` whose last user message ends with the hint.

    If there is no user message, one with only the hint is added at the end. The input does not
    change; the copy shares the other messages with it.
    """
    block = HINT_HEADER + hint
    for position in range(len(messages) - 1, -1, -1):
        message = messages[position]
        if message.get("role") == "user":
            changed = {**message, "content": _appended(message.get("content"), block)}
            return [*messages[:position], changed, *messages[position + 1 :]]
    return [*messages, {"role": "user", "content": block}]


def rendering_options(request: Json) -> Json:
    """The fields of the request that change how the engine renders its messages."""
    options: Json = {key: request[key] for key in _RENDERING if request.get(key) is not None}
    variables = {key: request[key] for key in _TEMPLATE_VARIABLES if request.get(key) is not None}
    if variables:
        own: Json = options.get("chat_template_kwargs") or {}
        if "reasoning_effort" in variables:
            # vLLM's chat route derives this; its /tokenize route does not.
            own = {"enable_thinking": variables["reasoning_effort"] != "none", **own}
        options["chat_template_kwargs"] = {**own, **variables}
    return options


def _appended(content: object, block: str) -> object:
    if content is None:
        return block
    if isinstance(content, str):
        return content + block
    if isinstance(content, list):
        return [*content, {"type": "text", "text": block}]  # pyright: ignore[reportUnknownVariableType]
    raise TypeError(f"a message's content is text or a list of parts, not {type(content).__name__}")
