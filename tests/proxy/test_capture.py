"""Tool calls are read as the official SDKs read them, or the turn does not train."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.capture import Capture


def captured(*deltas: list[dict[str, Any]], finish: str = "tool_calls") -> Capture:
    capture = Capture()
    for calls in deltas:
        delta = {"tool_calls": calls}
        choice = {"index": 0, "delta": delta, "logprobs": {"content": [{"logprob": -0.5}]}}
        capture.chunk({"model": "m", "choices": [{**choice, "token_ids": [1]}]})
    end = {"index": 0, "delta": {}, "finish_reason": finish}
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
        [part(2, "get_weather", id="c3")],
        [part(2, None, "{}")],
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


@pytest.mark.parametrize(
    ("deltas", "reason"),
    [
        ([[part(0, "ls", id="a")], [part(0, "cat", "{}")]], "0 twice"),
        ([[part(0, "ls", id="a")], [part(0, "cat", "{}", id="a")]], "0 twice"),
        ([[part(2, "read", "", id="a")], [part(2, "_file", "{}")]], "2 twice"),
        ([[part(1, "get_", id="c")], [part(1, "time", "{}", id="c")]], "1 twice"),
        ([[part(0, "f", "{}", id="a")], [part(0, None, "{}", id="a")]], "0 twice"),
        ([[part(0, "f", '{"a": 1}', id="a")], [part(0, None, ' {"a": 2}')]], "0 twice"),
        ([[part(0, "f", "[1]", id="a")], [part(0, None, "[1]")]], "0 twice"),
        ([[part(0, "f", '{"a"', id="a")], [part(0, None, '{"a": 1}')]], "0 twice"),
        ([[part(0, "f", '{"a"', id="a")], [part(0, None, ": 1}")], [part(0, "", "{}")]], "0 twice"),
        ([[part(0, None, "{}", id="a")]], "without its name"),
        ([[part(4, "", "{}")]], "without its name"),
        ([[part(0, "f", "{}", id="a"), part(1, None, "{}", id="b")]], "without its name"),
        ([[part(True, "f", "{}", id="a")]], "its index"),
        ([[part(0, "f", "{}", id="a", type="custom")]], "type"),
        ([[{"index": 0, "id": "a", "type": "custom", "custom": {"name": "f"}}]], "type"),
        ([{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}], "types"),
    ],
)
def test_calls_that_were_not_told_as_an_engine_tells_them_do_not_train(
    deltas: list[Any], reason: str
) -> None:
    assert reason in str(captured(*deltas).untrainable({}))


@pytest.mark.parametrize(
    "arguments",
    [
        ["{", '"a": {}', "}"],
        ["{}", " "],
        ['{"a": "', "{}", '{}"}'],
        ['{"', '{"', ": 1}"],
        ['{"a": [{}', ", {}", "]}"],
        ['{"a": 1}', "}"],  # the model's own mistake
        ["", "{}"],
        ['{"a": 1', "2"],
        ["1", "1"],
    ],
)
def test_arguments_train_in_whatever_parts_they_come(arguments: list[str]) -> None:
    first, *more = arguments
    capture = captured([part(0, "f", first, id="a")], *([part(0, None, m)] for m in more))
    assert capture.untrainable({}) is None
    (call,) = capture.message()["tool_calls"]
    assert call["function"]["arguments"] == "".join(arguments)


TREE = '{"children": ['


@pytest.mark.parametrize(
    "arguments",
    [
        [TREE, TREE],
        [TREE, TREE, TREE, '{"chi'],
        [TREE, TREE, "{}, ", '{"children": "'],
        ["[", "[", "[1, 2], ", "[-"],
        ['{"and": ', '{"and": ', '{"and": tr'],
        ['{"text": "', '{\\"text\\": \\"', "a \\u00"],
        ['{"a": [1, ', '{"a": [1, ', "2.5"],
        [" " + TREE, TREE, "\n"],
        [TREE * 400, TREE * 400],
        [TREE, TREE, "9" * 5000],
    ],
)
@pytest.mark.parametrize("finish", ["length", "tool_calls"])
def test_a_tree_with_a_name_on_each_level_that_ends_too_early_was_told_once(
    arguments: list[str], finish: str
) -> None:
    first, *more = arguments
    parts = [part(0, "f", first, id="a"), *(part(0, None, m) for m in more)]
    capture = captured(*([one] for one in parts), finish=finish)
    assert capture.untrainable({}) is None


@pytest.mark.parametrize(
    "told",
    [
        ["{", '{"a', '{"a": 1'],
        ['{"', '{"path', '{"path": "x'],
        ['{"', '{"path'],
        ['{"a": "', '{"a": "x'],
        ['{"a": 1, "b"', '{"a": 1, "b": [tr'],
        ["[1", "[1, 2"],
    ],
)
@pytest.mark.parametrize("finish", ["length", "tool_calls"])
def test_parts_that_each_hold_all_before_them_are_no_tree(told: list[str], finish: str) -> None:
    first, *more = told
    parts = [part(0, "f", first, id="a"), *(part(0, None, m) for m in more)]
    capture = captured(*([one] for one in parts), finish=finish)
    assert "0 twice" in str(capture.untrainable({}))


def test_a_tree_that_is_whole_within_another_may_be_the_other_told_again() -> None:
    parts = [part(0, "f", '{"a":', id="a"), part(0, None, '{"a": 1}')]
    assert "0 twice" in str(captured(*([one] for one in parts)).untrainable({}))
    cut = captured(*([one] for one in parts), finish="length")
    assert cut.untrainable({}) is None


def test_what_a_model_wrote_twice_in_a_whole_reply_is_its_own() -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": '{"a": 1}{"a": 2}'}}
    capture = whole({"content": None, "tool_calls": [call]}, "tool_calls")
    assert capture.untrainable({}) is None


def whole(message: dict[str, Any], finish: Any = "stop") -> Capture:
    """A plain reply of one token."""
    told = {"content": [{"token": "x", "logprob": -0.5}]}
    choice = {"index": 0, "message": message, "logprobs": told, "token_ids": [1]}
    capture = Capture()
    capture.body(
        {
            "model": "m",
            "choices": [{**choice, "finish_reason": finish}],
            "prompt_token_ids": [5],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        }
    )
    return capture


def streamed(delta: dict[str, Any], finish: Any = "stop", *more: dict[str, Any]) -> Capture:
    """The same in a stream, with chunks behind it."""
    told = {"content": [{"token": "x", "logprob": -0.5}]}
    choice = {"index": 0, "delta": delta, "logprobs": told, "token_ids": [1]}
    usage = {"model": "m", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    capture = Capture()
    capture.chunk({"model": "m", "choices": [choice], "prompt_token_ids": [5]})
    end = {"index": 0, "delta": {}, "finish_reason": finish}
    for chunk in ({"model": "m", "choices": [end]}, usage, *more):
        capture.chunk(chunk)
    return capture


@pytest.mark.parametrize("reply", [whole, streamed])
@pytest.mark.parametrize("finish", ["stop", "length", "tool_calls"])
def test_a_reply_that_ended_as_replies_end_trains(reply: Any, finish: str) -> None:
    assert reply({"content": "x"}, finish).untrainable({}) is None


@pytest.mark.parametrize("reply", [whole, streamed])
@pytest.mark.parametrize(
    ("finish", "named"),
    [
        *((name, f"by {name}") for name in ("abort", "error", "repetition", "content_filter")),
        ("function_call", "by function_call"),
        ("eos_token", "by eos_token"),
        ("", "that is not known"),
        ("what you said: no", "that is not known"),
        ("x" * 5000, "that is not known"),
        (0, "types"),
        (False, "types"),
        ({"reason": "stop"}, "types"),
    ],
)
def test_a_reply_that_ended_in_another_way_does_not_train(
    reply: Any, finish: Any, named: str
) -> None:
    capture = reply({"content": "x"}, finish)
    assert named in str(capture.untrainable({}))
    assert len(capture.finish_reason or "") <= 40


@pytest.mark.parametrize("reply", [whole, streamed])
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"refusal": "No."}, "refusal"),
        ({"content": "x", "refusal": "No."}, "refusal"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
        ({"audio": {"data": "x"}}, "audio"),
        ({"content": "x", "images": [{"image_url": "x"}]}, "images"),
        ({"what you said": "x"}, "that is not recorded"),
        ({"reasoning": {"text": "x"}}, "types"),
        ({"reasoning_content": ["x"]}, "types"),
        ({"content": "x", "reasoning": "so", "reasoning_content": "or so"}, "types"),
        ({"tool_calls": {"function": {"name": "f"}}}, "types"),
        ({"tool_calls": ["f"]}, "types"),
    ],
)
def test_what_is_not_recorded_does_not_train(reply: Any, said: dict[str, Any], reason: str) -> None:
    assert reason in str(reply(said).untrainable({}))


@pytest.mark.parametrize("reply", [whole, streamed])
def test_fields_without_words_of_the_model_change_nothing(reply: Any) -> None:
    nothing = dict.fromkeys(("refusal", "audio", "function_call", "reasoning_content"))
    said = {"role": "assistant", "content": "x", **nothing, "tool_calls": [], "annotations": [{}]}
    assert reply(said).untrainable({}) is None
    same = {"content": "x", "reasoning": "so", "reasoning_content": "so"}
    assert reply(same).message()["reasoning"] == "so"
    assert reply(same).untrainable({}) is None


@pytest.mark.parametrize(
    ("late", "reason"),
    [
        ({"model": "m", "choices": [{"index": 0, "delta": {"content": "y"}}]}, "after its end"),
        ({"model": "m", "choices": [], "prompt_token_ids": [6]}, "two prompts"),
        ({"model": "other", "choices": []}, "two models"),
    ],
)
def test_a_stream_that_contradicts_itself_does_not_train(late: dict[str, Any], reason: str) -> None:
    assert reason in str(streamed({"content": "x"}, "stop", late).untrainable({}))
    same = {"model": "m", "choices": [{"index": 0, "delta": {}}], "prompt_token_ids": [5]}
    assert streamed({"content": "x"}, "stop", same).untrainable({}) is None
