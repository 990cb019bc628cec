"""/v1/responses through chat completions: what vLLM would have answered, byte for byte."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from openai import OpenAI
from openai.types.responses import Response

from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.records import Json
from plugins.agents.profile import GENERIC, Profile
from proxy.capture import Capture
from proxy.dialects.responses import Chunks, Events, from_chat, to_chat, to_chat_reply
from proxy.linking.history import read_history
from proxy.linking.meaning import key_of, meaning_of
from proxy.serving import compact
from tests.conftest import Done
from tests.proxy.responses_cases import (
    AGENTS,
    CALL,
    CASES,
    CLOCK,
    FORCED,
    GRAMMAR,
    OUTPUT,
    PATCH,
    PATCHED,
    SAID,
    SERVED,
    SHOWN,
    THOUGHT,
    WEATHER,
    asked_for,
    assert_plain_equal,
    assert_stream_equal,
    payloads,
    post,
    user,
)
from tests.running_loop import Engine


@pytest.fixture(scope="module")
def compared(native_engine: Engine, ask_at_once: Callable[..., Done]) -> Done:
    """Raises in a case's place, if its answers differ."""

    def ask(name: str, stream: bool) -> None:
        compare = assert_stream_equal if stream else assert_plain_equal
        compare(native_engine, asked_for(native_engine, CASES[name]))

    return ask_at_once("compared", ask)


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("name", CASES)
def test_a_reply_is_what_vllm_answers_itself(compared: Done, name: str, stream: bool) -> None:
    compared[name, stream].result()


def short() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


def items() -> st.SearchStrategy[list[Json]]:
    roles = st.sampled_from(["user", "system", "developer", "assistant"])
    easy = st.builds(lambda role, text: {"role": role, "content": text}, roles, short())
    fixed = st.sampled_from([SAID, CALL, OUTPUT, THOUGHT, PATCHED])
    changes = st.dictionaries(
        st.sampled_from(["id", "status", "namespace", "phase", "name", "caller", "new"]),
        short() | st.none() | st.sampled_from(["completed", "final_answer"]),
        max_size=2,
    )
    fixed = st.builds(lambda item, change: {**item, **change}, fixed, changes)
    return st.lists(easy | short().map(user) | fixed, min_size=1, max_size=5)


def bodies() -> st.SearchStrategy[Json]:
    optional: dict[str, Any] = {
        "instructions": short(),
        "tools": st.lists(st.sampled_from([WEATHER, CLOCK, AGENTS, PATCH, SERVED]), max_size=3),
        "temperature": st.sampled_from([0, 0.5, 1, 1e-6]),
        "top_p": st.sampled_from([1, 0.3]),
        "reasoning": st.fixed_dictionaries({"effort": st.sampled_from(["low", "none", None])}),
        "metadata": st.dictionaries(short(), short(), max_size=2),
        "store": st.booleans(),
    }
    return st.fixed_dictionaries(
        {"input": short() | items(), "seed": st.just(5), "max_output_tokens": st.integers(1, 12)},
        optional=optional,
    )


@pytest.mark.engine
@settings(max_examples=6)
@given(case=bodies(), stream=st.booleans())
def test_any_request_we_take_is_answered_as_vllm_answers_it(
    native_engine: Engine, case: Json, stream: bool
) -> None:
    body = asked_for(native_engine, case)
    assume(to_chat(body, SHOWN).native is None)
    assert_plain_equal(native_engine, body)
    if stream and post(native_engine, "/v1/responses", body)[0] == 200:
        assert_stream_equal(native_engine, body)


@dataclass(frozen=True)
class Native:
    """vLLM's classes."""

    request: Any
    chat_request: Any
    messages: Any
    tools: Any

    def prompt(self, body: Json) -> tuple[Any, Any] | None:
        """The messages and the tools that vLLM shows the model; None if it refuses the request."""
        try:
            request = self.request.model_validate(copy.deepcopy(body))
            said = self.messages(
                request_instructions=request.instructions, request_input=request.input
            )
            return [*map(meant, said)], self.tools(request.tools, request.tool_choice)
        except Exception:
            return None

    def posted(self, chat: Json) -> tuple[Any, Any]:
        """Those of a chat request."""
        request = self.chat_request.model_validate(copy.deepcopy(chat))
        said = request.model_dump(mode="json", warnings=False)["messages"]
        tools = request.tools and [tool.model_dump() for tool in request.tools]
        return [*map(meant, said)], tools


def meant(message: Json) -> Json:
    """A chat message as a template sees it."""
    content = message.get("content")
    if isinstance(content, list):
        content = [part["text"] for part in content]
    calls = [(c["id"], c["function"]) for c in message.get("tool_calls") or ()]
    names = ("role", "reasoning", "tool_call_id")
    return {**{name: message.get(name) for name in names}, "content": content, "calls": calls}


@pytest.fixture(scope="session")
def vllm() -> Native:
    """vLLM's classes, where it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("vllm")
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
        from vllm.entrypoints.openai.responses.utils import (
            construct_input_messages,
            construct_tool_dicts,
        )
    return Native(
        ResponsesRequest, ChatCompletionRequest, construct_input_messages, construct_tool_dicts
    )


@pytest.mark.engine
@settings(max_examples=100)
@given(body=bodies())
def test_the_model_sees_what_vllm_shows_it(vllm: Native, body: Json) -> None:
    body = {"model": "m", **body}
    translation = to_chat(body, SHOWN)
    expected = vllm.prompt(body)
    if translation.native is None and expected is not None:
        messages, tools = vllm.posted(translation.chat)
        assert (messages, tools or None) == (expected[0], expected[1] or None)


def event_stream(chunks: list[Json], body: Json, limit: int = 100) -> bytes:
    events = Events(body, limit)
    return b"".join([events.feed(chunk) for chunk in chunks]) + events.done()


def chat_chunk(delta: Json, finish_reason: str | None = None, **more: Any) -> Json:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "created": 9, "model": "m", "choices": [choice], **more}


def chat_stream(deltas: list[Json], finish_reason: str = "stop") -> list[Json]:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    first = chat_chunk({"role": "assistant", "content": ""}, prompt_token_ids=[1, 2, 3])
    last = {"id": "chatcmpl-1", "created": 9, "model": "m", "choices": [], "usage": usage}
    middle = [chat_chunk(delta) for delta in deltas]
    return [first, *middle, chat_chunk({}, finish_reason), last]


def captured(chunks: list[Json]) -> Capture:
    capture = Capture()
    for chunk in chunks:
        capture.chunk(chunk)
    return capture


def said_by(capture: Capture) -> tuple[Json, str | None, Json | None]:
    return capture.message(), capture.finish_reason, capture.usage


def deltas() -> st.SearchStrategy[list[Json]]:
    """Reasoning, then content, then calls, each in pieces."""
    text = short().filter(bool)
    thoughts = st.lists(text.map(lambda piece: {"reasoning": piece}), max_size=3)
    content = st.lists(text.map(lambda piece: {"content": piece}), max_size=3)

    def call(index: int, name: str, pieces: list[str]) -> list[Json]:
        head: Json = {"index": index, "id": f"call_{index}", "type": "function"}
        opened = {**head, "function": {"name": name, "arguments": ""}}
        rest = [{"index": index, "function": {"arguments": piece}} for piece in pieces]
        return [{"tool_calls": [part]} for part in (opened, *rest)]

    calls = st.lists(st.tuples(text, st.lists(text, max_size=3)), max_size=3).map(
        lambda made: [d for i, (name, pieces) in enumerate(made) for d in call(i, name, pieces)]
    )
    return st.tuples(thoughts, content, calls).map(lambda parts: [*itertools.chain(*parts)])


@given(deltas(), st.sampled_from(["stop", "length"]))
def test_a_native_stream_reads_back_as_the_chat_stream_it_could_have_been(
    pieces: list[Json], finish_reason: str
) -> None:
    called = any("tool_calls" in delta for delta in pieces)
    if called and finish_reason == "stop":
        finish_reason = "tool_calls"
    chunks = chat_stream(pieces, finish_reason)
    native = payloads(event_stream(chunks, {"model": "m", "input": "hi"}))
    reader = Chunks()
    read = [chunk for chunk in map(reader.feed, native) if chunk is not None]
    assert said_by(captured(read)) == said_by(captured(chunks))
    whole = Capture()
    whole.body(to_chat_reply(native[-1]["response"]))
    assert said_by(whole) == said_by(captured(chunks))


@given(deltas())
def test_a_plain_reply_holds_what_the_stream_ends_with(pieces: list[Json]) -> None:
    chunks = chat_stream(pieces)
    capture = captured(chunks)
    choice = {"index": 0, "message": capture.message(), "finish_reason": "stop"}
    reply: Json = {**chunks[0], "usage": capture.usage, "choices": [choice]}
    body: Json = {"model": "m", "input": "hi"}
    plain = from_chat(reply, body, 100)
    assert Response.model_validate_json(compact(plain)).id == plain["id"]
    streamed = payloads(event_stream(chunks, body))[-1]["response"]
    for item in (*plain["output"], *streamed["output"]):
        if item["type"] == "reasoning":
            item["status"] = "completed"  # vLLM leaves it open in plain replies
    assert plain == streamed


@given(deltas())
def test_a_reply_sent_back_as_input_is_the_reply(pieces: list[Json]) -> None:
    chunks = chat_stream(pieces)
    output = payloads(event_stream(chunks, {"model": "m"}))[-1]["response"]["output"]
    history = [{"role": "user", "content": "hi"}, *output, {"role": "user", "content": "more"}]
    translation = to_chat({"model": "m", "input": history})
    assert translation.native is None
    if output:
        reply = captured(chunks).message()
        sent_back = read_history(translation.chat["messages"], Profile(GENERIC)).replies
        assert key_of(sent_back) == key_of([meaning_of(reply)])


def test_the_openai_sdk_reads_our_stream() -> None:
    deltas = [
        {"reasoning": "Hm."},
        {"content": "It is "},
        {"content": "noon."},
        {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "clock"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
    ]
    stream = event_stream(chat_stream(deltas, "tool_calls"), {"model": "m", "tools": [CLOCK]})
    headers = {"Content-Type": "text/event-stream; charset=utf-8"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, content=stream))
    with (
        OpenAI(api_key="x", http_client=httpx.Client(transport=transport)) as client,
        client.responses.stream(model="m", input="Time?") as events,
    ):
        response = events.get_final_response()
    assert response.output_text == "It is noon."
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.usage is not None
    assert response.usage.total_tokens == 5


def test_chunks_that_carry_only_tokens_say_nothing() -> None:
    events = Events({"model": "m"}, 100)
    events.feed(chat_stream([])[0])
    assert events.feed(chat_chunk({}, token_ids=[1])) == b""


def test_an_error_in_the_stream_ends_it() -> None:
    events = Events({"model": "m"}, 100)
    assert events.feed(chat_stream([])[0]) != b""
    assert not events.failed
    assert events.feed({"error": {"message": "the engine died"}}) == b""
    assert events.failed
    assert events.feed(chat_chunk({"content": "more"})) + events.done() == b""
    error = Chunks().feed({"error": {"message": "no"}})
    assert error == {"error": {"message": "no"}}


NATIVE: list[Json] = [
    {},
    {"input": "hi"},
    {"model": "m"},
    {"model": "m", "input": []},
    {"model": "m", "input": 5},
    {"model": "m", "input": [5, None, {}]},
    {"model": "m", "input": [user("hi"), {"type": "item_reference", "id": "msg_1"}]},
    {"model": "m", "input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    {"model": "m", "input": [{"role": "tool", "content": "hi"}]},
    {"model": "m", "input": [user("hi"), {**SAID, "status": "incomplete"}]},
    {"model": "m", "input": [user("hi"), {**SAID, "content": [{"type": "refusal"}]}]},
    {"model": "m", "input": [user("hi"), {**THOUGHT, "encrypted_content": "x"}]},
    {"model": "m", "input": [user("hi"), {"type": "reasoning"}]},
    {"model": "m", "input": [{**CALL, "arguments": {}}]},
    {"model": "m", "input": [{**CALL, "namespace": 3}]},
    {"model": "m", "input": [{**PATCHED, "input": None}]},
    {"model": "m", "input": [user("hi"), {"type": "web_search_call", "id": "ws_1"}]},
    {"model": "m", "input": [{**OUTPUT, "output": None}]},
    {"model": "m", "input": "hi", "previous_response_id": "resp_1"},
    {"model": "m", "input": "hi", "background": True},
    {"model": "m", "input": "hi", "background": None},
    {"model": "m", "input": "hi", "prompt": {"id": "p"}},
    {"model": "m", "input": "hi", "conversation": "c"},
    {"model": "m", "input": "hi", "include": ["message.output_text.logprobs"]},
    {"model": "m", "input": "hi", "top_logprobs": 2},
    {"model": "m", "input": "hi", "include_reasoning": False},
    {"model": "m", "input": "hi", "enable_response_messages": True},
    {"model": "m", "input": "hi", "truncation": "auto"},
    {"model": "m", "input": "hi", "tools": None},
    {"model": "m", "input": "hi", "tools": [{"type": "web_search"}]},
    {"model": "m", "input": "hi", "tools": [{"type": "mcp", "server_label": "x"}]},
    {"model": "m", "input": "hi", "tools": [{"type": "code_interpreter", "container": "c"}]},
    {"model": "m", "input": "hi", "tools": [{"type": "web_search_preview"}, CLOCK]},
    {"model": "m", "input": "hi", "tools": [{"type": "quantum_search"}]},
    {"model": "m", "input": "hi", "tools": [{**CLOCK, "defer_loading": "no"}]},
    {"model": "m", "input": "hi", "tools": [{"type": "namespace", "name": "n", "tools": []}]},
    {"model": "m", "input": "hi", "tools": [{"type": "custom"}]},
    {
        "model": "m",
        "input": "hi",
        "tools": [AGENTS, {**AGENTS, "name": "others"}],
        "tool_choice": {"type": "function", "name": "send"},
    },
    {"model": "m", "input": "hi", "tools": [{**CLOCK, "parameters": {"maximum": 1e30}}]},
    {"model": "m", "input": "hi", "tools": [{**CLOCK, "parameters": {"maximum": 10**25}}]},
    {"model": "m", "input": "hi", "tool_choice": "required"},
    {"model": "m", "input": "hi", "tool_choice": None},
    {"model": "m", "input": "hi", "tools": [CLOCK], "tool_choice": {"type": "function"}},
    {"model": "m", "input": "hi", "tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}},
    {
        "model": "m",
        "input": "hi",
        "tools": [CLOCK],
        "tool_choice": "required",
        "text": {"format": {"type": "text"}},
    },
    {
        "model": "m",
        "input": "hi",
        "tools": [{**AGENTS, "tools": [FORCED]}],
        "text": {"verbosity": "low"},
    },
    {"model": "m", "input": "hi", "text": {"format": {"type": "grammar"}}},
    {
        "model": "m",
        "input": "hi",
        "text": {"format": {"type": "text"}},
        "structured_outputs": {"choice": ["a"]},
    },
    {"model": "m", "input": "hi", "reasoning": {"effort": "huge"}},
    {"model": "m", "input": "hi", "temperature": "hot"},
    {"model": "m", "input": "hi", "temperature": True},
    {"model": "m", "input": "hi", "max_output_tokens": 0},
    {"model": "m", "input": "hi", "metadata": {"a": 1}},
    {"model": "m", "input": "hi", "logit_bias": {"1": 2}},
    {"model": "m", "input": "hi", "kv_transfer_params": {}},
]


@pytest.mark.parametrize("body", NATIVE, ids=lambda body: json.dumps(body)[-60:])
def test_requests_that_are_not_proven_go_native(body: Json) -> None:
    reason = to_chat(body).native
    assert reason is not None
    assert reason.endswith("so its tokens are not known")


def test_an_empty_list_of_tools_goes_through_chat_where_the_model_is_not_shown_it() -> None:
    body = {"model": "m", "input": "hi", "tools": [SERVED]}
    assert "no model is shown" in (to_chat(body).native or "")
    assert to_chat(body, MessagesBehaviour(shows_no_tools=True)).native is not None
    translation = to_chat(body, SHOWN)
    assert translation.native is None
    assert "tools" not in translation.chat


def test_a_grammar_that_vllm_refuses_is_told_to_the_model() -> None:
    body = {"model": "m", "input": "hi", "tools": [{**PATCH, "format": GRAMMAR}]}
    translation = to_chat(body)
    assert translation.native is None
    told = translation.chat["tools"][0]["function"]["description"]
    assert told.startswith("Changes a file.")
    assert "lark" in told
    assert "start: /.+/" in told


inputs = short() | st.text(alphabet='"\\\n ü🧮{}', max_size=30)


@given(inputs, st.booleans(), st.lists(st.integers(1, 9), max_size=9))
def test_a_custom_input_arrives_whole_however_it_is_cut(
    text: str, plain_ascii: bool, cuts: list[int]
) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=plain_ascii)
    pieces: list[str] = []
    for cut in [*cuts, len(arguments)]:
        pieces.append(arguments[:cut])
        arguments = arguments[cut:]
    head: Json = {"index": 0, "id": "call_1", "function": {"name": "patch"}}
    parts = [{"index": 0, "function": {"arguments": piece}} for piece in pieces]
    chunks = chat_stream([{"tool_calls": [part]} for part in (head, *parts)], "tool_calls")
    events = payloads(event_stream(chunks, {"model": "m", "tools": [PATCH]}))
    told = [e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(told) == text
    done = events[-1]["response"]["output"][0]
    assert (done["type"], done["name"], done["input"]) == ("custom_tool_call", "patch", text)


@pytest.mark.parametrize("arguments", ['{"other": 1}', "+ bare\n", '{"input": "\n', '{"input": 3}'])
def test_arguments_of_another_form_are_a_custom_tools_whole_input(arguments: str) -> None:
    call: Json = {"index": 0, "id": "c", "function": {"name": "patch", "arguments": arguments}}
    stream = event_stream(chat_stream([{"tool_calls": [call]}]), {"tools": [PATCH]})
    assert payloads(stream)[-1]["response"]["output"][0]["input"] == arguments


@pytest.mark.parametrize("name", CASES)
def test_requests_that_are_proven_go_through_chat(name: str) -> None:
    body = {"model": "m", **CASES[name]}
    before = orjson.dumps(body)
    assert to_chat(body).native is None
    assert to_chat({**body, "logit_bias": {"1": 1}}).chat == to_chat(body).chat
    assert orjson.dumps(body) == before


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-9, 9) | short(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(short(), inner, max_size=3),
    max_leaves=6,
)
FIELD_NAMES = st.sampled_from(
    sorted({*itertools.chain(*CASES.values()), "conversation", "prompt", "model", "stream"})
)


@given(st.dictionaries(FIELD_NAMES, JSON_VALUES), st.sampled_from(sorted(CASES)))
def test_no_body_raises(fields: Json, name: str) -> None:
    translation = to_chat({"model": "m", **CASES[name], **fields})
    for message in translation.chat["messages"]:
        assert message["role"] in ("system", "developer", "user", "assistant", "tool")
    Chunks().feed(fields)
    to_chat_reply(fields)


ITEM_PARTS = st.dictionaries(
    st.sampled_from(["type", "role", "content", "id", "status", "call_id", "output", "summary"]),
    JSON_VALUES | st.sampled_from(["message", "function_call", "reasoning", "user", "assistant"]),
)


@given(st.lists(ITEM_PARTS | st.sampled_from([SAID, CALL, OUTPUT, THOUGHT]), max_size=4))
def test_no_item_raises(made: list[Json]) -> None:
    mixed = [{**item, **change} for item, change in itertools.product((SAID, CALL, THOUGHT), made)]
    for listed in (made, mixed):
        to_chat({"model": "m", "input": listed})
        to_chat_reply({"output": listed})
