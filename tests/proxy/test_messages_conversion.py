"""vLLM's own conversion of Messages requests and replies, in this process, against ours."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import warnings
from collections.abc import AsyncIterator
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
from proxy.dialects.messages import Chunks, Events, encode, from_chat, to_chat, to_chat_reply
from proxy.linking.meaning import meaning_of
from tests.proxy.messages_cases import MATRIX, REFERENCE, equal_answers, payloads, unsigned
from tests.running_loop import Engine

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
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
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
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
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
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(reply=replies())
def test_a_plain_reply_is_the_one_that_vllm_makes(vllm: Native, reply: Json) -> None:
    native, ours = vllm.body(reply), from_chat(reply)
    assert (native is None) == (ours is None)
    if native is not None and ours is not None:
        assert unsigned(encode(ours)) == unsigned(native)


@pytest.mark.engine
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
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
    assert meaning_of(read["choices"][0]["message"]) == meaning_of(message)


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
