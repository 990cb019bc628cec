"""Which Messages requests the chat route answers as vLLM's own /v1/messages does.

A request is not among them if vLLM refuses it, if the chat route would refuse or read it
differently, or if its prompt depends on engine behaviour that is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard, cast

from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.records import Json
from nextstate.wire import obj, objects
from proxy.dialects.messages_tools import tool_changes, tools_in_effect

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
    "tool": (dict,),
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
    "system": ("text", "tool_addition", "tool_removal"),
}
_DISPLAYS = (None, "summarized", "omitted", "updates")
_LEAST_BUDGET = 1024
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_DEPTH = 200
"""Deeper JSON cannot be written safely: orjson stops at 254 levels, the json module near 1,000."""


def reasons(body: Json, behaviour: MessagesBehaviour) -> Iterator[str]:
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
    yield from _thinking_reasons(body, behaviour)
    yield from _output_reasons(body)
    yield from _tool_reasons(body, behaviour)
    if _is_list(body.get("system")):
        yield from _content_reasons("system", body["system"])
        if any(block.get("type") != "text" for block in objects(body["system"])):
            yield "the system prompt holds something that is no text"
    yield from _message_reasons(body, behaviour)


def _thinking_reasons(body: Json, behaviour: MessagesBehaviour) -> Iterator[str]:
    thinking = obj(body.get("thinking"))
    kind = thinking.get("type")
    if body.get("thinking") is None:
        return
    if kind not in ("adaptive", "enabled", "disabled"):
        yield "the request sets thinking to something unknown"
    if kind != "disabled" and thinking.get("display") not in _DISPLAYS:
        yield "the request sets an unknown display of its thinking"
    if kind == "disabled" and behaviour.disabled_effort is None:
        yield "the request disables thinking, and how the engine does that is not known"
    if kind != "enabled":
        return
    given = (thinking.get("budget_tokens"), body.get("max_tokens"))
    budget, limit = (count if type(count) is int else 0 for count in given)
    if budget < _LEAST_BUDGET:
        yield "the request has no budget for its thinking"
    elif budget >= limit:
        yield "the request's thinking may be longer than its reply"


def _output_reasons(body: Json) -> Iterator[str]:
    output = obj(body.get("output_config"))
    if output.get("effort") not in (None, *_EFFORTS):
        yield "the request sets an unknown effort"
    yield from _wrong(output, {"format": (dict,)}, "output_config")
    form = obj(output.get("format"))
    yield from _wrong(form, {"schema": (dict,)}, "the output format")
    if form.get("type", "json_schema") != "json_schema":
        yield "the request sets an unknown output format"


def _tool_reasons(body: Json, behaviour: MessagesBehaviour) -> Iterator[str]:
    changes = tool_changes(body)
    names = [tool.get("name") for tool in objects(body.get("tools"))]
    for tool in _items(body["tools"]) if _is_list(body.get("tools")) else ():
        yield from _definition_reasons(tool)
    for change, named in changes:
        if "input_schema" in named and change == "tool_addition":
            yield from _definition_reasons(named)
            names.append(named.get("name"))
        elif named.get("type") != "tool_reference" or named.get("name") not in names:
            yield f"a {change} names no tool of the request"
    listed = changes or body.get("tools") is not None
    if listed and not tools_in_effect(body) and behaviour.shows_no_tools is not False:
        yield "the request has an empty list of tools, which its model might be shown"
    if body.get("tool_choice") is None:
        return
    choice = obj(body["tool_choice"])
    yield from _wrong(choice, {"name": (str,), "disable_parallel_tool_use": (bool,)}, "tool_choice")
    names = [tool.get("name") for tool in tools_in_effect(body)]
    kind = choice.get("type")
    if kind == "tool":
        if not choice.get("name") or choice["name"] not in names:
            yield "tool_choice names no tool of the request"
    elif kind not in ("auto", "any", "none"):
        yield "tool_choice is of an unknown type"
    elif kind != "none" and not names:
        yield "the request sets tool_choice without tools"


def _definition_reasons(tool: Json) -> Iterator[str]:
    if not isinstance(tool.get("name"), str):
        yield "a tool has no name"
    if not isinstance(tool.get("input_schema"), dict):
        kind = str(tool.get("type"))[:40]
        yield f"a tool has no input schema (type {kind}: only Anthropic's servers have it)"
    yield from _wrong(tool, _TOOL, "a tool")


def _message_reasons(body: Json, behaviour: MessagesBehaviour) -> Iterator[str]:
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
    inline = [i for i, m in enumerate(objects(messages)) if m.get("role") == "system"]
    alone = inline in ([], [0]) and not (inline and body.get("system"))
    if not alone and behaviour.merges_system is None:
        yield "a system message stands among the others, and where the engine puts it is not known"


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
        if item.get("type") == "image":
            yield "a tool's result holds an image"
        elif item.get("type") == "tool_reference":
            yield from _wrong(item, {"tool_name": (str,), "name": (str,)}, "a tool_reference")
        elif item.get("type") == "text" and not isinstance(item.get("text", ""), str):
            yield "a tool's result holds a text block without text"


def _wrong(value: Json, kinds: dict[str, _Kinds], owner: str) -> Iterator[str]:
    """The fields of `value` that are set to something of another type."""
    for name, allowed in kinds.items():
        if value.get(name) is not None and type(value[name]) not in allowed:
            yield f"{owner} sets {name} to a {type(value[name]).__name__}"


def _items(values: list[Any]) -> list[Json]:
    """The objects in a list. Anything else becomes an empty object, which is refused."""
    return [obj(value) for value in values]


def encodes(body: Json) -> bool:
    """Whether the request can be written as it was: not nested too deep, no rounded numbers."""
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
