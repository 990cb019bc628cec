"""The Messages dialect: equal to vLLM's own answers, and readable where vLLM answers itself.

Three proofs of equality: a real engine asked both ways, vLLM's own conversion of the request, and
vLLM's own conversion of replies that no tiny model would give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.records import Json
from plugins.agents.profile import GENERIC, Profile
from proxy.dialects.messages import Chunks, from_chat, to_chat, to_chat_reply
from proxy.linking.history import read_history
from proxy.linking.meaning import meaning_of
from tests.conftest import Done
from tests.proxy.messages_cases import (
    CALLED,
    HABITUAL,
    MATRIX,
    REFERENCE,
    YES,
    ask,
    changing,
    equal_answers,
)
from tests.proxy.test_messages_conversion import bodies, values
from tests.running_loop import Engine


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
def test_requests_that_chat_could_serve_differently_go_native(change: Json, reason: str) -> None:
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
    read_history(translation.chat["messages"], Profile(GENERIC))
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
    reply = read_history(chat["messages"], Profile(GENERIC)).starts[0]
    assert chat["messages"][reply + 1 :] == [
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
    assert meaning_of(chat["messages"][1]) == meaning_of(message)


def test_the_content_of_native_requests_is_recorded_too() -> None:
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
