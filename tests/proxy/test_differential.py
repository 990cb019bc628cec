"""vLLM and the proxy answer the same request with the same bytes.

Random ids and times may differ. `same_answer` says when two streams count as equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextstate.records import Json
from tests.conftest import Done
from tests.running_loop import Engine
from tests.same_answer import Answer, answer_of, assert_same

pytestmark = pytest.mark.engine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
APPLES = "Tom has 3 apples and gets 4 more. How many?"


def user(content: Any) -> list[Json]:
    return [{"role": "user", "content": content}]


def function(name: str, **more: Any) -> Json:
    return {"type": "function", "function": {"name": name, **more}}


def called(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name":"{name}","arguments":{arguments}}}</tool_call>'


def scripted(*parts: str, **more: Any) -> Json:
    """A request with a grammar that forces the parts as the reply."""
    choice = {"choice": ["".join(parts)]}
    return {"tools": [WEATHER, CLOCK], "structured_outputs": choice, "max_tokens": 99, **more}


WEATHER = function(
    "get_weather",
    description="Tells the weather — «ü»",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}},
)
CLOCK = function("clock")
PICK = function("pick", parameters={"type": "object", "properties": {"a": {"enum": [7]}}})
FORCED: Json = {"tools": [PICK, CLOCK], "frequency_penalty": 2, "max_tokens": 60}
"""Without the penalty the tiny policy writes spaces up to the token limit."""
ROME, TIME = called("get_weather", '{"city":"Köln"}'), called("clock", "{}")
USAGE: Json = {"include_usage": True}
STATS: Json = {"continuous_usage_stats": True}
BIAS: Json = {"logit_bias": {"20": 100, "21": -100}}

BOTH: dict[str, Json] = {
    "nothing special": {},
    "ids": {"return_token_ids": True},
    "two choices": {"n": 2, "temperature": 1},
    "two choices, ids": {"n": 2, "temperature": 1, "return_token_ids": True},
    "stop": {"stop": ["is", "."]},
    "stop, kept": {"stop": ["7"], "include_stop_str_in_output": True, "max_tokens": 30},
    "stop id": {"stop_token_ids": [22, 23, 24], "return_token_ids": True},
    "to the end": {"max_tokens": 24},
    "one token": {"max_tokens": 1},
    "bias": BIAS,
    "sampled": {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
    "unknown fields": {"store": True, "user": "ü", "metadata": {"a": "b"}, "new": [1.0, 1e16]},
    "no model": {"model": None},
    "no stream, in a word": {"stream": "no"},
    "no ids, in a word": {"return_token_ids": "no"},
}
"""Fields that both routes take."""
STREAMED: dict[str, Json] = {
    "usage": {"stream_options": USAGE},
    "usage, ids": {"stream_options": USAGE, "return_token_ids": True},
    "usage all along": {"stream_options": {**USAGE, **STATS}},
    "usage all along alone": {"stream_options": STATS},
    "usage, in a word": {"stream_options": {"include_usage": "false"}},
    "no options": {"stream_options": {}},
    "null options": {"stream_options": None},
    "two choices, usage": {"n": 2, "temperature": 1, "stream_options": USAGE},
}
"""Fields that only a stream takes."""
CHATS: dict[str, Json] = {
    **BOTH,
    "logprobs": {"logprobs": True},
    "no logprobs": {"logprobs": False},
    "logprobs, in a word": {"logprobs": "yes"},
    "no logprobs, in a word": {"logprobs": "off"},
    "top logprobs": {"logprobs": True, "top_logprobs": 3},
    "logprobs, ids": {"logprobs": True, "return_token_ids": True},
    "top logprobs, ids": {"logprobs": True, "top_logprobs": 3, "return_token_ids": True},
    "two choices, logprobs": {"n": 2, "temperature": 1, "logprobs": True},
    "unknown role": {"messages": [{"role": "nobody", "content": "hi"}]},
    "unicode": {"messages": user('Größe: 3 €, "日本", \x7f \\ \n </think> 🧮 \u2028')},
    "unicode said": {"structured_outputs": {"choice": ['Ü "日本" \\ \n 🧮 e\u0301']}},
    "unicode said, logprobs": {
        "structured_outputs": {"choice": ["日本 🧮"]},
        "logprobs": True,
        "return_token_ids": True,
    },
    "blank": {"structured_outputs": {"choice": ["\n \n"]}},
    "parts": {"messages": user([{"type": "text", "text": "Hi."}, {"type": "text", "text": "?"}])},
    "system messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "Be kind."},
            *user("Hi"),
            {"role": "assistant", "content": "Hello."},
            {"role": "developer", "content": "Kurz."},
            *user(APPLES),
        ]
    },
    "tool turns": {
        "tools": [WEATHER],
        "messages": [
            *user("Rome?"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": "{}"},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "12 °C"},
        ],
    },
    "tools auto": {"tools": [WEATHER, CLOCK], "tool_choice": "auto"},
    "tools none": {"tools": [WEATHER], "tool_choice": "none"},
    "required": {**FORCED, "tool_choice": "required"},
    "named": {**FORCED, "tool_choice": function("pick")},
    "a call": scripted(ROME),
    "a call, ids": scripted(TIME, return_token_ids=True, logprobs=True),
    "text, two calls": scripted("«So»: ", TIME, "\n", TIME),
    "one of two calls": scripted(TIME, TIME, parallel_tool_calls=False),
    "cut call": scripted(TIME, max_tokens=15),
    "no call wanted": scripted(TIME, tool_choice="none"),
    "schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"enum": [{"n": 7}]}, "strict": True},
        },
        "max_tokens": 20,
    },
    "json object": {"response_format": {"type": "json_object"}},
    "completion tokens": {"max_completion_tokens": 3},
    "no generation prompt": {
        "messages": [*user("Hi"), {"role": "assistant", "content": "He"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
}
PROMPTS: dict[str, Json] = {
    **BOTH,
    "one prompt in a list": {"prompt": [APPLES]},
    "prompts": {"prompt": ["One and", "two or «ü» and"]},
    "prompts, two choices": {"prompt": ["One", "Two"], "n": 2, "temperature": 1},
    "prompt of ids": {"prompt": [20, 21, 22]},
    "prompts of ids": {"prompt": [[20, 21], [22, 23, 24]], "return_token_ids": True},
    "logprobs 0": {"logprobs": 0},
    "logprobs 2": {"logprobs": 2},
    "logprobs 2, ids": {"logprobs": 2, "return_token_ids": True},
    "two choices, logprobs": {"n": 2, "temperature": 1, "logprobs": 1},
    "echo": {"echo": True},
    "echo, two prompts": {"echo": True, "prompt": ["One", "Two"]},
    "unicode": {"structured_outputs": {"choice": ["日本 🧮"]}, "logprobs": 0},
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
REFUSED: dict[str, tuple[str, Json]] = {
    "message without max_tokens": (MESSAGES, {"messages": user(APPLES)}),
    "message to nobody": (MESSAGES, {"model": "no", "messages": user("Hi"), "max_tokens": 8}),
    "message without a model": (MESSAGES, {"model": None, "messages": user("Hi"), "max_tokens": 8}),
    "message with bad messages": (MESSAGES, {"messages": "Hi", "max_tokens": 8}),
    "response to nothing": (RESPONSES, {}),
    "response to nobody": (RESPONSES, {"model": "no", "input": "Hi"}),
    "response of a bad type": (RESPONSES, {"input": 7}),
    "unknown model": (CHAT, {"model": "nobody"}),
    "unknown model, prompt": (COMPLETIONS, {"model": "nobody"}),
    "model of a bad type": (CHAT, {"model": 3}),
    "no messages": (CHAT, {"messages": None}),
    "empty messages": (CHAT, {"messages": []}),
    "messages of a bad type": (CHAT, {"messages": "hi"}),
    "message of a bad type": (CHAT, {"messages": ["hi"]}),
    "image": (CHAT, {"messages": user([{"type": "text", "text": "?"}, IMAGE])}),
    "max_tokens too large": (CHAT, {"max_tokens": 10**6}),
    "max_tokens too large, prompt": (COMPLETIONS, {"max_tokens": 10**6}),
    "max_tokens of a bad type": (CHAT, {"max_tokens": "many"}),
    "temperature": (CHAT, {"temperature": -1}),
    "top_p": (COMPLETIONS, {"top_p": 7}),
    "no choice": (CHAT, {"n": 0}),
    "no choice, prompt": (COMPLETIONS, {"n": 0}),
    "no tokens": (COMPLETIONS, {"max_tokens": 0}),
    "options of a bad type": (CHAT, {"stream": True, "stream_options": 3}),
    "options without a stream": (CHAT, {"stream_options": USAGE}),
    "options without a stream, prompt": (COMPLETIONS, {"stream_options": USAGE}),
    "top_logprobs alone": (CHAT, {"top_logprobs": 2}),
    "too many logprobs": (CHAT, {"logprobs": True, "top_logprobs": 99}),
    "too many logprobs, prompt": (COMPLETIONS, {"logprobs": 99}),
    "negative logprobs": (COMPLETIONS, {"logprobs": -5}),
    "logprobs of a bad type": (CHAT, {"logprobs": "some"}),
    "unknown tool": (CHAT, {"tools": [CLOCK], "tool_choice": function("nobody")}),
    "tool choice alone": (CHAT, {"tool_choice": "required"}),
    "tools of a bad type": (CHAT, {"tools": "clock"}),
    "suffix": (COMPLETIONS, {"suffix": "."}),
    "no prompt": (COMPLETIONS, {"prompt": None}),
    "empty prompt": (COMPLETIONS, {"prompt": ""}),
    "prompts of a bad type": (COMPLETIONS, {"prompt": [{}]}),
    "prompt too long": (CHAT, {"messages": user("word " * 3000)}),
    "ids of a bad type": (CHAT, {"return_token_ids": "maybe"}),
    "broken grammar": (CHAT, {"structured_outputs": {"regex": "("}}),
    "bias beyond the vocabulary": (CHAT, {"logit_bias": {"99999999": 1}}),
}
BODIES: dict[str, bytes | None] = {
    "none": None,
    "empty": b"",
    "no JSON": b'{"model": ',
    "a list": b"[]",
    "a number": b"7",
    "empty object": b"{}",
    "no UTF-8": b'{"model": "\xff"}',
    "lone surrogate": b'{"model":"policy","messages":[{"role":"user","content":"\\ud800"}]}',
}
DIALECTS: dict[str, tuple[str, Json]] = {
    "message": (MESSAGES, {"messages": user(APPLES), "max_tokens": 8}),
    "message with a call": (
        MESSAGES,
        {
            "messages": user(APPLES),
            "tools": [{"name": "ok", "input_schema": {"enum": [{"a": "ü"}]}, "strict": True}],
            "tool_choice": {"type": "any"},
            "max_tokens": 60,
        },
    ),
    "message with a system message": (
        MESSAGES,
        {
            "messages": [*user("Hi"), {"role": "system", "content": "Be brief."}, *user(APPLES)],
            "thinking": {"type": "disabled"},
            "tools": [],
            "max_tokens": 8,
        },
    ),
    "message, natively": (
        MESSAGES,
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_result", "content": "7"}]},
                *user(APPLES),
            ],
            "max_tokens": 8,
        },
    ),
    "response": (RESPONSES, {"input": APPLES, "max_output_tokens": 8}),
    "response with calls": (
        RESPONSES,
        {
            "input": APPLES,
            "tools": [{"type": "function", "name": "clock"}],
            "structured_outputs": {"choice": ["So: " + TIME]},
            "max_output_tokens": 80,
        },
    ),
    "response, natively": (
        RESPONSES,
        {"input": APPLES, "truncation": "auto", "max_output_tokens": 8},
    ),
}


CASES = {
    **{f"chat: {name}": (CHAT, case) for name, case in CHATS.items()},
    **{f"completion: {name}": (COMPLETIONS, case) for name, case in PROMPTS.items()},
    **DIALECTS,
}
STREAMS = {
    **{f"chat: {name}": (CHAT, case) for name, case in STREAMED.items()},
    **{f"completion: {name}": (COMPLETIONS, case) for name, case in STREAMED.items()},
}


def request_of(engine: Engine, path: str, more: Json, stream: bool = False) -> Json:
    """A greedy request."""
    said: Json = {}
    if path == CHAT:
        said = {"messages": user(APPLES), "max_tokens": 8, "seed": 1}
    elif path == COMPLETIONS:
        said = {"prompt": APPLES, "max_tokens": 8, "seed": 1}
    body = {"model": engine.model, "temperature": 0, "cache_salt": "-", **said, **more}
    if stream:
        body["stream"] = True
    return {name: value for name, value in body.items() if value is not None}


def same(engine: Engine, path: str, body: Json | bytes | None, **how: Any) -> Answer:
    """The proxy's answer, after a check that vLLM's is the same."""
    return assert_same(engine, path, body, **how)


def precise(more: Json) -> bool:
    """Whether the answer has log-probs: their last digit depends on the rest of the batch."""
    return "logprobs" in more


@pytest.fixture(scope="module")
def answers(native_engine: Engine, ask_at_once: Callable[..., Done]) -> Done:
    """The proxy's answers, after a check that vLLM's are the same."""

    def ask(case: str, stream: bool) -> Answer | None:
        path, more = {**CASES, **REFUSED}[case]
        if precise(more):
            return None
        return same(native_engine, path, request_of(native_engine, path, more, stream))

    return ask_at_once("answers", ask)


plain_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


@plain_and_streamed
@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_that_of_vllm(
    native_engine: Engine,
    answers: Done,
    case: str,
    stream: bool,
) -> None:
    path, more = CASES[case]
    answer: Answer | None = answers[case, stream].result()
    if answer is None:
        answer = same(native_engine, path, request_of(native_engine, path, more, stream))
    assert answer.status == 200


@pytest.mark.parametrize("case", STREAMS)
def test_stream_options_show_what_they_show_at_vllm(native_engine: Engine, case: str) -> None:
    path, more = STREAMS[case]
    assert same(native_engine, path, request_of(native_engine, path, more, True)).status == 200


@plain_and_streamed
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_in_the_words_of_vllm(
    native_engine: Engine,
    answers: Done,
    case: str,
    stream: bool,
) -> None:
    path, more = REFUSED[case]
    answer: Answer | None = answers[case, stream].result()
    if answer is None:
        answer = same(native_engine, path, request_of(native_engine, path, more, stream))
    assert stream or answer.status >= 400


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
def test_invalid_bodies_are_refused_in_the_words_of_vllm(native_engine: Engine, path: str) -> None:
    for body in BODIES.values():
        assert same(native_engine, path, body).status >= 400
    good = json.dumps(request_of(native_engine, path, {})).encode()
    for content_type in ("text/plain", "application/x-www-form-urlencoded", None):
        same(native_engine, path, good, content_type=content_type)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("DELETE", COMPLETIONS),
        ("GET", MESSAGES),
        ("PUT", "/v1/models"),
        ("GET", "/v1/nowhere"),
        ("POST", "/v1/nowhere"),
        ("OPTIONS", CHAT),
        ("GET", "/v1/models/nobody"),
    ],
)
def test_unknown_routes_are_refused_in_the_words_of_vllm(
    native_engine: Engine, method: str, path: str
) -> None:
    for body in (None, {"model": native_engine.model}):
        same(native_engine, path, body, method=method)


@pytest.mark.parametrize(
    "more",
    [
        {"messages": user(APPLES)},
        {"messages": user(APPLES), "system": "Be brief.", "max_tokens": 9},
        {"messages": "Hi"},
        {"model": "nobody", "messages": user("Hi")},
    ],
)
def test_tokens_are_counted_as_vllm_counts_them(native_engine: Engine, more: Json) -> None:
    body = {"model": native_engine.model, **more}
    same(native_engine, "/v1/messages/count_tokens", body)


def test_the_models_are_those_of_vllm_without_its_adapters(native_engine: Engine) -> None:
    def listed(url: str, key: str | None = None) -> tuple[int, Json]:
        answer = answer_of(url, "/v1/models", None, method="GET", key=key)
        return answer.status, json.loads(answer.body)

    status, models = listed(native_engine.url, native_engine.key)
    bases = [model for model in models["data"] if model["parent"] is None]
    models["data"] = [{**model, "root": model["id"]} for model in bases]  # no path is told
    assert listed(native_engine.proxy_url) == (status, models)


def values(cases: dict[str, Json]) -> st.SearchStrategy[Json]:
    """Bodies that mix the fields of several cases."""
    parts = st.lists(st.sampled_from([*cases.values()]), min_size=1, max_size=3)
    changes = st.sampled_from(
        [{}, {}, {}, {"n": "2"}, {"seed": 0.5}, {"tools": []}, {"logprobs": 2}]
    )
    return st.builds(
        lambda found, change: {
            key: value for one in (*found, change) for key, value in one.items()
        },
        parts,
        changes,
    )


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    asked=st.one_of(
        st.tuples(st.just(CHAT), values({**CHATS, **STREAMED})),
        st.tuples(st.just(COMPLETIONS), values({**PROMPTS, **STREAMED})),
    ),
    stream=st.booleans(),
)
def test_any_mixture_is_answered_as_vllm_answers_it(
    native_engine: Engine, asked: tuple[str, Json], stream: bool
) -> None:
    path, more = asked
    if more.get("echo") and "logprobs" in more:
        return  # the proxy refuses it: it could end the engine
    same(native_engine, path, request_of(native_engine, path, more, stream))
