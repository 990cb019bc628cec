"""Messages requests whose answers are compared with vLLM's own, and how they are compared."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator

import orjson

from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.records import Json
from proxy.dialects.chat import Asked, client_chunk, client_reply, upstream_request
from proxy.dialects.messages import Events, encode, from_chat, to_chat
from proxy.sse import EventSplitter, event_data
from tests.running_loop import Engine

# The engine's own answers


def post(engine: Engine, path: str, body: Json) -> tuple[int, str, bytes]:
    """Status, content type and body of vLLM's answer."""
    headers = {"Content-Type": "application/json", **engine.headers}
    request = urllib.request.Request(engine.url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def payloads(stream: bytes) -> Iterator[bytes]:
    """The data of each event of a whole stream."""
    for event in EventSplitter().feed(stream):
        data = event_data(event)
        if data is not None:
            yield data


def through_chat(
    engine: Engine, body: Json, behaviour: MessagesBehaviour
) -> tuple[int, str, bytes]:
    """What a client gets that is served through /v1/chat/completions."""
    chat = to_chat(body, behaviour).chat
    status, kind, data = post(engine, "/v1/chat/completions", upstream_request(chat, engine.model))
    if status != 200:
        return status, kind, data
    asked = Asked.of(chat, engine.model)
    if not body.get("stream"):
        reply = from_chat(client_reply(orjson.loads(data), asked))
        return (status, kind, encode(reply)) if reply is not None else (0, kind, data)
    events = Events()
    sent = b""
    for payload in payloads(data):
        if payload == b"[DONE]":
            sent += events.done()
            continue
        chunk = client_chunk(orjson.loads(payload), asked, None)
        sent += b"" if chunk is None else events.feed(chunk)
    return status, kind, sent


def same_but_random(answer: tuple[int, str, bytes]) -> tuple[int, str, bytes]:
    """Without what is random: ids, signatures, and which tokens share an event."""
    status, kind, data = answer
    data = re.sub(rb'"chatcmpl-(tool-)?[0-9a-f-]+"', rb'"id-\1"', data)
    return status, kind, joined(unsigned(data))


def unsigned(data: bytes) -> bytes:
    return re.sub(rb'"signature":"[0-9a-f]{32}"', b'"signature":"random"', data)


def joined(stream: bytes) -> bytes:
    """The stream with one event for deltas in a row: an engine that is late joins tokens."""
    events: list[bytes] = []
    last = None
    for event in stream.split(b"\n\n"):
        delta = re.fullmatch(
            rb'(event: content_block_delta\ndata: .*"(?:text|thinking|partial_json)":")(.*)'
            rb'("},"index":\d+})',
            event,
        )
        ends = (delta[1], delta[3]) if delta else None
        if delta and ends == last:
            events[-1] = events[-1][: -len(delta[3])] + delta[2] + delta[3]
        else:
            events.append(event)
        last = ends
    return b"\n\n".join(events)


def ask(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


REFERENCE = {"type": "tool_reference", "name": "add"}


def changing(change: str, tool: Json) -> Json:
    """A message that adds a tool to the request, or takes one away."""
    return {"role": "system", "content": [{"type": change, "tool": tool}]}


QUESTION = "Tom has 3 apples and gets 4 more. How many apples does Tom have?"
WEATHER: Json = {
    "name": "get_weather",
    "description": "The weather in a city — now",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "cache_control": {"type": "ephemeral"},
}
YES: Json = {
    "name": "say_yes",
    "input_schema": {
        "properties": {"yes": {"type": "boolean", "enum": [True]}},
        "required": ["yes"],
        "additionalProperties": False,
    },
}
EXACT: Json = {
    "name": "ok",
    "input_schema": {"enum": [{"city": "Köln 🍎", "none": None, "far": 1e16}]},
    "strict": True,
}
"""The tiny model calls this one well: the grammar leaves it a single way."""
CALLED: list[Json] = [
    *ask("Weather in Köln and Paris?"),
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Two cities.", "signature": "x"},
            {"type": "redacted_thinking", "data": "e30="},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Köln"}},
            {"type": "tool_use", "id": "t2", "name": "get_weather", "input": {"city": "Paris"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "12 °C"},
            {"type": "text", "text": "Then?"},
            {
                "type": "tool_result",
                "tool_use_id": "t2",
                "is_error": True,
                "content": [
                    {"type": "text", "text": "no"},
                    {"type": "document", "title": "ignored"},
                    {"type": "text", "text": "data"},
                ],
            },
            {"type": "text", "text": "Go on."},
        ],
    },
]
MATRIX: dict[str, Json] = {
    "plain": {"messages": ask(QUESTION)},
    "unicode": {"messages": ask('Größe? 数を数えて 🍎 \u2028 \x7f \\ "')},
    "one token": {"messages": ask(QUESTION), "max_tokens": 1},
    "system text": {"messages": ask(QUESTION), "system": "Be brief."},
    "system empty": {"messages": ask(QUESTION), "system": ""},
    "system blocks": {
        "messages": ask(QUESTION),
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": " Be kind."},
        ],
    },
    "system billing text": {"messages": ask(QUESTION), "system": "x-anthropic-billing-header: 1"},
    "system message": {"messages": [{"role": "system", "content": "Be brief."}, *ask(QUESTION)]},
    "system message billing": {
        "messages": [
            {"role": "system", "content": "x-anthropic-billing-header: 1"},
            *ask(QUESTION),
        ]
    },
    "several turns": {
        "messages": [
            *ask(QUESTION),
            {"role": "assistant", "content": "Tom has 7."},
            *ask("And if he eats 2?"),
        ]
    },
    "empty reply in history": {
        "messages": [
            *ask(QUESTION),
            {"role": "assistant", "content": [{"type": "text", "text": ""}]},
            {"role": "user", "content": [{"type": "text", "text": ""}]},
            {"role": "user", "content": ""},
            *ask("Well?"),
        ]
    },
    "several text blocks": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Tom has 3."}, {"type": "text", "text": "?"}],
            },
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "Three."}, {"type": "text", "text": "Yes."}],
            },
            *ask("Sure?"),
        ]
    },
    "prefill": {"messages": [*ask(QUESTION), {"role": "assistant", "content": "Tom has"}]},
    "tool results": {"messages": CALLED, "tools": [WEATHER]},
    "tool results, no tools": {"messages": CALLED},
    "tool result alone": {
        "messages": [
            *ask("Say yes."),
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t", "name": "say_yes", "input": {}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]},
        ],
        "tools": [YES],
    },
    "tools auto by default": {"messages": ask(QUESTION), "tools": [WEATHER, YES]},
    "tools auto": {
        "messages": ask("Weather in Paris?"),
        "tools": [WEATHER],
        "tool_choice": {"type": "auto"},
    },
    "tools auto, one": {
        "messages": ask("Weather in Paris?"),
        "tools": [WEATHER],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    },
    "tools any": {"messages": ask("Yes?"), "tools": [YES], "tool_choice": {"type": "any"}},
    "tools any, one": {
        "messages": ask("Yes?"),
        "tools": [YES],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    },
    "tools named": {
        "messages": ask("Yes?"),
        "tools": [WEATHER, YES],
        "tool_choice": {"type": "tool", "name": "say_yes"},
    },
    "tools none": {
        "messages": ask(QUESTION),
        "tools": [WEATHER],
        "tool_choice": {"type": "none", "disable_parallel_tool_use": True},
    },
    "none without tools": {"messages": ask(QUESTION), "tool_choice": {"type": "none"}},
    "tool called": {
        "messages": ask(QUESTION),
        "tools": [EXACT],
        "tool_choice": {"type": "any"},
        "max_tokens": 100,
    },
    "tool called by name": {
        "messages": ask(QUESTION),
        "tools": [WEATHER, EXACT],
        "tool_choice": {"type": "tool", "name": "ok", "disable_parallel_tool_use": True},
        "max_tokens": 100,
    },
    "strict tool": {
        "messages": ask(QUESTION),
        "tools": [{**YES, "strict": True, "defer_loading": False}],
    },
    "stop sequence": {"messages": ask(QUESTION), "stop_sequences": ["e", "a", " "]},
    "stop sequence unmet": {"messages": ask(QUESTION), "stop_sequences": ["\u2603"]},
    "no stop sequences": {"messages": ask(QUESTION), "stop_sequences": []},
    "tool cut by a stop": {
        "messages": ask("Yes?"),
        "tools": [YES],
        "tool_choice": {"type": "tool", "name": "say_yes"},
        "stop_sequences": ["yes"],
    },
    "sampling": {"messages": ask(QUESTION), "temperature": 1, "top_p": 0.9, "top_k": 1},
    "salted": {"messages": ask(QUESTION), "cache_salt": "salt"},
    "template": {"messages": ask(QUESTION), "chat_template_kwargs": {"enable_thinking": False}},
    "adaptive": {
        "messages": ask(QUESTION),
        "thinking": {"type": "adaptive", "display": "omitted"},
        "output_config": {"effort": "low"},
    },
    "schema": {
        "messages": ask(QUESTION),
        "output_config": {
            "format": {
                "type": "json_schema",
                "schema": {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]},
            }
        },
    },
    "no schema": {"messages": ask(QUESTION), "output_config": {"format": {}, "effort": None}},
    "ignored": {
        "messages": ask(QUESTION),
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "seed": "none",
        "n": 3,
        "system": None,
        "tools": None,
        "stream": None,
    },
}
REMINDED: list[Json] = [
    *ask("Hi"),
    {"role": "system", "content": "x-anthropic-billing-header: a"},
    {"role": "system", "content": "Two agents are there."},
    {"role": "assistant", "content": "Hello."},
    {"role": "system", "content": [{"type": "text", "text": "Be kind.", "cache_control": None}]},
    *ask(QUESTION),
]
HABITUAL: dict[str, Json] = {
    "system among the messages": {"messages": REMINDED},
    "system everywhere": {"system": "Be brief. ", "messages": REMINDED, "tools": [WEATHER]},
    "system at the end": {"messages": [*ask("Hi"), {"role": "system", "content": "Be kind."}]},
    "no thinking": {"messages": ask(QUESTION), "thinking": {"type": "disabled"}},
    "no thinking, effort": {
        "messages": ask(QUESTION),
        "thinking": {"type": "disabled"},
        "output_config": {"effort": "max"},
    },
    "empty tools": {"messages": ask(QUESTION), "tools": []},
    "tools that come and go": {
        "messages": [
            *ask("Hi"),
            changing("tool_removal", {"type": "tool_reference", "name": "say_yes"}),
            changing("tool_addition", {"type": "tool_definition", "definition": EXACT}),
            {"role": "assistant", "content": "Hello."},
            changing("tool_addition", {"type": "tool_reference", "name": "say_yes"}),
            changing("tool_removal", {"type": "tool_reference", "name": "get_weather"}),
            *ask(QUESTION),
        ],
        "tools": [WEATHER, YES],
    },
    "no tool left": {
        "messages": [
            changing("tool_removal", {"type": "tool_reference", "name": "say_yes"}),
            *ask(QUESTION),
        ],
        "tools": [YES],
    },
}
"""What depends on the behaviour of the engine."""


def salted(body: Json) -> Json:
    """With a salt of its own, so that the engine's cache tells nothing."""
    return {**body, "cache_salt": uuid.uuid4().hex}


def equal_answers(engine: Engine, body: Json, behaviour: MessagesBehaviour) -> int:
    """Asks the engine both ways, and compares; a refusal on both ways is the native one's to word.

    Returns the native status.
    """
    native = post(engine, "/v1/messages", salted(body))
    translated = through_chat(engine, salted(body), behaviour)
    if native[0] != 200:
        assert translated[0] != 200, (native, translated)
    else:
        assert same_but_random(translated) == same_but_random(native)
    return native[0]
