"""The proxy between a scripted engine and real HTTP clients."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import openai
import orjson
import pytest

from nextstate.records import TurnKind
from nextstate.store import Store
from proxy.intervals import Intervals
from proxy.writer_process import WriterProcess
from tests.proxy.running_proxy import Running, both, request, until
from tests.scripted_engine import (
    MODEL,
    Script,
    ScriptedEngine,
    compact,
    plain_reply,
    stream_chunks,
)

ASKED = [
    {},
    {"logprobs": True},
    {"return_token_ids": True},
    {"stream_options": {"include_usage": True}},
    {"logprobs": True, "return_token_ids": True, "stream_options": {"include_usage": True}},
]


@pytest.mark.parametrize("asked", ASKED)
def test_a_stream_has_the_bytes_that_the_engine_would_have_sent(
    store: Store, tmp_path: Path, asked: dict[str, Any]
) -> None:
    script = Script(pieces=("Gr", "", "üße", "!"))
    body = request(stream=True, **asked)
    chunks = [b"data: " + compact(c) + b"\n\n" for c in stream_chunks(body, script)]
    expected = b"".join(chunks) + b"data: [DONE]\n\n"

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script = script
        status, data, headers = await p.chat(body)
        assert (status, data) == (200, expected)
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"

    both(test, store, tmp_path)


@pytest.mark.parametrize("asked", ASKED[:3])
def test_a_plain_reply_is_what_the_engine_would_have_sent(
    store: Store, tmp_path: Path, asked: dict[str, Any]
) -> None:
    body = request(**asked)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        status, data, _ = await p.chat(body)
        assert (status, json.loads(data)) == (200, plain_reply(body, engine.script))

    both(test, store, tmp_path)


@pytest.mark.parametrize("stream", [True, False])
def test_the_store_holds_the_engines_own_ids_and_log_probs(
    store: Store, tmp_path: Path, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        _, _, headers = await p.chat(request(stream=stream, tools=[{"type": "function"}]))
        turn = store.turns.get(headers["x-nextstate-turn"])
        assert turn is not None
        assert turn.prompt_ids == (1, 2, 3)
        assert turn.completion_ids == (100, 101)
        assert turn.behaviour_logprobs == (-0.25, -0.5)
        assert turn.reply == {"role": "assistant", "content": "Hello"}
        assert (turn.kind, turn.policy_version, turn.trainable) == (TurnKind.MAIN, 0, True)
        assert turn.request == request(stream=stream, tools=[{"type": "function"}])

    both(test, store, tmp_path)


def test_the_turn_is_recorded_before_the_client_sees_the_end(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        answer = await p.http.post(
            f"{p.url}/v1/chat/completions", data=orjson.dumps(request(stream=True))
        )
        async for line in answer.content:
            if b'"finish_reason":"stop"' in line:
                break
        assert store.turns.get(answer.headers["x-nextstate-turn"]) is not None
        answer.close()

    both(test, store, tmp_path, record_timeout_s=10.0)


def test_tokens_pass_as_they_arrive(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script.gate = asyncio.Event()
        answer = await p.http.post(
            f"{p.url}/v1/chat/completions", data=orjson.dumps(request(stream=True))
        )
        received = b""
        while b"Hel" not in received:
            received += await answer.content.readany()
        assert b'"content":"lo"' not in received
        engine.script.gate.set()
        assert b"[DONE]" in await answer.read()

    both(test, store, tmp_path)


TOOL = {"type": "function", "function": {"name": "ls", "parameters": {"type": "object"}}}
STRICT_TOOL = {"type": "function", "function": {"name": "ls", "parameters": {}, "strict": True}}


@pytest.mark.parametrize(
    ("script", "more", "reason"),
    [
        (Script(miscount=1), {}, "usage counts"),
        (Script(), {"min_tokens": 3}, "min_tokens = 3"),
        (Script(), {"response_format": {"type": "json_object"}}, "response_format"),
        (Script(), {"tool_choice": "required"}, "grammar"),
        (Script(), {"tools": [STRICT_TOOL]}, "strict tool"),
        (Script(), {"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
        (Script(), {"thinking_token_budget": 10}, "thinking_token_budget"),
        (Script(unknown_logprob=True), {}, "did not know the log-prob"),
    ],
)
def test_a_turn_that_must_not_train_says_why(
    store: Store, tmp_path: Path, script: Script, more: dict[str, Any], reason: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script = script
        _, _, headers = await p.chat(request(stream=True, **more))
        turn = store.turns.get(headers["x-nextstate-turn"])
        assert turn is not None
        assert reason in (turn.untrainable or "")
        assert (turn.behaviour_logprobs is None) == script.unknown_logprob

    both(test, store, tmp_path)


def test_a_conversation_links_itself_and_hands_its_next_state_to_the_judge(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        _, _, first = await p.chat(request("one", stream=True))
        body = request("one")
        body["messages"] += [
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "thanks, and two?"},
        ]
        _, _, second = await p.chat(body)
        turns = [store.turns.get(h["x-nextstate-turn"]) for h in (first, second)]
        assert turns[0] is not None
        assert turns[1] is not None
        assert turns[1].parent == turns[0].id
        assert turns[1].session == turns[0].session
        assert [t.index for t in turns if t] == [0, 1]
        assert [s.text for s in store.turns.next_states(turns[0].id)] == ["thanks, and two?"]
        assert store.judging.lease(9, 60) == [turns[0].id]

    both(test, store, tmp_path)


def test_the_official_sdk_streams_tool_calls_through(store: Store, tmp_path: Path) -> None:
    call = {"index": 0, "id": "call_1", "type": "function"}
    call["function"] = {"name": "ls", "arguments": '{"path":"."}'}

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script = Script(pieces=("",), tool_calls=[call], finish_reason="tool_calls")
        async with openai.AsyncOpenAI(base_url=f"{p.url}/v1", api_key="x") as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
            )
            calls = [c async for chunk in stream for c in chunk.choices[0].delta.tool_calls or []]
        assert calls[0].function is not None
        assert calls[0].function.arguments == '{"path":"."}'
        turn = store.turns.get(store.turns.ids()[0])
        assert turn is not None
        assert turn.reply["tool_calls"][0]["function"] == call["function"]
        assert turn.reply["tool_calls"][0]["id"] == "call_1"

    both(test, store, tmp_path)


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize("stream", [True, False])
def test_the_engines_errors_pass_unchanged(
    store: Store, tmp_path: Path, status: int, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script = Script(status=status)
        found, data, _ = await p.chat(request(stream=stream))
        assert found == status
        assert json.loads(data) == {"error": {"message": "scripted", "code": status}}
        assert store.turns.ids() == []

    both(test, store, tmp_path)


def test_unknown_models_and_broken_bodies_get_the_engines_own_answer(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        status, data, _ = await p.chat({"model": "other", "messages": []})
        assert status == 404
        assert b"does not exist" in data
        answer = await p.http.post(f"{p.url}/v1/chat/completions", data=b"{nonsense")
        assert answer.status == 400

    both(test, store, tmp_path)


def test_a_cut_stream_reaches_the_client_as_a_cut(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script = Script(pieces=("a", "b", "c"), cut_after=1)
        answer = await p.http.post(
            f"{p.url}/v1/chat/completions", data=orjson.dumps(request(stream=True))
        )
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
        turn = store.turns.get(answer.headers["x-nextstate-turn"])
        assert turn is not None
        assert turn.untrainable == "the engine cut the reply"

    both(test, store, tmp_path, record_timeout_s=10.0)


def test_a_client_that_leaves_aborts_the_upstream(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script.gate = asyncio.Event()
        answer = await p.http.post(
            f"{p.url}/v1/chat/completions", data=orjson.dumps(request(stream=True))
        )
        await answer.content.readany()
        answer.close()
        await asyncio.wait_for(engine.aborted.wait(), 60)

    both(test, store, tmp_path)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "model": "unknown"}, 400, "prompt_logprobs"),
        ({"echo": True, "logprobs": True}, 400, "echo"),
        ({"n": 1025}, 400, "n = 1025"),
        ({"n": 10**9}, 400, "at most 1024 choices"),
        ({"prompt": ["a"] * 1025}, 400, "1025 prompts"),
        ({"prompt": [[1, 2]] * 342, "n": 3}, 400, "n = 3 for 342 prompts"),
        ({"messages": [request()["messages"]] * 513, "n": "2"}, 400, "n = 2 for 513 prompts"),
        ({"model": "main-v000001"}, 404, "main-v000001"),
        ({"model": f"main-v000001-{16 * 'a'}"}, 404, "main-v000001"),
    ],
)
def test_what_could_end_the_engine_never_reaches_it(
    store: Store, tmp_path: Path, path: str, fields: dict[str, Any], status: int, named: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        seen = len(engine.requests)
        answer = await p.http.post(f"{p.url}/v1/{path}", json=request(**fields))
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (status, status)
        assert named in error["message"]
        assert len(engine.requests) == seen

    both(test, store, tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["a"] * 64, "n": 2},
        {"prompt": [1] * 5000, "n": 2},
        {"prompt": "a", "n": 128},
    ],
)
def test_as_many_choices_as_are_allowed_pass(
    store: Store, tmp_path: Path, fields: dict[str, Any]
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        answer = await p.http.post(f"{p.url}/v1/completions", json={"model": MODEL, **fields})
        assert answer.status == 200
        assert engine.completions[-1]["prompt"] == fields["prompt"]

    both(test, store, tmp_path)


def test_a_batch_of_conversations_counts_like_prompts(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for count, status in ((512, 404), (513, 400)):  # the scripted engine has no such route
            body = request(n=2) | {"messages": [request()["messages"]] * count}
            answer = await p.http.post(f"{p.url}/v1/chat/completions/batch", json=body)
            assert answer.status == status

    both(test, store, tmp_path)


def test_the_clients_key_is_checked_and_never_forwarded(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert (await p.chat(request()))[0] == 401
        assert (await p.chat(request(), {"Authorization": "Bearer wrong"}))[0] == 401
        for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert (await p.chat(request(), headers))[0] == 200
            assert engine.headers[-1]["Authorization"] == "Bearer engine-key"
            assert "secret" not in str(engine.headers[-1])

    both(test, store, tmp_path, key="secret")


def test_a_store_that_fails_or_hangs_never_fails_a_reply(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        with closing(sqlite3.connect(store.dir / "nextstate.sqlite3")) as file:
            file.execute("ALTER TABLE turns RENAME TO gone")
            assert (await p.chat(request()))[0] == 200
            await until(lambda: p.proxy.recorder.counts.lost == 1)
            file.execute("ALTER TABLE gone RENAME TO turns")
        late = p.proxy.recorder.counts.late  # what fails may take its time, too
        blocked = store.recording()
        blocked.__enter__()  # another process holds the database
        started = time.monotonic()
        assert (await p.chat(request()))[0] == 200
        assert p.proxy.recorder.counts.late == late + 1
        assert time.monotonic() - started < 5.0  # far below the database's own patience
        blocked.__exit__(None, None, None)
        await until(lambda: p.proxy.recorder.counts.recorded == 1)  # late, not lost

    both(test, store, tmp_path, record_timeout_s=0.05)


def test_a_writer_that_cannot_start_delays_the_proxy_and_does_not_stop_it(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")

    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert "no writer runs after 0.2 s" in caplog.text
        assert (await p.chat(request()))[0] == 200
        assert p.proxy.recorder.counts.late == 1

    both(
        test,
        store,
        tmp_path,
        writer=WriterProcess(),
        intervals=Intervals(writer_s=0.2),
        record_timeout_s=0.05,
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_gives_up_while_its_turn_waits_and_tries_again_makes_one_turn(
    store: Store, tmp_path: Path, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        def waiting() -> int:
            return len(p.proxy.recorder._waiting)  # pyright: ignore[reportPrivateUsage]

        opening = request("one", stream=stream)
        following = request("one", stream=stream)
        following["messages"] += [
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "and two?"},
        ]
        kept: list[str] = []
        for body in (opening, following):
            with store.recording():  # another process holds the database
                for tries in range(2):
                    given_up = asyncio.create_task(p.chat(body))
                    await until(lambda tries=tries: waiting() == 2 * tries + 1)
                    given_up.cancel()
                    await until(lambda tries=tries: waiting() == 2 * tries + 2)
                again = asyncio.create_task(p.chat(body))
                await until(lambda: len(engine.requests) % 3 == 0)
            kept.append((await again)[2]["x-nextstate-turn"])
        assert store.turns.ids() == kept
        assert p.proxy.recorder.counts.recorded == 6
        first, second = (store.turns.get(turn) for turn in kept)
        assert first is not None
        assert second is not None
        assert (second.parent, second.session) == (first.id, first.session)
        assert [state.text for state in store.turns.next_states(first.id)] == ["and two?"]
        assert store.judging.lease(9, 60) == [first.id]

    both(test, store, tmp_path)


def test_metrics_count_what_happened(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await p.chat(request())
        text = await (await p.http.get(f"{p.url}/metrics")).text()
        assert "nextstate_requests_total 1\n" in text
        assert "nextstate_turns_recorded_total 1\n" in text
        assert 'nextstate_stored{record="turns",state="main"} 1\n' in text

    both(test, store, tmp_path)


def test_a_request_that_the_engine_would_refuse_is_not_repaired(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await p.chat(request(top_logprobs=2))
        assert "logprobs" not in engine.requests[-1]
        await p.chat(request(top_logprobs=2, logprobs=True))
        assert engine.requests[-1]["logprobs"] is True

    both(test, store, tmp_path)


@pytest.mark.parametrize("model", [0, False, [], {}])
def test_a_model_that_is_not_a_text_is_not_repaired(
    store: Store, tmp_path: Path, model: object
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        sent = {**request(), "model": model}
        assert (await p.chat(sent))[0] == 400
        assert engine.requests == [sent]
        for named in ({"model": None}, {"model": ""}):
            assert (await p.chat({**request(), **named}))[0] == 200

    both(test, store, tmp_path)
