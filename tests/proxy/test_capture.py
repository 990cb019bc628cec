"""Tool calls are read as the official SDKs read them, or the turn does not train."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.capture import Capture


def captured(*deltas: list[dict[str, Any]]) -> Capture:
    capture = Capture()
    for calls in deltas:
        delta = {"tool_calls": calls}
        choice = {"index": 0, "delta": delta, "logprobs": {"content": [{"logprob": -0.5}]}}
        capture.chunk({"model": "m", "choices": [{**choice, "token_ids": [1]}]})
    end = {"index": 0, "delta": {}, "finish_reason": "tool_calls"}
    count = len(deltas)
    usage = {"prompt_tokens": 1, "completion_tokens": count}
    capture.chunk({"model": "m", "choices": [end], "prompt_token_ids": [5], "usage": usage})
    return capture


def part(index: Any = 0, name: Any = None, arguments: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    told = {key: value for key, value in function.items() if value is not None}
    return {"index": index, "function": told, **more}


def without_index(call: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in call.items() if key != "index"}


def test_calls_that_come_in_parts_are_joined_and_train() -> None:
    capture = captured(
        [part(0, "look", "", id="c1", type="function")],
        [part(0, None, '{"a"')],
        [part(0, None, ": 1}"), part(1, "find", "{}", id="c2")],
        [part(2, "get_", id="c3")],
        [part(2, "weather", "{}")],
        [part(1, "", "", id="c2")],
    )
    calls = capture.message()["tool_calls"]
    named = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in calls]
    assert named == [("c1", "look", '{"a": 1}'), ("c2", "find", "{}"), ("c3", "get_weather", "{}")]
    assert capture.untrainable({}) is None


@pytest.mark.parametrize(
    ("deltas", "reason"),
    [
        ([[part(0, "a", "{}", id="c1")], [part(0, "b", "{}", id="c2")]], "0 twice"),
        ([[part(3, "a", "{}", id="c1")], [part(3, "a", "{}", id="c1")]], "3 twice"),
        ([[part(0, "a", "{")], [part(0, "a", "}")]], "0 twice"),
        ([[part(0, "a", '{"a": 1}')], [part(0, "b", '{"b": 2}')]], "0 twice"),
        ([[part(0, "a", "{}", id="c1"), part(0, "a", "{}", id="c2")]], "0 twice"),
        ([[part(0, "a")], [part(0, "b")]], "0 twice"),
        ([[part(0, "a", id="c1")], [part(0, "ab", "{}", id="c1")]], "0 twice"),
        ([[part(0, "a", id="c1")], [part(0, "a_")]], "0 twice"),
        ([[without_index(part(0, "a", "{}"))], [without_index(part(0, "b", "{}"))]], "its index"),
        ([[part(None, "a", "{}")]], "its index"),
        ([[part("0", "a", "{}")]], "its index"),
        ([[part(0, "a", {"x": 1})]], "types"),
    ],
)
def test_calls_that_clients_read_differently_do_not_train(
    deltas: list[list[dict[str, Any]]], reason: str
) -> None:
    capture = captured(*deltas)
    assert reason in str(capture.untrainable({}))
    for call in capture.message().get("tool_calls", []):
        assert call["function"]["name"] in ("a", "b")


def test_the_calls_of_a_whole_reply_need_no_index() -> None:
    calls = [without_index(part(0, name, "{}", id=name)) for name in ("a", "a", "b")]
    choice = {"index": 0, "message": {"tool_calls": calls}, "finish_reason": "tool_calls"}
    capture = Capture()
    capture.body({"model": "m", "choices": [choice]})
    assert [c["function"]["name"] for c in capture.message()["tool_calls"]] == ["a", "a", "b"]
    assert capture.error is None


def test_tokens_that_say_more_than_the_message_are_noticed() -> None:
    delta, entry = b'{"content":"Hi"}', b'{"content":[{"token":"%b","logprob":-0.5,"bytes":null}]}'
    for token, same in ((b"Hi", True), (b"oHi", False), (b'\\"token\\":\\"Hi', False)):
        capture = Capture()
        capture.piece((delta, entry % token, b"7"))
        assert capture.says_its_tokens() is same, token
        assert capture.pieces() == [token.decode().replace("\\", "")]
