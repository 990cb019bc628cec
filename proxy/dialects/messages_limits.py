"""Which Messages requests the chat route answers exactly as vLLM's own /v1/messages does.

What vLLM refuses, what the chat route would refuse or take otherwise, and what depends on the
model's template is not among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard, cast

from nextstate.records import Json
from nextstate.wire import obj, objects

_Kinds = tuple[type, ...]

_BODY: dict[str, _Kinds] = {
    "metadata": (dict,),
    "output_config": (dict,),
    "thinking": (dict,),
    "stop_sequences": (list,),
    "stream": (bool,),
    "system": (str, list),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "tool_choice": (dict,),
    "tools": (list,),
    "chat_template_kwargs": (dict,),
    "cache_salt": (str,),
}
_BLOCK: dict[str, _Kinds] = {
    **dict.fromkeys(("text", "id", "tool_use_id", "name", "tool_name"), (str,)),
    **dict.fromkeys(("thinking", "signature", "data"), (str,)),
    **dict.fromkeys(("source", "input"), (dict,)),
    "content": (str, list),
    "is_error": (bool,),
    "tool": (),
}
_TOOL: dict[str, _Kinds] = {"description": (str,), "strict": (bool,), "defer_loading": (bool,)}
_UNPROVEN = frozenset(
    {
        *("mm_payload", "return_mm_kwargs", "watermarking", "vllm_xargs"),
        *("kv_transfer_params", "ec_transfer_params"),
    }
)
_PROVEN_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_DEPTH = 200
"""Deeper JSON is not encoded again: orjson stops at 254 levels, the json module near 1,000."""


def reasons(body: Json) -> Iterator[str]:
    """Why the chat route would not, or might not, serve the request as /v1/messages does."""
    if not encodes(body):
        yield "the request nests deeper or counts higher than can be passed on exactly"
        return
    for name in sorted(_UNPROVEN & body.keys()):
        yield f"the request sets {name}"
    yield from _wrong(body, _BODY, "the request")
    if not isinstance(body.get("model"), str) or not body["model"]:
        yield "the request names no model"
    if type(body.get("max_tokens")) is not int or body["max_tokens"] < 1:
        yield "the request has no max_tokens"
    if not all(isinstance(text, str) for text in body.get("stop_sequences") or ()):
        yield "a stop sequence is not a text"
    yield from _reasoning_reasons(body)
    yield from _tool_reasons(body)
    if _is_list(body.get("system")):
        yield from _content_reasons("system", body["system"])
    yield from _message_reasons(body)


def _reasoning_reasons(body: Json) -> Iterator[str]:
    thinking = obj(body.get("thinking"))
    if body.get("thinking") is not None and (
        thinking.get("type") != "adaptive"
        or thinking.get("display") not in (None, "summarized", "omitted", "updates")
    ):
        yield "the request sets thinking"
    output = obj(body.get("output_config"))
    if output.get("effort") not in (None, *_EFFORTS):
        yield "the request sets an unknown effort"
    yield from _wrong(output, {"format": (dict,)}, "output_config")
    form = obj(output.get("format"))
    yield from _wrong(form, {"schema": (dict,)}, "the output format")
    if form.get("type", "json_schema") != "json_schema":
        yield "the request sets an unknown output format"


def _tool_reasons(body: Json) -> Iterator[str]:
    tools = body.get("tools")
    if _is_list(tools):
        if not tools:
            yield "the request has an empty list of tools"
        for tool in _items(tools):
            if not isinstance(tool.get("name"), str):
                yield "a tool has no name"
            if not isinstance(tool.get("input_schema"), dict):
                yield "a tool has no input schema"
            yield from _wrong(tool, _TOOL, "a tool")
    if body.get("tool_choice") is None:
        return
    choice = obj(body["tool_choice"])
    yield from _wrong(choice, {"name": (str,), "disable_parallel_tool_use": (bool,)}, "tool_choice")
    names = [tool.get("name") for tool in objects(tools)]
    kind = choice.get("type")
    if kind == "tool":
        if not choice.get("name") or choice["name"] not in names:
            yield "tool_choice names no tool of the request"
    elif kind not in ("auto", "any", "none"):
        yield "tool_choice is of an unknown type"
    elif kind != "none" and not names:
        yield "the request sets tool_choice without tools"


def _message_reasons(body: Json) -> Iterator[str]:
    messages = body.get("messages")
    if not _is_list(messages) or not messages:
        yield "the request has no messages"
        return
    for message in _items(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _PROVEN_BLOCKS:
            yield "a message has an unknown role"
        elif _is_list(content):
            yield from _content_reasons(role, content)
        elif not isinstance(content, str):
            yield "a message has no content"
    # Where other system messages go depends on what the model's chat template allows.
    inline = [i for i, m in enumerate(objects(messages)) if m.get("role") == "system"]
    if inline not in ([], [0]) or (inline and body.get("system")):
        yield "a system message stands among the messages"


def _content_reasons(role: str, content: list[Any]) -> Iterator[str]:
    for block in _items(content):
        kind = block.get("type")
        if kind not in _PROVEN_BLOCKS[role]:
            yield f"a message of the {role} holds a block of type {str(kind)[:40]}"
        yield from _wrong(block, _BLOCK, "a block")
        if kind == "tool_use" and not (block.get("id") and block.get("name")):
            yield "a tool_use block lacks its id or its name"
        if _is_list(block.get("content")):
            yield from _result_reasons(block["content"])


def _result_reasons(content: list[Any]) -> Iterator[str]:
    if len(objects(content)) != len(content):
        yield "a tool's result holds something that is no block"
    for item in objects(content):
        if item.get("type") in ("image", "tool_reference"):
            yield f"a tool's result holds a block of type {item['type']}"
        elif item.get("type") == "text" and not isinstance(item.get("text", ""), str):
            yield "a tool's result holds a text that is none"


def _wrong(value: Json, kinds: dict[str, _Kinds], owner: str) -> Iterator[str]:
    """The fields of `value` that are set to something of another type."""
    for name, allowed in kinds.items():
        if value.get(name) is not None and type(value[name]) not in allowed:
            yield f"{owner} sets {name} to a {type(value[name]).__name__}"


def _items(values: list[Any]) -> list[Json]:
    """The objects in a list, with an empty one, which is refused, for all else."""
    return [obj(value) for value in values]


def encodes(body: Json) -> bool:
    """Whether no value nests too deep, or is a number that was rounded when it was read."""
    level: list[object] = [body]
    for _ in range(_DEPTH):
        # Integers beyond 64 bits become floats in orjson, but not in vLLM.
        if any(isinstance(value, float) and abs(value) >= 2**63 for value in level):
            return False
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return True
    return False


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _inner(value: object) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(cast(Json, value).values())
    return value if _is_list(value) else ()
