"""A reply cut as bytes is the reply that parsing, stripping and writing anew would give."""

from __future__ import annotations

import copy
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from proxy.capture import Capture
from proxy.dialects.chat import Asked, client_reply
from proxy.serving import compact
from proxy.whole_reply import take_apart
from tests.proxy.test_splice import TRAPS, askings, texts, tokens

TRAPS_HERE = [
    *TRAPS,
    ',"logprobs":{"content":[',
    ']},"finish_reason":',
    ',"token_ids":[1]',
    ',"prompt_token_ids":[',
    '"model":"v-1"',
    "{",
]
messages = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts | st.sampled_from(TRAPS_HERE) | st.none()},
    optional={
        "reasoning": texts | st.sampled_from(TRAPS_HERE),
        "tool_calls": st.just(
            [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}]
        ),
    },
)


def reply_of(
    message: dict[str, Any], sampled: list[Any], text: str, alternatives: int = 0
) -> dict[str, Any]:
    """A plain reply as vLLM gives it."""
    entries: list[dict[str, Any]] = []
    for _, logprob in sampled:
        entry = {"token": text, "logprob": logprob, "bytes": list(text.encode())}
        others = [{**entry, "logprob": logprob - n} for n in range(alternatives)]
        entries.append({**entry, "top_logprobs": others})
    choice = {"index": 0, "message": message, "logprobs": {"content": entries}}
    choice |= {"finish_reason": "stop", "stop_reason": None}
    choice["token_ids"] = [number for number, _ in sampled]
    usage = {
        "prompt_tokens": 2,
        "total_tokens": 2 + len(sampled),
        "completion_tokens": len(sampled),
    }
    head = {"id": text or "x", "object": "chat.completion", "created": 1, "model": "v-1"}
    rest = {"usage": usage, "prompt_logprobs": None, "prompt_token_ids": [7, 8], "metrics": None}
    return {**head, "choices": [choice], "service_tier": None, **rest}


def read(capture: Capture) -> tuple[Any, ...]:
    capture.read()
    ids, logprobs = capture.completion_ids, capture.logprobs
    told = capture.prompt_ids, capture.model, capture.usage, capture.choices, capture.error
    return capture.message(), ids, logprobs, told, capture.finish_reason, capture.untrainable({})


@given(askings, messages, tokens, texts | st.sampled_from(TRAPS_HERE), st.integers(0, 3))
def test_a_reply_is_the_same_as_if_it_were_parsed_and_loses_nothing(
    asked: Asked, message: dict[str, Any], sampled: list[Any], text: str, alternatives: int
) -> None:
    data = compact(reply_of(message, sampled, text, alternatives))
    whole = take_apart(data, asked)
    if whole is None:
        assert "{" in text
        return
    cut, parsed = Capture(), Capture()
    cut.whole(whole)
    parsed.body(orjson.loads(data))
    assert whole.sent == compact(client_reply(orjson.loads(data), asked))
    assert read(cut) == read(parsed)


MISSHAPEN = [
    lambda reply: reply["choices"].append(copy.deepcopy(reply["choices"][0])),
    lambda reply: reply["choices"].clear(),
    lambda reply: reply["choices"][0].update(logprobs=None),
    lambda reply: reply["choices"][0].update(index=1),
    lambda reply: reply["choices"][0].update(token_ids=None),
    lambda reply: reply["choices"][0].update(token_ids=reply["choices"][0].pop("token_ids")),
    lambda reply: reply["choices"][0]["message"].update(logprobs={"content": [1]}),
    lambda reply: reply.update(prompt_token_ids=None),
    lambda reply: reply.update(model=5),
    lambda reply: reply.update(id={"model": "v-1"}),
    lambda reply: reply.update(choices=5),
]


def test_any_other_shape_is_left_to_the_parser_or_comes_out_the_same() -> None:
    asked = Asked("mine")
    for change in MISSHAPEN:
        reply = reply_of({"role": "assistant", "content": "Hi"}, [(1, -0.5), (2, -0.25)], "Hi")
        change(reply)
        whole = take_apart(compact(reply), asked)
        if whole is not None:
            assert orjson.loads(whole.sent) == client_reply(copy.deepcopy(reply), asked)
    assert take_apart(orjson.dumps(reply, option=orjson.OPT_INDENT_2), asked) is None


def test_alternatives_never_count_as_log_probs_of_tokens() -> None:
    reply = reply_of({"role": "assistant", "content": "Hi"}, [(1, -0.5)], "Hi", alternatives=1)
    reply["choices"][0]["token_ids"].append(2)
    cut = Capture()
    whole = take_apart(compact(reply), Asked("mine"))
    assert whole is not None
    cut.whole(whole)
    assert cut.untrainable({}) == "the engine returned 2 token ids and 1 log-probs"
