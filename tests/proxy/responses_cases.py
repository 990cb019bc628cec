"""Responses requests whose answers are compared with vLLM's own, and how they are compared."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
import uuid
from typing import Any

import orjson

from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.records import Json
from proxy.dialects.chat import Asked, client_chunk, client_reply, upstream_request
from proxy.dialects.responses import Events, from_chat, to_chat
from proxy.serving import compact
from proxy.sse import EventSplitter, event_data
from tests.running_loop import Engine

APPLES = "Tom has 3 apples and gets 4 more. How many apples does Tom have?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "number", "minimum": 0.5}},
    "required": ["city"],
}
WEATHER: Json = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather — «ü»",
    "strict": False,
    "parameters": SCHEMA,
}
CLOCK: Json = {"type": "function", "name": "clock"}
CALL: Json = {
    "type": "function_call",
    "call_id": "call_1",
    "name": "get_weather",
    "arguments": '{"city": "Rom"}',
}
FORCED: Json = {
    "type": "function",
    "name": "pick",
    "strict": True,
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
OUTPUT: Json = {"type": "function_call_output", "call_id": "call_1", "output": "12 °C"}
SAID: Json = {
    "type": "message",
    "role": "assistant",
    "id": "msg_1",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}],
}
THOUGHT: Json = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "They want the weather."}],
}
AGENTS: Json = {
    "type": "namespace",
    "name": "agents",
    "description": "Other agents",
    "tools": [
        {**CLOCK, "name": "send", "parameters": SCHEMA, "strict": False},
        {"type": "custom", "name": "not_shown"},
    ],
}
PATCH: Json = {"type": "custom", "name": "patch", "description": "Changes a file."}
GRAMMAR: Json = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
PATCHED: Json = {
    "type": "custom_tool_call",
    "call_id": "call_2",
    "name": "patch",
    "input": '+ "ü"\n',
}
SHOWN = MessagesBehaviour(shows_no_tools=False)
"""The loop's template shows the model no empty list of tools."""
SERVED: Json = {"type": "web_search", "external_web_access": True}


def user(text: str) -> Json:
    return {"role": "user", "content": [{"type": "input_text", "text": text}]}


def called(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def scripted(*parts: str, **more: Any) -> Json:
    """A request whose reply is the parts, by a grammar."""
    return {
        "input": APPLES,  # after which a thinking engine's thoughts come to an end
        "tools": [WEATHER, CLOCK],
        "structured_outputs": {"choice": ["".join(parts)]},
        "max_output_tokens": 160,
        **more,
    }


ROME, TIME = called("get_weather", '{"city": "Köln", "days": 1.50}'), called("clock", "{}")
CASES: dict[str, Json] = {
    "a call": scripted(ROME),
    "text, call": scripted("I'll look.\n", ROME),
    "two calls": scripted(ROME, "\n", TIME),
    "text, two calls": scripted("«So»: ", TIME, ROME),
    "call, text": scripted(TIME, "\nWait."),
    "text, call, text, call": scripted("First\n", TIME, " then ", TIME),
    "call without arguments": scripted('<tool_call>{"name": "clock"}</tool_call>'),
    "broken call": scripted('Hm <tool_call>{"name": "clock", "arg</tool_call>'),
    "call in a call": scripted(called("clock", '{"a": "<tool_call>"}')),
    "cut call": scripted(ROME, max_output_tokens=40),
    "cut second call": scripted(TIME, ROME, max_output_tokens=60),
    "cut at the end": scripted("Yes", max_output_tokens=2),
    "no tool to call": scripted(ROME, tools=[]),
    "no call wanted": scripted(ROME, tool_choice="none"),
    "one of two calls": scripted(TIME, TIME, parallel_tool_calls=False),
    "blank": scripted("\n \n"),
    "empty": scripted("x", stop="x"),
    "pick, required": {
        "input": "Where?",
        "tools": [FORCED],
        "tool_choice": "required",
        "frequency_penalty": 2,  # or the tiny policy writes spaces until it is cut
        "max_output_tokens": 160,
    },
    "pick, named": {
        "input": "Where?",
        "tools": [FORCED, WEATHER],
        "tool_choice": {"type": "function", "name": "pick"},
        "frequency_penalty": 2,  # or the tiny policy writes spaces until it is cut
        "max_output_tokens": 160,
    },
    "pick, one": {
        "input": "Where?",
        "tools": [FORCED],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "frequency_penalty": 2,  # or the tiny policy writes spaces until it is cut
        "max_output_tokens": 160,
    },
    "string": {"input": APPLES},
    "seeded": {"input": APPLES, "temperature": 1.0, "seed": 7},
    "sampling": {"input": APPLES, "temperature": 0.7, "top_p": 0.9, "seed": 7},
    "more sampling": {
        "input": APPLES,
        "temperature": 0.001,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.1,
        "seed": 3,
    },
    "instructions": {"input": APPLES, "instructions": "Answer briefly, in «Deutsch» 🎈."},
    "empty instructions": {"input": APPLES, "instructions": ""},
    "list": {"input": [{"role": "user", "content": APPLES}]},
    "parts": {"input": [user(APPLES)]},
    "several parts": {
        "input": [
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "Hi."},
                    {"type": "input_text", "text": APPLES},
                ],
            }
        ]
    },
    "system item": {"input": [{"role": "system", "content": "Be short."}, user(APPLES)]},
    "developer item": {
        "instructions": "Be short.",
        "input": [{"type": "message", "role": "developer", "content": "Kurz."}, user(APPLES)],
    },
    "unicode": {"input": 'Größe: 3 €, "日本", \x7f \\ \n </think> 🧮'},
    "turns": {"input": [user(APPLES), SAID, user("And then?")]},
    "parsed": {
        "input": [
            user("Hi"),
            {**SAID, "content": [{**SAID["content"][0], "logprobs": None, "parsed": None}]},
            user("And then?"),
        ]
    },
    "easy turns": {
        "input": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": APPLES},
        ]
    },
    "two replies": {"input": [user("Hi"), SAID, {**SAID, "id": "msg_2"}, user(APPLES)]},
    "tool turns": {"tools": [WEATHER, CLOCK], "input": [user("Rome?"), SAID, CALL, OUTPUT]},
    "call first": {"tools": [WEATHER], "input": [user("Rome?"), CALL, SAID, OUTPUT]},
    "parallel calls": {
        "tools": [WEATHER],
        "input": [
            user("Rome and Bonn?"),
            {**CALL, "id": "fc_1", "status": "completed"},
            {**CALL, "call_id": "call_2", "arguments": '{"city": "Bonn"}'},
            {**OUTPUT, "id": "fco_1", "status": "completed"},
            {**OUTPUT, "call_id": "call_2", "output": [{"type": "input_text", "text": "9 °C"}]},
            user("Which is warmer?"),
        ],
    },
    "output alone": {"input": [user("Hi"), CALL, OUTPUT]},
    "reasoning turns": {"tools": [WEATHER], "input": [user("Rome?"), THOUGHT, SAID, CALL, OUTPUT]},
    "reasoning, call": {"input": [user("Rome?"), THOUGHT, CALL, OUTPUT, user(APPLES)]},
    "summary": {
        "input": [
            user("Rome?"),
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "Weather."}],
                "content": None,
                "encrypted_content": None,
            },
            SAID,
            {"type": "reasoning", "id": "rs_2", "summary": []},
            user(APPLES),
        ]
    },
    "auto": {"input": "Weather in Rome?", "tools": [WEATHER]},
    "none": {"input": APPLES, "tools": [WEATHER], "tool_choice": "none"},
    "no tools": {"input": APPLES, "tools": [], "tool_choice": "auto"},
    "required": {"input": "Weather in Rome?", "tools": [WEATHER, CLOCK], "tool_choice": "required"},
    "named": {
        "input": "Weather in Rome?",
        "tools": [WEATHER, CLOCK],
        "tool_choice": {"type": "function", "name": "get_weather"},
    },
    "named clock": {
        "input": "Time?",
        "tools": [{**CLOCK, "parameters": {"type": "object", "properties": {}}}],
        "tool_choice": {"type": "function", "name": "clock"},
    },
    "one call": {"input": "Weather?", "tools": [WEATHER], "parallel_tool_calls": False},
    "strict": {"input": "Weather?", "tools": [{**WEATHER, "strict": True}]},
    "cut": {"input": APPLES, "max_output_tokens": 1},
    "to the end": {"input": APPLES, "max_output_tokens": None},
    "stop": {"input": APPLES, "stop": ["apples", "\n"]},
    "json": {
        "input": APPLES,
        "text": {
            "format": {
                "type": "json_schema",
                "name": "answer",
                "strict": True,
                "schema": {"type": "object", "properties": {"n": {"enum": [7, 0.5]}}},
            }
        },
    },
    "json object": {"input": APPLES, "text": {"format": {"type": "json_object"}}},
    "text with tools": {
        "input": "Weather?",
        "tools": [WEATHER],
        "text": {"format": {"type": "text"}, "verbosity": "low"},
    },
    "as OpenClaw": {
        "store": False,
        "instructions": "You are a personal assistant.",
        "input": [user(APPLES)],
        "tools": [WEATHER],
        "prompt_cache_key": "agent:main:main",
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "text": {"verbosity": "low"},
        "parallel_tool_calls": True,
    },
    "no effort": {"input": APPLES, "reasoning": {"effort": "none"}},
    "ids": {
        "input": [
            {"type": "message", "id": "msg_0", "role": "developer", "content": "Kurz."},
            {"type": "message", "id": "msg_1", **user(APPLES)},
            {**SAID, "phase": "commentary"},
            {**CALL, "id": None, "caller": None},
            {**OUTPUT, "id": "fco_1"},
        ]
    },
    "unknown fields": {"input": APPLES, "client_metadata": {"a": "b"}, "new": [1.5]},
    "tools of all kinds": {
        "input": [
            user(APPLES),
            {**CALL, "name": "send", "namespace": "agents"},
            OUTPUT,
            PATCHED,
            {"type": "custom_tool_call_output", "call_id": "call_2", "output": "Done."},
        ],
        "tools": [WEATHER, AGENTS, {**PATCH, "format": {"type": "text"}}, SERVED],
    },
    "a call into a namespace": scripted(
        called("agents__send", '{"city": "Bonn"}'), tools=[CLOCK, AGENTS]
    ),
    "a custom call": scripted(
        "So:", called("patch", '{"input": "+ \\"ü\\"\\n- \\ud83e\\uddee"}'), tools=[PATCH]
    ),
    "a custom call without its input": scripted(
        called("patch", '{"text": "+ a"}'), tools=[PATCH, CLOCK]
    ),
    "custom, named": {
        "input": "Change it.",
        "tools": [PATCH, CLOCK],
        "tool_choice": {"type": "custom", "name": "patch"},
        "max_output_tokens": 20,
    },
    "echoes": {
        "input": APPLES,
        "metadata": {"session_id": "ü"},
        "user": "tom",
        "service_tier": "flex",
        "max_tool_calls": 3,
        "store": True,
        "background": False,
        "truncation": "disabled",
        "parallel_tool_calls": None,
        "top_logprobs": None,
        "text": {"format": {"type": "text"}},
        "chat_template_kwargs": {"enable_thinking": False},
    },
}


def post(engine: Engine, path: str, body: Json) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json", **engine.headers}
    request = urllib.request.Request(engine.url + path, orjson.dumps(body), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def max_model_len(engine: Engine) -> int:
    request = urllib.request.Request(engine.url + "/v1/models", headers=engine.headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["data"][0]["max_model_len"]


def payloads(stream: bytes) -> list[Json]:
    found = [event_data(event) for event in EventSplitter().feed(stream)]
    return [orjson.loads(data) for data in found if data and data != b"[DONE]"]


def through_chat(engine: Engine, body: Json) -> tuple[int, Json, bytes]:
    """(status, the engine's own chat reply or last chunk, what the client would get)."""
    translation = to_chat(body, SHOWN)
    assert translation.native is None
    asked = Asked.of(translation.chat, engine.model)
    sent = upstream_request({**translation.chat, "cache_salt": uuid.uuid4().hex}, engine.model)
    status, data = post(engine, "/v1/chat/completions", sent)
    limit = max_model_len(engine)
    if status != 200:
        return status, {}, data
    if not body.get("stream"):
        reply = orjson.loads(data)
        raw = orjson.loads(data)
        return status, raw, compact(from_chat(client_reply(reply, asked), body, limit))
    events = Events(body, limit)
    out: list[bytes] = []
    raw = {}
    for raw in payloads(data):
        chunk = client_chunk(raw, asked, None)
        out.append(b"" if chunk is None else events.feed(chunk))
    out.append(events.done())
    return status, raw, b"".join(out)


def untimed(text: bytes, cached_known: bool) -> bytes:
    """A reply with its ids numbered in the order they come, and without the time.

    What an engine does not tell of its cache is 0 in ours, so it is taken out of vLLM's own.
    """
    numbers: dict[bytes, int] = {}

    def number(match: re.Match[bytes]) -> bytes:
        prefix: bytes = match[1]
        return b"%b%d" % (prefix, numbers.setdefault(match[0], len(numbers)))

    text = re.sub(rb"\b(resp_|msg_|rs_|fc_|ctc_|chatcmpl-tool-)[0-9a-f]{16}\b", number, text)
    if not cached_known:
        text = re.sub(rb'"(cached_tokens|cache_write_tokens)":\d+', rb'"\1":0', text)
    return re.sub(rb'"created_at":\d+', b'"created_at":0', text)


def merged(stream: bytes) -> list[bytes]:
    """A stream's events, with deltas that follow each other as one.

    How many tokens one event brings is the engine's timing, also between two native runs.
    """
    events: list[tuple[str, Json]] = []
    for position, event in enumerate(EventSplitter().feed(stream)):
        data = event_data(event)
        assert data is not None
        payload = orjson.loads(data)
        kind: str = payload["type"]
        assert event == b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(payload))
        assert payload["sequence_number"] == position
        payload["sequence_number"] = 0
        if events and kind.endswith(".delta") and events[-1][0] == kind:
            events[-1][1]["delta"] += payload["delta"]
        else:
            events.append((kind, payload))
    return [orjson.dumps(payload) for _, payload in events]


def asked_for(engine: Engine, case: Json) -> Json:
    defaults = {"temperature": 0, "max_output_tokens": 12}
    return {"model": engine.model, **defaults, **case}


def assert_plain_equal(engine: Engine, body: Json) -> None:
    native_body = {**body, "enable_response_messages": True, "cache_salt": uuid.uuid4().hex}
    native_status, native = post(engine, "/v1/responses", native_body)
    status, raw, ours = through_chat(engine, body)
    assert status == 200 or native_status != 200, (native, ours)
    if native_status != 200:
        return  # what vLLM refuses may be answered here
    whole = orjson.loads(native)
    assert compact(json.loads(native)) == native
    tokens = [whole[name][0]["tokens"] for name in ("input_messages", "output_messages")]
    assert [raw["prompt_token_ids"], raw["choices"][0]["token_ids"]] == tokens
    whole["input_messages"] = whole["output_messages"] = None
    known = raw["usage"].get("prompt_tokens_details") is not None
    told, expected = untimed(ours, known), untimed(compact(whole), known)
    if only_functions(body):
        assert told == expected
    assert parsed(told) == parsed(expected)


def assert_stream_equal(engine: Engine, body: Json) -> None:
    body = {**body, "stream": True}
    native_body = {**body, "cache_salt": uuid.uuid4().hex}
    native_status, native = post(engine, "/v1/responses", native_body)
    status, raw, ours = through_chat(engine, body)
    assert native_status == status == 200, (native, ours)
    known = raw["usage"].get("prompt_tokens_details") is not None
    ours, native = untimed(ours, known), untimed(native, known)
    if ours.count(b"event: ") != native.count(b"event: "):
        # vLLM counts thinking tokens by the pieces that they came in.
        ours, native = (re.sub(rb'"reasoning_tokens":\d+', b"", one) for one in (ours, native))
        ours, native = (one.replace(b'{,"tool', b'{"tool') for one in (ours, native))
    told, expected = merged(ours), merged(native)
    if only_functions(body):
        assert told == expected
    assert [*map(parsed, told)] == [*map(parsed, expected)]


def only_functions(body: Json) -> bool:
    """Whether vLLM repeats the tools as they are: it spells the fields of other kinds out."""
    return all(tool["type"] == "function" for tool in body.get("tools", ()))


def parsed(told: bytes) -> Any:
    """An answer as OpenAI's SDK reads it: to that, null and no field at all are the same."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(held) for name, held in value.items() if held is not None}
        return [known(held) for held in value] if isinstance(value, list) else value

    return known(orjson.loads(told))
