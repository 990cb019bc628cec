"""The Messages dialect: equal to vLLM's own answers, and readable where vLLM answers itself.

Three proofs of equality: a real engine asked both ways, vLLM's own conversion of the request, and
vLLM's own conversion of replies that no tiny model would give.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import re
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.records import Json
from nextstate.wire import obj
from proxy.capture import Capture
from proxy.dialects.chat import Asked, client_chunk, client_reply, upstream_request
from proxy.dialects.messages import Chunks, Events, encode, from_chat, to_chat, to_chat_reply
from proxy.linking.continuation import canonical_reply, reply_starts
from proxy.sse import EventSplitter, event_data
from tests.conftest import Done
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


@pytest.fixture(scope="module")
def statuses(
    native_engine: Engine, behaviour: MessagesBehaviour, ask_at_once: Callable[..., Done]
) -> Done:
    """The native statuses; raises in a case's place, if its answers differ."""

    def ask(case: str, stream: bool) -> int:
        asked = {**MATRIX, **HABITUAL}[case]
        body = {"model": native_engine.model, "max_tokens": 12, "temperature": 0, **asked}
        if stream:
            body["stream"] = True
        assert to_chat(body, behaviour).native is None
        return equal_answers(native_engine, body, behaviour)

    return ask_at_once("statuses", ask)


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("case", {**MATRIX, **HABITUAL})
def test_an_answer_through_chat_equals_the_native_one(
    statuses: Done, case: str, stream: bool
) -> None:
    assert statuses[case, stream].result() == 200


# vLLM's own conversion, in this process: what the engine's model never says is compared too


@dataclass(frozen=True)
class Native:
    """vLLM's classes."""

    serving: Any
    request: Any
    chat_request: Any
    chat_reply: Any
    json_response: Any

    def chat(self, body: Json, merge: bool, effort: str = "none") -> Json | None:
        """The chat request that vLLM makes of a Messages request; None if it refuses it."""
        try:
            request = self.request.model_validate(copy.deepcopy(body))
            made = self.serving.to_chat_completion_request(
                request, merge_inline_system=merge, disabled_thinking_effort=effort
            )
        except Exception:
            return None
        return self.dumped(made)

    def posted(self, chat: Json) -> Json | None:
        """A chat request as vLLM reads it; None if it refuses it."""
        try:
            return self.dumped(self.chat_request.model_validate(copy.deepcopy(chat)))
        except Exception:
            return None

    @staticmethod
    def dumped(request: Any) -> Json:
        fields: Json = request.model_dump(mode="json", exclude={"request_id"}, warnings=False)
        fields["stop"] = fields["stop"] or []
        if not fields["tools"]:
            # To the parsers of a reply "auto" and None are the same.
            fields["tools"] = None
            fields["tool_choice"] = "none" if fields["tool_choice"] == "none" else None
        budget = fields["thinking_token_budget"]
        if budget is not None and budget == (fields["max_tokens"] or 0) - 1:
            fields["thinking_token_budget"] = None
        return fields

    def body(self, reply: Json) -> bytes | None:
        """The Messages body that vLLM makes of a chat reply; None if it fails."""
        try:
            made = self.serving.messages_full_converter(
                object.__new__(self.serving), self.chat_reply.model_validate(reply)
            )
            return self.json_response(content=made.model_dump(exclude_none=True)).body
        except Exception:
            return None

    def stream(self, chunks: list[Json]) -> bytes:
        """The events that vLLM makes of a chat stream."""

        async def chat() -> AsyncIterator[str]:
            for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"

        async def events() -> str:
            serving = object.__new__(self.serving)
            return "".join(
                [e async for e in self.serving.message_stream_converter(serving, chat())]
            )

        return asyncio.run(events()).encode()


@pytest.fixture(scope="session")
def vllm() -> Native:
    """vLLM's classes, where it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("vllm")
        from fastapi.responses import JSONResponse
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
        from vllm.entrypoints.openai.chat_completion.protocol import (
            ChatCompletionRequest,
            ChatCompletionResponse,
        )
    return Native(
        AnthropicServingMessages,
        AnthropicMessagesRequest,
        ChatCompletionRequest,
        ChatCompletionResponse,
        JSONResponse,
    )


texts = st.sampled_from(["", "yes", "ü 🍎\n", "x-anthropic-billing-header: 1"]) | st.text(
    max_size=5
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**40) | st.sampled_from([0.5, 1e16, 2.0]) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
inputs = st.dictionaries(texts, values, max_size=2)


def block(kind: str, optional: dict[str, Any] | None = None, **fields: Any) -> Any:
    return st.fixed_dictionaries({"type": st.just(kind), **fields}, optional=optional or {})


text_block = block("text", {"cache_control": st.none()}, text=texts | st.none())
result = block(
    "tool_result",
    {"is_error": st.booleans()},
    tool_use_id=st.sampled_from(["t1", "t2"]),
    content=texts
    | st.none()
    | st.lists(
        text_block | block("document") | block("tool_reference", tool_name=texts | st.none()),
        max_size=2,
    ),
)
call = block("tool_use", id=st.just("t1"), name=st.just("add"), input=inputs)
thought = block("thinking", thinking=texts, signature=texts) | block(
    "redacted_thinking", data=texts
)
image = block("image", source=st.just({"type": "base64", "data": "AA=="}))


tool_change = st.builds(
    lambda change, tool: {"type": change, "tool": tool},
    st.sampled_from(["tool_addition", "tool_removal"]),
    st.just(REFERENCE)
    | st.just({"type": "tool_definition", "definition": {"name": "new", "input_schema": {"a": 1}}}),
)


def message(role: str, blocks: Any) -> Any:
    content = texts | st.lists(blocks, max_size=3)
    return st.fixed_dictionaries({"role": st.just(role), "content": content})


tool = st.fixed_dictionaries(
    {"name": st.sampled_from(["add", "add", "sub"]), "input_schema": inputs},
    optional={
        "description": texts | st.none(),
        "strict": st.booleans() | st.none(),
        "defer_loading": st.booleans(),
        "type": st.just("custom"),
    },
)
choice = st.fixed_dictionaries(
    {"type": st.sampled_from(["auto", "any", "tool", "none"]), "name": st.just("add")},
    optional={"disable_parallel_tool_use": st.booleans() | st.none()},
)
sound = st.fixed_dictionaries(
    {
        "model": st.just("m"),
        "max_tokens": st.integers(1, 9) | st.integers(1024, 1034),
        "messages": st.lists(
            message("user", text_block | result)
            | message("assistant", text_block | call | thought)
            | message("system", text_block | tool_change),
            min_size=1,
            max_size=4,
        ),
    },
    optional={
        "system": texts | st.lists(text_block, max_size=3) | st.none(),
        "stream": st.booleans() | st.none(),
        "stop_sequences": st.lists(texts, max_size=4) | st.none(),
        "temperature": st.sampled_from([0, 1, 0.5, None]),
        "top_p": st.sampled_from([1, 0.5, None]),
        "top_k": st.sampled_from([-1, 5, None]),
        "tools": st.lists(tool, max_size=2) | st.none(),
        "tool_choice": choice | st.none(),
        "thinking": st.sampled_from([None, {"type": "adaptive"}, {"type": "disabled"}])
        | block("enabled", budget_tokens=st.integers(1022, 1030)),
        "output_config": st.fixed_dictionaries(
            {},
            optional={
                "effort": st.sampled_from([None, "low", "max"]),
                "format": st.none()
                | block("json_schema", schema=inputs)
                | st.fixed_dictionaries({}, optional={"schema": inputs | st.none()}),
            },
        ),
        "metadata": inputs,
        "chat_template_kwargs": inputs,
        "cache_salt": st.just("salt"),
        "seed": values,
    },
)
odd_fields = st.sampled_from(
    [
        ("thinking", {"type": "disabled"}),
        ("thinking", {"type": "adaptive", "display": "no"}),
        ("output_config", {"effort": "none"}),
        ("output_config", {"format": {"type": None}}),
        ("watermarking", None),
        ("cache_salt", ""),
        ("tools", []),
        ("tool_choice", {"type": "tool"}),
        ("tool_choice", {"type": "auto", "name": 3}),
        ("max_tokens", 0),
        ("model", ""),
    ]
)
odd = (
    message("system", text_block)
    | message("user", image | thought | call)
    | message("assistant", result)
    | st.just({"role": "tool"})
)


@st.composite
def bodies(draw: Any) -> Json:
    """Sound requests, and some with an odd message, an odd field or one value replaced."""
    body: Json = draw(sound)
    if draw(st.booleans()):
        place = draw(st.integers(0, len(body["messages"])))
        body["messages"].insert(place, draw(odd))
    if draw(st.integers(0, 3)) == 3:
        name, value = draw(odd_fields)
        body[name] = value
    body = copy.deepcopy(body)  # some of the values drawn are shared between draws
    if draw(st.integers(0, 3)) == 3:
        where: Any = body
        while True:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            key = draw(st.sampled_from(keys))
            if where[key] and isinstance(where[key], dict | list) and draw(st.booleans()):
                where = where[key]
                continue
            where[key] = draw(values)
            break
    return body


@pytest.mark.engine
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies())
def test_the_chat_request_is_the_one_that_vllm_makes(vllm: Native, body: Json) -> None:
    """Whatever the behaviour of the engine is; and alike under all where they are not known."""
    unknown = to_chat(copy.deepcopy(body))
    for merge, effort in itertools.product((True, False), ("none", "low")):
        translation = to_chat(
            copy.deepcopy(body), MessagesBehaviour(merge, effort, shows_no_tools=False)
        )
        expected = vllm.chat(body, merge, effort)
        if translation.native is None:
            assert vllm.posted(translation.chat) == expected
        if unknown.native is None:
            assert vllm.posted(unknown.chat) == expected


@pytest.mark.engine
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies())
def test_any_request_that_goes_through_chat_gets_the_native_answer(
    native_engine: Engine, behaviour: MessagesBehaviour, body: Json
) -> None:
    body = {**body, "model": native_engine.model, "temperature": 0}
    assume(to_chat(body, behaviour).native is None)
    assume("thinking_token_budget" not in to_chat(body, behaviour).chat)
    assume(obj(body.get("thinking")).get("type") != "enabled")  # vLLM takes none without a parser
    equal_answers(native_engine, body, behaviour)


@pytest.mark.engine
@pytest.mark.parametrize("case", MATRIX)
def test_the_matrix_makes_the_chat_requests_that_vllm_makes(vllm: Native, case: str) -> None:
    body = {"model": "m", "max_tokens": 40, **MATRIX[case]}
    posted = vllm.posted(to_chat(body).chat)
    assert posted is not None
    assert posted == vllm.chat(body, merge=True) == vllm.chat(body, merge=False)


counts = st.integers(0, 99)
usages = st.fixed_dictionaries(
    {"prompt_tokens": counts, "completion_tokens": counts, "total_tokens": counts},
    optional={
        "prompt_tokens_details": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                "cached_tokens": counts | st.none(),
                "created_cache_tokens": counts | st.none(),
            },
        )
    },
)
finishes = st.sampled_from(["stop", "length", "tool_calls", "abort"])
matches = st.sampled_from([None, 7, "stop here"])
arguments = inputs.map(json.dumps) | st.sampled_from(
    [
        "",
        "{",
        "[1]",
        "null",
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        '{"a": 123456789012345678901234567890}',
    ]
)
calls = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["c1", "c2"]),
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": st.just("add"), "arguments": arguments}),
    }
)


@st.composite
def replies(draw: Any) -> Json:
    """Plain chat replies."""
    message: Json = {"role": "assistant", "content": draw(texts | st.none())}
    message["reasoning"] = draw(texts | st.none())
    message["tool_calls"] = draw(st.lists(calls, max_size=2))
    ended = {"finish_reason": draw(finishes), "stop_reason": draw(matches)}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "logprobs": None, **ended}],
        "usage": draw(usages),
        "kv_transfer_params": draw(st.none() | inputs),
    }


def chunk_of(delta: Json | None, usage: Json | None = None, **ended: Any) -> Json:
    choices = [] if delta is None else [{"index": 0, "delta": delta, **ended}]
    chunk: Json = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1}
    return {**chunk, "model": "m", "choices": choices, "usage": usage}


deltas = st.fixed_dictionaries(
    {},
    optional={
        "content": texts | st.none(),
        "reasoning": texts | st.none(),
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {"index": st.integers(0, 1)},
                optional={
                    "id": st.sampled_from(["c1", "c2", None]),
                    "type": st.just("function"),
                    "function": st.fixed_dictionaries(
                        {},
                        optional={
                            "name": st.sampled_from(["add", None]),
                            "arguments": st.sampled_from(["", "{", "}", "ü", None]),
                        },
                    ),
                },
            ),
            max_size=2,
        ),
    },
)


def stream_of(
    said: list[Json], end: tuple[Json, str, object], start: Json, usage: Json
) -> list[Json]:
    """A chat stream that says `said`, with its usage at both ends."""
    delta, finish, matched = end
    return [
        chunk_of({"role": "assistant", "content": ""}, start),
        *map(chunk_of, said),
        chunk_of(delta, finish_reason=finish, stop_reason=matched),
        chunk_of(None, usage),
    ]


streams = st.builds(
    stream_of, st.lists(deltas, max_size=6), st.tuples(deltas, finishes, matches), usages, usages
)


def events_of(chunks: list[Json]) -> bytes:
    events = Events()
    return b"".join(map(events.feed, chunks)) + events.done()


@pytest.mark.engine
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(reply=replies())
def test_a_plain_reply_is_the_one_that_vllm_makes(vllm: Native, reply: Json) -> None:
    native, ours = vllm.body(reply), from_chat(reply)
    assert (native is None) == (ours is None)
    if native is not None and ours is not None:
        assert unsigned(encode(ours)) == unsigned(native)


@pytest.mark.engine
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(chunks=streams)
def test_streamed_events_are_the_ones_that_vllm_makes(vllm: Native, chunks: list[Json]) -> None:
    assert unsigned(events_of(chunks)) == unsigned(vllm.stream(chunks))


@pytest.mark.engine
def test_an_error_in_the_stream_ends_it_as_vllm_does(vllm: Native) -> None:
    chunks = [
        chunk_of({"role": "assistant", "content": ""}),
        chunk_of({"content": "Yes"}),
        {"error": {"message": "the engine died", "type": "InternalServerError", "code": 500}},
    ]
    ours, native = events_of(chunks), vllm.stream(chunks)
    assert ours.split(b"\n\n")[:-2] == native.split(b"\n\n")[:-2]
    for stream in (ours, native):
        last = stream.split(b"\n\n")[-2]
        assert last.startswith(
            b'event: error\ndata: {"type":"error","error":{"type":"internal_error",'
        )
    assert b"the engine died" in ours


# Reading native answers


@given(reply=replies())
def test_a_native_reply_reads_as_the_chat_reply_that_makes_it(reply: Json) -> None:
    message = reply["choices"][0]["message"]
    assume(all(call["function"]["arguments"] != "null" for call in message["tool_calls"]))
    body = from_chat({**reply, "kv_transfer_params": None})
    if body is None:
        return
    read = to_chat_reply(body)
    again = from_chat(read)
    assert again is not None
    assert unsigned(encode(again)) == unsigned(encode(body))
    assert canonical_reply(read["choices"][0]["message"]) == canonical_reply(message)


pieces = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3)
parts = st.lists(st.tuples(st.sampled_from(["content", "reasoning", "tool"]), pieces), max_size=5)


@given(parts=parts, finish=finishes, matched=matches, usage=usages)
def test_native_events_read_as_the_chunks_that_make_them(
    parts: list[tuple[str, list[str]]], finish: str, matched: object, usage: Json
) -> None:
    said: list[Json] = []
    tools = 0
    for kind, texts in parts:
        if kind != "tool":
            said += [{kind: text} for text in texts]
            continue
        start = {"id": f"c{tools}", "type": "function", "function": {"name": "add"}}
        said.append({"tool_calls": [{"index": tools, **start}]})
        said += [{"tool_calls": [{"index": tools, "function": {"arguments": a}}]} for a in texts]
        tools += 1
    chunks = stream_of(said, ({}, finish, matched), usage, usage)
    made, read, reader = Capture(), Capture(), Chunks()
    for chunk in chunks:
        made.chunk(chunk)
    for payload in payloads(events_of(chunks)):
        chunk = reader.feed(orjson.loads(payload))
        if chunk is not None:
            read.chunk(chunk)
    assert read.message() == made.message()
    assert read.finished == made.finished
    assert (read.finish_reason == "length") == (finish == "length")
    assert read.model == "m"
    assert (read.usage or {})["completion_tokens"] == usage["completion_tokens"]


@given(body=st.dictionaries(st.sampled_from(["type", "content", "usage", "delta"]), values))
def test_unreadable_native_answers_do_not_raise(body: Json) -> None:
    to_chat_reply(body)
    for kind in ("message_start", "content_block_start", "content_block_delta", "message_delta"):
        Chunks().feed({**body, "type": kind})
    assert Chunks().feed({"type": "ping"}) is None
    assert Chunks().feed({"type": "error", "error": {"message": "no"}}) == {
        "error": {"message": "no"}
    }


# What the chat route does not serve


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": []}, "empty list of tools"),
        ({"system": [{"type": "tool_removal", "tool": REFERENCE}]}, "no text"),
        ({"messages": [changing("tool_removal", REFERENCE)]}, "names no tool"),
        ({"messages": [changing("tool_addition", REFERENCE)]}, "names no tool"),
        ({"tool_choice": {"type": "auto"}}, "tool_choice without tools"),
        ({"tools": [YES], "tool_choice": {"type": "tool", "name": "no"}}, "names no tool"),
        ({"tools": [{"type": "web_search_20250305", "name": "s"}]}, "no input schema"),
        ({"thinking": {"type": "disabled"}}, "how the engine does that is not known"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "longer than its reply"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1}}, "no budget"),
        ({"thinking": {"type": "loud"}}, "unknown"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"model": ""}, "names no model"),
        ({"messages": []}, "no messages"),
        ({"messages": {}}, "no messages"),
        ({"messages": [3]}, "unknown role"),
        ({"temperature": "0"}, "temperature to a str"),
        ({"stop_sequences": [1]}, "stop sequence"),
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}]}, "system message"),
        ({"messages": [*ask("a"), {"role": "system", "content": "b"}]}, "system message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "block of type image",
        ),
        ({"metadata": {"n": 1e30}}, "counts higher"),
    ],
)
def test_what_chat_could_serve_otherwise_goes_native(change: Json, reason: str) -> None:
    body: Json = {"model": "m", "max_tokens": 9, "messages": ask("Hello"), **change}
    native = to_chat(body).native
    assert native is not None
    assert reason in native
    assert native.endswith("so its tokens are not known")


@given(body=bodies() | st.dictionaries(st.sampled_from(["model", "messages", "tools"]), values))
def test_no_request_raises_and_all_can_be_recorded(body: Json) -> None:
    before = copy.deepcopy(body)
    translation = to_chat(body)
    assert body == before
    assert all(isinstance(m, dict) for m in translation.chat["messages"])
    reply_starts(translation.chat["messages"])
    orjson.dumps(translation.chat)


def test_a_request_that_nests_too_deep_to_be_encoded_goes_native() -> None:
    deep: Any = {}
    for _ in range(600):
        deep = {"a": deep}
    body = {"model": "m", "max_tokens": 9, "messages": ask("Hello"), "metadata": deep}
    translation = to_chat(body)
    assert translation.native is not None
    orjson.dumps(translation.chat)


# The chat form


def test_tool_results_come_before_what_the_user_says() -> None:
    chat = to_chat({"model": "m", "max_tokens": 9, "messages": CALLED}).chat
    assert chat["messages"][reply_starts(chat["messages"])[0] + 1 :] == [
        {"role": "tool", "tool_call_id": "t1", "content": "12 °C"},
        {"role": "tool", "tool_call_id": "t2", "content": "no\ndata"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Then?"}, {"type": "text", "text": "Go on."}],
        },
    ]


def test_a_reply_that_an_agent_sends_back_is_the_reply_that_was_recorded() -> None:
    message = {
        "role": "assistant",
        "content": "I look.",
        "reasoning": "Hm.",
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "add", "arguments": '{"b":"ü", "a":1}'},
            }
        ],
    }
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    body = from_chat({"id": "1", "model": "m", "choices": [choice], "usage": {}})
    assert body is not None
    history = [*ask("?"), {"role": "assistant", "content": body["content"]}, *ask("!")]
    chat = to_chat({"model": "m", "max_tokens": 9, "messages": history}).chat
    assert canonical_reply(chat["messages"][1]) == canonical_reply(message)


def test_what_native_requests_hold_is_recorded_too() -> None:
    chat = to_chat(
        {
            "model": "m",
            "max_tokens": 2048,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "messages": [
                *ask("a"),
                {"role": "system", "content": "b"},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a"}},
                        {"type": "text", "text": "c"},
                    ],
                },
            ],
        }
    ).chat
    assert chat["thinking_token_budget"] == 1024
    assert [m["role"] for m in chat["messages"]] == ["user", "system", "user"]
    assert chat["messages"][2]["content"][1] == {"type": "text", "text": "c"}
