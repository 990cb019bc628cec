"""Conversations in the files of others: ShareGPT, OpenAI's chat format, sessions of OpenClaw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

from nextstate.app.json_values import Broken, Found
from nextstate.errors import ConfigError
from nextstate.hooks import text_of
from nextstate.records import Json
from nextstate.wire import obj, objects, write_json

_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_KEYS = ("conversations", "conversation", "messages")


class Conversation(NamedTuple):
    """What was said before a reply, and the reply, the last one of the conversation."""

    messages: list[Json]
    """In OpenAI's form; the last one is the assistant's."""
    tools: list[Json]
    model: str


def read_conversations(
    found: Iterable[Found | Broken], name: str
) -> Iterator[Conversation | Broken | None]:
    """One for each conversation in a file; None for one in which no assistant answers anybody.

    Broken for what is none of the known forms, and for a session that lacks a broken entry.
    """
    session: list[Json | None] = []
    """The entries of OpenClaw's session that is being read, None for a broken one."""
    where = name
    read = 0
    for one in found:
        read = one.read
        if isinstance(one, Broken):
            yield one
            if session:
                session.append(None)
            continue
        value = one.value
        if value.get("type") == "session":
            yield from _of_session(session, where, read)
            session = cast("list[Json | None]", [value])
            where = f"{name}, line {one.line}"
        elif isinstance(value.get("type"), str) and (session or "parentId" in value):
            session = [*(session or [None]), value]
        else:
            yield from _of_session(session, where, read)
            session = []
            try:
                yield _of_record(value, f"{name}, line {one.line}")
            except ConfigError as error:
                yield Broken(str(error), read)
    yield from _of_session(session, where, read)


def _of_record(value: Json, where: str) -> Conversation | None:
    key = next((key for key in _KEYS if isinstance(value.get(key), list)), None)
    if key is None:
        raise ConfigError(
            f"{where}: expected a list under {' or '.join(_KEYS)}, or a session of OpenClaw, which "
            f'begins with {{"type": "session"}}; found the keys {_shown([*value])}'
        )
    told = cast("list[object]", value[key])
    messages = [_message(one, f"{where}, {key}[{number}]") for number, one in enumerate(told)]
    if isinstance(system := value.get("system"), str) and system:
        messages.insert(0, {"role": "system", "content": system})
    return _conversation(messages, objects(value.get("tools")), str(value.get("model") or ""))


def _message(told: object, where: str) -> Json:
    if not isinstance(told, dict):
        raise ConfigError(f"{where}: expected a message, found {str(told)[:40]!r}")
    message = cast("Json", told)
    if "from" in message:
        role = _SHAREGPT.get(str(message["from"]))
        if role is None or not isinstance(message.get("value"), str):
            raise ConfigError(
                f'{where}: expected {{"from", "value"}} with a text, from one of '
                f"{', '.join(_SHAREGPT)}; found {_shown([message['from']])}"
            )
        return {"role": role, "content": message["value"]}
    if message.get("role") not in _ROLES:
        raise ConfigError(
            f"{where}: expected a role of {', '.join(_ROLES)}; "
            f"found {_shown([message.get('role')])}"
        )
    content = cast(object, message.get("content"))
    if not isinstance(content, (str, list)) and not (content is None and "tool_calls" in message):
        raise ConfigError(f"{where}: expected a text or a list of parts as content")
    kept = ("role", "content", "tool_calls", "tool_call_id", "name")
    return {key: message[key] for key in kept if key in message}


def _of_session(
    entries: Sequence[Json | None], where: str, read: int
) -> Iterator[Conversation | Broken | None]:
    """The conversations of a session: a reset begins another one.

    Entries are a tree: what counts is the way from the last one to the root.
    """
    whole = [entry for entry in entries if entry is not None]
    if not whole:
        return
    by_id = {str(entry.get("id")): entry for entry in whole if entry.get("type") != "session"}
    is_tree = any("parentId" in entry for entry in whole)
    way: list[Json] = []
    at: Json | None = whole[-1]
    while is_tree and at is not None and len(way) < len(whole):
        way.append(at)
        at = by_id.get(str(at.get("parentId"))) if at.get("parentId") else None
    if is_tree:
        lacks = way[-1].get("parentId") and None in entries
    else:
        way = [*reversed(whole)]
        lacks = None in entries[: len(whole)]
    if lacks:
        yield Broken(f"{where}: this session is left out, because it needs a broken line", read)
        return
    messages: list[Json] = []
    model = ""
    for entry in reversed(way):
        if entry.get("type") == "reset":
            yield _conversation(messages, [], model)
            messages = []
        elif entry.get("type") == "message":
            message = obj(entry.get("message"))
            model = str(message.get("model") or model)
            messages += _session_message(message)
    yield _conversation(messages, [], model)


def _session_message(message: Json) -> list[Json]:
    """A message of OpenClaw in OpenAI's form, without thoughts; [] for what is none of them."""
    role, content = message.get("role"), cast(object, message.get("content"))
    text = text_of(content)
    if role == "user":
        return [{"role": "user", "content": text}]
    if role == "toolResult":
        called = str(message.get("toolCallId") or "")
        return [{"role": "tool", "content": text, "tool_call_id": called}]
    if role != "assistant":
        return []
    calls = [part for part in objects(content) if part.get("type") == "toolCall"]
    reply: Json = {"role": "assistant", "content": text}
    if calls:
        reply["tool_calls"] = [_call(call) for call in calls]
    return [reply] if text or calls else []


def _call(call: Json) -> Json:
    arguments = cast(object, call.get("arguments"))
    if not isinstance(arguments, str):
        arguments = write_json(arguments or {}).decode()
    function = {"name": str(call.get("name") or ""), "arguments": arguments}
    return {"id": str(call.get("id") or ""), "type": "function", "function": function}


def _conversation(messages: list[Json], tools: list[Json], model: str) -> Conversation | None:
    """It ends with its last reply: what follows that has none."""
    roles = [message["role"] for message in messages]
    last = max((n for n, role in enumerate(roles) if role == "assistant"), default=0)
    if "user" not in roles[:last]:
        return None
    return Conversation(messages[: last + 1], tools, model)


def _shown(values: Sequence[object]) -> str:
    return (", ".join(map(str, values)) or "none")[:80]
