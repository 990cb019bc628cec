"""`/v1/completions` through the proxy: recorded like chat, without changing a byte."""

from __future__ import annotations

import asyncio
from itertools import product
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest

from nextstate.records import Turn
from nextstate.store import Store
from tests.proxy.running_proxy import Running, both
from tests.scripted_engine import MODEL, Script, ScriptedEngine

JSON = {"Content-Type": "application/json"}


def request(prompt: Any = "Once upon", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **more}


async def complete(p: Running, body: dict[str, Any], url: str | None = None) -> tuple[int, bytes]:
    """The status and bytes of one completion, from the proxy or from `url` itself."""
    data = orjson.dumps(body)
    answer = await p.http.post(f"{url or p.url}/v1/completions", data=data, headers=JSON)
    return answer.status, await answer.read()


def only_turn(store: Store) -> Turn:
    (turn_id,) = store.turns.ids()
    turn = store.turns.get(turn_id)
    assert turn is not None
    return turn


ASKED: list[dict[str, Any]] = [
    {},
    {"logprobs": 0},
    {"logprobs": 2},
    {"return_token_ids": True},
    {"logprobs": 1, "return_token_ids": True},
    {"echo": True},
    {"echo": True, "return_token_ids": True},
]
USAGE: list[dict[str, Any]] = [
    {},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": False}},
]
SEVERAL: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"prompt": [7, 8]},
    {"prompt": ["a", "b"]},
    {"prompt": [[7], [8, 9]], "n": 2},
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_the_client_gets_the_bytes_that_the_engine_sends_unasked(
    store: Store, tmp_path: Path, asked: dict[str, Any], stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script = Script(pieces=("Gr", "", "üße", ""), finish_reason="length")
        for several, usage in product(SEVERAL, USAGE if stream else USAGE[:1]):
            body = {**request(), **asked, **several, **usage, "stream": stream}
            expected = await complete(p, body, engine.url)
            assert expected[0] == 200
            assert await complete(p, body) == expected, body

    both(test, store, tmp_path, record_timeout_s=10.0)


@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"prompt": [1, 2, 3]}, {"prompt": ["hi"]}])
@pytest.mark.parametrize("stream", [True, False])
def test_a_completion_is_recorded_with_its_ids_and_log_probs_and_may_train(
    store: Store, tmp_path: Path, stream: bool, more: dict[str, Any]
) -> None:
    body = {**request(), "stream": stream, "max_tokens": 9, **more}

    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert (await complete(p, body))[0] == 200
        sent = engine.completions[-1]
        assert sent["return_token_ids"] is True
        assert sent["logprobs"] == more.get("logprobs", 0)
        turn = only_turn(store)
        assert turn.untrainable is None
        assert turn.prompt_ids == (1, 2, 3)
        assert turn.completion_ids == (100, 101)
        assert turn.behaviour_logprobs == (-0.25, -0.5)
        assert turn.reply == {"role": "assistant", "content": "Hello"}
        assert (turn.lineage, turn.policy_version, turn.finish_reason) == ("main", 0, "stop")
        assert turn.sampling == {"max_tokens": 9}
        said = {key: value for key, value in body.items() if key != "prompt"}
        if isinstance(body["prompt"], str):
            assert turn.request == {
                "messages": [{"role": "user", "content": body["prompt"]}],
                **said,
            }
        else:
            assert turn.request == {"messages": [], "prompt": body["prompt"], **said}

    both(test, store, tmp_path, record_timeout_s=10.0)


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_added_to_a_request_with_echo(
    store: Store, tmp_path: Path, stream: bool
) -> None:
    body = request(echo=True, **({"stream": True} if stream else {}))

    async def test(engine: ScriptedEngine, p: Running) -> None:
        status, data = await complete(p, body)
        assert engine.completions[-1] == body
        assert (status, b"Once uponHel" in data) == (200, True)
        assert only_turn(store).untrainable == "the engine returned no token ids"

    both(test, store, tmp_path, record_timeout_s=10.0)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"n": 2}, "the request asked for 2 choices"),
        ({"prompt": ["a", "b", "c"]}, "the request asked for 3 choices"),
        ({"prompt": [[7], [8, 9]], "n": 2}, "the request asked for 4 choices"),
        ({"bad_words": ["no"]}, "sampled with bad_words, which"),
        ({"guided_regex": "a+"}, "sampled with guided_regex"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_must_not_train_is_kept_with_the_reason(
    store: Store, tmp_path: Path, more: dict[str, Any], reason: str, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert (await complete(p, {**request(), "stream": stream, **more}))[0] == 200
        turn = only_turn(store)
        assert turn.untrainable is not None
        assert reason in turn.untrainable
        assert turn.reply["content"] == "Hello"  # of the first choice alone

    both(test, store, tmp_path, record_timeout_s=10.0)


@pytest.mark.parametrize("stream", [True, False])
def test_usage_that_disagrees_keeps_a_completion_from_training(
    store: Store, tmp_path: Path, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script = Script(miscount=1)
        assert (await complete(p, request(stream=stream)))[0] == 200
        assert "usage counts 3 + 3" in (only_turn(store).untrainable or "")

    both(test, store, tmp_path, record_timeout_s=10.0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_logprobs": 5, "echo": False}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"echo": True, "logprobs": 5, "max_tokens": 0}, "echo"),
        ({"echo": 1, "logprobs": 1, "stream": True}, "echo"),
    ],
)
def test_no_request_makes_the_engine_compute_the_prompts_log_probs(
    store: Store, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        seen = len(engine.completions)
        status, data = await complete(p, {**request(), **fields})
        assert (status, named in orjson.loads(data)["error"]["message"]) == (400, True)
        assert len(engine.completions) == seen
        # nor do our own additions: these alone reach it
        assert (await complete(p, request()))[0] == 200
        assert not engine.completions[-1].get("echo")
        assert engine.completions[-1].get("prompt_logprobs") is None

    both(test, store, tmp_path, record_timeout_s=10.0)


def test_every_choice_passes_as_it_ends_and_the_last_once_the_turn_is_recorded(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script = Script(pieces=("Hello",), gate=asyncio.Event())
        data = orjson.dumps(request(["a", "b", "c"], stream=True))
        answer = await p.http.post(f"{p.url}/v1/completions", data=data, headers=JSON)
        for index in (0, 1, 2):
            if index == 2:
                assert store.turns.ids() == []
                assert engine.script.gate is not None
                engine.script.gate.set()
            event = await answer.content.readuntil(b"\n\n")
            assert b'"index":%d' % index in event
            assert b'"finish_reason":"stop"' in event
        assert len(store.turns.ids()) == 1
        answer.close()

    both(test, store, tmp_path, record_timeout_s=10.0)


def test_the_official_sdk_completes_through(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        async with openai.AsyncOpenAI(base_url=f"{p.url}/v1", api_key="x") as client:
            plain = await client.completions.create(model=MODEL, prompt="hi")
            stream = await client.completions.create(model=MODEL, prompt="hi", stream=True)
            streamed = [chunk.choices[0].text async for chunk in stream]
        assert (plain.choices[0].text, "".join(streamed)) == ("Hello", "Hello")
        assert plain.choices[0].logprobs is None
        assert len(store.turns.ids()) == 2

    both(test, store, tmp_path, record_timeout_s=10.0)
