"""The proxy between a scripted engine and real HTTP clients."""

from __future__ import annotations

import asyncio
import atexit
import io
import json
import signal
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDict

from nextstate.app.engine_access import change_version
from nextstate.app.settings import Settings
from nextstate.engine.adapter_files import WEIGHTS_FILE
from nextstate.engine.client import EngineClient, publish, withdraw
from nextstate.errors import AdapterError, EngineError
from nextstate.records import PolicyVersion, TurnKind, VersionState
from nextstate.store.store import Store
from proxy import app
from proxy.app import Proxy
from proxy.config import ProxyConfig
from proxy.lineages import Access, Lineages
from proxy.versions import Versions
from proxy.writer_process import WriterProcess
from tests.scripted_engine import (
    MODEL,
    Script,
    ScriptedEngine,
    adapter,
    compact,
    plain_reply,
    scripted_engine,
    stream_chunks,
    write_weights,
)

TIMEOUT = aiohttp.ClientTimeout(total=20)
V1, V2 = (adapter("main", number, f"v{number}") for number in (1, 2))
WRITER = WriterProcess()
"""For all tests that do not end it: it takes half a second to start."""
atexit.register(WRITER.close)


class Running:
    """A proxy on a free port with a client session for it."""

    def __init__(self, proxy: Proxy, url: str, http: aiohttp.ClientSession) -> None:
        self.proxy = proxy
        self.url = url
        self.http = http

    async def chat(
        self, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        data = io.BytesIO(orjson.dumps(body))
        answer = await self.http.post(f"{self.url}/v1/chat/completions", data=data, headers=headers)
        return answer.status, await answer.read(), dict(answer.headers)


@asynccontextmanager
async def running(
    engine_url: str,
    store: Store,
    tmp_path: Path,
    key: str | None = None,
    doors: Mapping[str, Access] | None = None,
    worker: str | None = None,
    writer: WriterProcess = WRITER,
    **config: Any,
) -> AsyncGenerator[Running]:
    async with EngineClient(engine_url, MODEL, "engine-key") as engine:
        proxy = Proxy(
            ProxyConfig(**({"port": 0, "record_timeout_s": 10.0} | config)),
            store,
            engine,
            "generic",
            writer=writer,
            zero_adapter=tmp_path / "none",
            record=True,
            lineages=Lineages(MODEL, key, doors or {}),
            engine_key="engine-key",
            worker=worker,
        )
        runner = proxy.runner()
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        json_type = {"Content-Type": "application/json"}
        async with aiohttp.ClientSession(timeout=TIMEOUT, headers=json_type) as http:
            try:
                yield Running(proxy, site.name, http)
            finally:
                await runner.cleanup()


def both(
    test: Callable[[ScriptedEngine, Running], Awaitable[None]],
    store: Store,
    tmp_path: Path,
    **config: Any,
) -> None:
    """Runs a test against an engine and a proxy that is up."""

    async def run() -> None:
        async with scripted_engine() as engine, running(engine.url, store, tmp_path, **config) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
            await test(engine, p)

    asyncio.run(run())


def request(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def add_version(store: Store, tmp_path: Path, number: int) -> PolicyVersion:
    folder = tmp_path / f"v{number}"
    sha256 = write_weights(folder)
    version = PolicyVersion(
        "main", number, number - 1, str(folder), sha256, 16, VersionState.CANDIDATE
    )
    store.add_version(version, None)
    return version


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
        turn = store.turn(headers["x-nextstate-turn"])
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
        assert store.turn(answer.headers["x-nextstate-turn"]) is not None
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
        (Script(), {"temperature": 0.7}, "temperature = 0.7"),
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
        turn = store.turn(headers["x-nextstate-turn"])
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
        turns = [store.turn(h["x-nextstate-turn"]) for h in (first, second)]
        assert turns[0] is not None
        assert turns[1] is not None
        assert turns[1].parent == turns[0].id
        assert turns[1].session == turns[0].session
        assert [t.index for t in turns if t] == [0, 1]
        assert [s.text for s in store.next_states(turns[0].id)] == ["thanks, and two?"]
        assert store.lease_judgements(9, 60) == [turns[0].id]

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
        turn = store.turn(store.turn_ids()[0])
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
        assert store.turn_ids() == []

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
        turn = store.turn(answer.headers["x-nextstate-turn"])
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
        await asyncio.wait_for(engine.aborted.wait(), 5)

    both(test, store, tmp_path)


def test_new_requests_take_the_new_version_and_the_old_unloads_when_drained(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        client = p.proxy.engine
        await publish(store, client, add_version(store, tmp_path, 1))
        await until(lambda: p.proxy.versions.serving["main"].number == 1)
        engine.script.gate = asyncio.Event()
        old = asyncio.create_task(p.chat(request("old", stream=True)))
        await until(lambda: bool(engine.requests))
        await publish(store, client, add_version(store, tmp_path, 2))
        await until(lambda: p.proxy.versions.serving["main"].number == 2)
        assert set(engine.adapters) == {V1, V2}  # still one reply on it
        engine.queue = [Script()]
        _, _, new = await p.chat(request("new"))
        engine.script.gate.set()
        _, data, headers = await old
        assert b"main-v" not in data
        assert (headers["x-nextstate-version"], new["x-nextstate-version"]) == ("1", "2")
        await until(lambda: engine.unloaded == [V1])
        turns = [store.turn(i) for i in store.turn_ids()]
        assert {turn.policy_version for turn in turns if turn} == {1, 2}
        answer = await p.http.get(f"{p.url}/v1/models")
        assert [m["id"] for m in (await answer.json())["data"]] == [MODEL]

    both(test, store, tmp_path)


def test_an_adapter_that_the_engine_lost_comes_back_without_the_agent_noticing(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await publish(store, p.proxy.engine, add_version(store, tmp_path, 1))
        await until(lambda: p.proxy.versions.serving["main"].number == 1)
        engine.adapters.clear()  # as after a restart too quick for the health check
        status, _, headers = await p.chat(request())
        assert (status, headers["x-nextstate-version"]) == (200, "1")

    both(test, store, tmp_path)


def test_an_unload_that_failed_is_tried_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.versions.UNLOAD_AGAIN_S", 0.1)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.unloads_to_fail = 2
        for number in (1, 2):
            await publish(store, p.proxy.engine, add_version(store, tmp_path, number))
            await until(lambda number=number: p.proxy.versions.serving["main"].number == number)
        await until(lambda: engine.unloaded == [V1])
        assert (engine.unloads_to_fail, list(engine.adapters)) == (0, [V2])
        await until(lambda: V1 not in p.proxy.versions.running)

    both(test, store, tmp_path)


def test_an_adapter_that_is_unloaded_already_is_left_in_peace(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await publish(store, p.proxy.engine, add_version(store, tmp_path, 1))
        await until(lambda: p.proxy.versions.serving["main"].number == 1)
        engine.adapters.clear()
        await publish(store, p.proxy.engine, add_version(store, tmp_path, 2))
        await until(lambda: p.proxy.versions.serving["main"].number == 2)
        await until(lambda: V1 not in p.proxy.versions.running)

    both(test, store, tmp_path)


def test_a_version_that_is_unloaded_while_it_comes_back_is_loaded_again(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.undone = 2
        await publish(store, p.proxy.engine, add_version(store, tmp_path, 1))
        assert (engine.loads, store.serving("main").number) == (3, 1)
        engine.undone = 3
        with pytest.raises(EngineError, match="does not exist"):
            await publish(store, p.proxy.engine, add_version(store, tmp_path, 2))
        assert (engine.loads, store.serving("main").number) == (6, 1)

    both(test, store, tmp_path)


def test_requests_that_bring_a_lost_adapter_back_at_the_same_time_all_succeed(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await publish(store, p.proxy.engine, add_version(store, tmp_path, 1))
        await until(lambda: p.proxy.versions.serving["main"].number == 1)
        engine.adapters.clear()
        engine.loading = asyncio.Event()
        asked = [asyncio.create_task(p.chat(request(str(n)))) for n in range(4)]
        await until(lambda: engine.loads == 1 + len(asked))
        engine.loading.set()
        assert [(await one)[0] for one in asked] == [200] * len(asked)

    both(test, store, tmp_path)


@pytest.mark.parametrize("noticed", ["at a restart", "by a request"])
def test_a_changed_adapter_is_not_loaded_and_its_parent_serves_with_the_reason(
    store: Store, tmp_path: Path, noticed: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for number in (1, 2):
            await publish(store, p.proxy.engine, add_version(store, tmp_path, number))
            await until(lambda number=number: p.proxy.versions.serving["main"].number == number)
        (tmp_path / "v2" / WEIGHTS_FILE).write_bytes(b"something else")
        engine.adapters.clear()
        if noticed == "at a restart":
            p.proxy.versions.engine_failed()
        else:
            await p.chat(request())
        await until(lambda: p.proxy.versions.serving["main"].number == 1)
        status, _, headers = await p.chat(request())
        assert (status, headers["x-nextstate-version"]) == (200, "1")
        first, second = store.versions("main")
        assert (first.state, second.state) == (VersionState.SERVING, VersionState.REJECTED)
        assert "changed on disk" in (second.reason or "")
        assert V2 not in engine.adapters

    both(test, store, tmp_path)


@pytest.mark.parametrize("adapter", ["whole", "changed"])
def test_a_store_that_fails_while_the_engine_comes_back_ends_no_watching(
    store: Store, tmp_path: Path, adapter: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await publish(store, p.proxy.engine, add_version(store, tmp_path, 1))
        await until(lambda: p.proxy.versions.serving["main"].number == 1)
        with closing(sqlite3.connect(store.dir / "nextstate.sqlite3")) as file:
            file.execute("ALTER TABLE versions RENAME TO gone")
            engine.adapters.clear()
            if adapter == "changed":
                (tmp_path / "v1" / WEIGHTS_FILE).write_bytes(b"something else")
            p.proxy.versions.engine_failed()
            if adapter == "changed":
                await until(lambda: "getting the engine ready failed" in caplog.text)
            else:  # the store is not needed to serve
                await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
            file.execute("ALTER TABLE gone RENAME TO versions")
        await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
        status, _, headers = await p.chat(request())
        assert (status, headers["x-nextstate-version"]) == (200, "01"[adapter == "whole"])

    both(test, store, tmp_path)


def test_a_proxy_whose_watching_has_failed_ends(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: Versions) -> None:
        raise ValueError("a defect")

    async def test() -> None:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        async with running("http://127.0.0.1:1", store, tmp_path):
            await asyncio.wait_for(ended.wait(), 5)
        assert "a defect" in caplog.text

    monkeypatch.setattr(Versions, "run", broken)
    asyncio.run(test())


def test_a_withdrawn_version_gives_way_to_its_nearest_whole_ancestor(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> None:
        async with scripted_engine() as engine:
            file = tmp_path / "nextstate.toml"
            address = f'mode = "external"\nurl = "{engine.url}"\nmodel = "{MODEL}"'
            file.write_text(f"[engine]\n{address}\n")
            settings = Settings.read(file)
            for number in (1, 2, 3):
                await change_version(settings, publish, store, add_version(store, tmp_path, number))
            (tmp_path / "v2" / WEIGHTS_FILE).write_bytes(b"something else")
            engine.adapters.clear()
            rejected = replace(store.serving("main"), reason="worse")
            await change_version(settings, withdraw, store, rejected)
            assert list(engine.adapters) == [V1]
            assert store.serving("main").number == 1
            assert store.versions("main")[2].reason == "worse"
            await change_version(settings, withdraw, store, rejected)  # another serves by now
            assert store.serving("main").number == 1

    asyncio.run(test())


def test_a_changed_adapter_is_refused_before_the_engine_sees_it(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        version = add_version(store, tmp_path, 1)
        (tmp_path / "v1" / WEIGHTS_FILE).unlink()
        with pytest.raises(AdapterError, match=r"v1 cannot be read: .*No such file"):
            await publish(store, p.proxy.engine, version)
        assert engine.adapters == {}
        assert store.serving("main").number == 0

    both(test, store, tmp_path)


def test_while_the_engine_is_down_streams_are_held_with_comments(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> None:
        async with scripted_engine() as engine:
            engine.healthy = False
            async with running(engine.url, store, tmp_path, keep_alive_s=0.05) as p:
                answer = await p.http.post(
                    f"{p.url}/v1/chat/completions", data=orjson.dumps(request(stream=True))
                )
                assert answer.status == 200
                assert await answer.content.readline() == b": waiting for the engine\n"
                engine.healthy = True
                data = await answer.read()
                assert data.endswith(b"data: [DONE]\n\n")
                assert b"Hel" in data

    asyncio.run(test())


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_stays_down_is_a_clear_503(
    store: Store, tmp_path: Path, stream: bool
) -> None:
    async def test() -> None:
        async with running("http://127.0.0.1:1", store, tmp_path, hold_s=0.1) as p:
            answer = await p.http.post(
                f"{p.url}/v1/chat/completions", data=orjson.dumps(request(stream=stream))
            )
            assert (answer.status, answer.headers["Retry-After"]) == (503, "10")
            assert (await answer.json())["error"]["code"] == 503

    asyncio.run(test())


def test_other_paths_pass_and_admin_routes_do_not(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        answer = await p.http.post(f"{p.url}/v1/echo", data=b"\x00bytes")
        assert await answer.read() == b"\x00bytes"
        assert answer.headers["x-engine"] == "yes"
        for name in ("load_lora_adapter", "unload_lora_adapter"):
            answer = await p.http.post(f"{p.url}/v1/{name}", json={})
            assert answer.status == 403

    both(test, store, tmp_path)


async def ask_raw(p: Running, target: str, method: str = "POST") -> tuple[int, bytes]:
    """Asks for a path as it is written here; a client's own library would resolve it."""
    host, port = p.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n{{}}".encode("latin-1"))
    status = int((await reader.readline()).split(b" ")[1])
    body = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    return status, body


@pytest.mark.parametrize(
    "target",
    [
        "/v1/../collective_rpc",
        "/v1/%2e%2e/collective_rpc",
        "/v1/.%2E/collective_rpc",
        "/v1/x/../../inference/v1/generate",
        "/v1/%2E%2e%2fcollective_rpc",
        "/v1/x%2F..%2F..%2Fcollective_rpc?a=1",
        "/v1/../metrics",
        "/v1/..",
        "/v1//../..//collective_rpc",
        "/v1/./echo",
        "http://x/v1/../collective_rpc",
    ],
)
@pytest.mark.parametrize("base_path", ["", "/engine"])
def test_no_path_leads_out_of_v1(store: Store, tmp_path: Path, target: str, base_path: str) -> None:
    async def test() -> None:
        async with any_path() as (url, seen), running(url + base_path, store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
            for method in ("POST", "GET"):
                status, body = await ask_raw(p, target, method)
                assert (status, json.loads(body)["error"]["code"]) == (404, 404)
            assert seen == []

    asyncio.run(test())


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models/Qwen%2FQwen3",
        "/v1/models/Qwen%2fQwen3?x=%2e%2e/..&y=a%20b+c",
        "/v1/caf%C3%A9/%7Euser/a%2Eb/.hidden/...",
        "/v1/%252e%252e/x",
        "/v1/a;b=(c)@d:e!$&'*,|^{}",
        "/v1//x//",
        "/v1/%00%ff%zz",
    ],
)
def test_other_paths_reach_the_engine_as_they_were_written(
    store: Store, tmp_path: Path, target: str
) -> None:
    async def test() -> None:
        async with any_path() as (url, seen), running(f"{url}/engine", store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
            assert (await ask_raw(p, target))[0] == 200
            assert seen == [f"/engine{target}"]

    asyncio.run(test())


@asynccontextmanager
async def any_path() -> AsyncGenerator[tuple[str, list[str]]]:
    """(address, targets) of an engine that answers whatever path it is asked for."""
    seen: list[str] = []
    own = ("/health", "/v1/completions", "/v1/models", "/v1/messages/count_tokens", "/tokenize")

    async def answer(request: web.Request) -> web.Response:
        if not request.raw_path.endswith(own):
            seen.append(request.raw_path)
        return web.json_response({"data": [], "model": MODEL, "choices": [{"text": "x"}]})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/"), seen


PASSED_ON = [("GET", "models"), ("POST", "score"), ("POST", "echo")]


@pytest.mark.parametrize(("method", "path"), PASSED_ON)
def test_while_the_engine_is_down_what_is_passed_on_is_held_too(
    store: Store, tmp_path: Path, method: str, path: str
) -> None:
    async def test() -> None:
        async with scripted_engine() as engine:
            engine.healthy = False
            async with running(engine.url, store, tmp_path) as p:
                asked = asyncio.create_task(
                    p.http.request(method, f"{p.url}/v1/{path}", json={"model": MODEL})
                )
                done, _ = await asyncio.wait({asked}, timeout=0.2)
                assert not done
                engine.healthy = True
                assert (await asked).status == 200

    asyncio.run(test())


@pytest.mark.parametrize(("method", "path"), PASSED_ON)
def test_what_is_passed_on_to_an_engine_that_stays_down_is_a_clear_503(
    store: Store, tmp_path: Path, method: str, path: str
) -> None:
    async def test() -> None:
        async with running("http://127.0.0.1:1", store, tmp_path, hold_s=0.1) as p:
            answer = await p.http.request(method, f"{p.url}/v1/{path}", json={"model": MODEL})
            assert (answer.status, answer.headers["Retry-After"]) == (503, "10")
            assert (await answer.json())["error"]["code"] == 503

    asyncio.run(test())


def test_what_is_passed_on_brings_a_lost_adapter_back(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await publish(store, p.proxy.engine, add_version(store, tmp_path, 1))
        await until(lambda: p.proxy.versions.serving["main"].number == 1)
        engine.adapters.clear()
        answer = await p.http.post(f"{p.url}/v1/score", json={"model": MODEL})
        assert (answer.status, (await answer.json())["model"]) == (200, MODEL)
        assert [sent["model"] for sent in engine.requests] == [V1] * 2

    both(test, store, tmp_path)


def test_a_renamed_answer_that_the_engine_cut_reaches_the_client_as_a_cut(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await publish(store, p.proxy.engine, add_version(store, tmp_path, 1))
        await until(lambda: p.proxy.versions.serving["main"].number == 1)
        engine.script = Script(cut_after=9)
        answer = await p.http.post(f"{p.url}/v1/score", json={"model": MODEL})
        assert (answer.status, answer.content_type) == (200, "application/json")
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()

    both(test, store, tmp_path)


def test_what_is_passed_on_over_a_connection_that_the_engine_has_closed_is_sent_again(
    store: Store, tmp_path: Path
) -> None:
    taken: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"POST /v1/score"):
                    taken.append(head)
                    if len(taken) == 2:
                        return  # as if it had been idle for too long at this moment
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                await reader.readexactly(int(length or 0))
                body = compact({"data": [], "model": MODEL, "choices": [{"text": "x"}]})
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def test() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with running(f"http://127.0.0.1:{port}", store, tmp_path) as p:
                for asked in (1, 3):
                    answer = await p.http.post(f"{p.url}/v1/score", json={"model": MODEL})
                    assert (answer.status, len(taken)) == (200, asked)

    asyncio.run(test())


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "model": "unknown"}, 400, "prompt_logprobs"),
        ({"echo": True, "logprobs": True}, 400, "echo"),
        ({"n": 1025}, 400, "n = 1025"),
        ({"n": 10**9}, 400, "max_choices"),
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
    monkeypatch.setattr(app, "_WRITER_S", 0.2)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert "no writer has opened in 0.2 s" in caplog.text
        assert (await p.chat(request()))[0] == 200
        assert p.proxy.recorder.counts.late == 1

    both(test, store, tmp_path, writer=WriterProcess(), record_timeout_s=0.05)


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
        assert store.turn_ids() == kept
        assert p.proxy.recorder.counts.recorded == 6
        first, second = (store.turn(turn) for turn in kept)
        assert first is not None
        assert second is not None
        assert (second.parent, second.session) == (first.id, first.session)
        assert [state.text for state in store.next_states(first.id)] == ["and two?"]
        assert store.lease_judgements(9, 60) == [first.id]

    both(test, store, tmp_path)


def test_metrics_count_what_happened(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await p.chat(request())
        text = await (await p.http.get(f"{p.url}/metrics")).text()
        assert "nextstate_requests_total 1\n" in text
        assert "nextstate_turns_recorded_total 1\n" in text
        assert 'nextstate_stored{record="turns",state="main"} 1\n' in text

    both(test, store, tmp_path)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for another task's effect, at most ten seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_requests_larger_than_the_limit_are_refused(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        answer = await p.chat(request("x" * (1 << 20)))
        assert answer[0] == 413
        assert b"max_body_mb" in answer[1]

    both(test, store, tmp_path, max_body_mb=1)


def test_a_request_that_the_engine_would_refuse_is_not_mended(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await p.chat(request(top_logprobs=2))
        assert "logprobs" not in engine.requests[-1]
        await p.chat(request(top_logprobs=2, logprobs=True))
        assert engine.requests[-1]["logprobs"] is True

    both(test, store, tmp_path)


@pytest.mark.parametrize("told", ["length", "chunks"])
def test_streamed_bodies_larger_than_the_limit_are_refused_too(
    store: Store, tmp_path: Path, told: str
) -> None:
    async def chunks(size: int) -> AsyncGenerator[bytes]:
        for _ in range(size >> 16):
            yield bytes(1 << 16)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        for size, status in ((1 << 20, 200), ((1 << 20) + (1 << 16), 413)):
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            data = io.BytesIO(bytes(size)) if told == "length" else chunks(size)
            answer = await p.http.post(f"{p.url}/v1/echo", data=data, headers=headers)
            body = await answer.read()
            assert (answer.status, len(body) == size) == (status, status == 200)
        assert b"max_body_mb" in body

    both(test, store, tmp_path, max_body_mb=1)


@pytest.mark.parametrize("path", ["chat/completions", "echo"])
def test_a_header_that_comes_twice_reaches_the_engine_twice(
    store: Store, tmp_path: Path, path: str
) -> None:
    seen: list[list[str]] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.getall("tracestate", []))
        return web.json_response({"data": [], "model": MODEL, "choices": [{"text": "x"}]})

    async def test() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        async with (
            TestServer(app) as server,
            running(str(server.make_url("")), store, tmp_path) as p,
        ):
            headers = CIMultiDict([("tracestate", "a"), ("tracestate", "b")])
            data = orjson.dumps(request())
            asked = await p.http.post(f"{p.url}/v1/{path}", data=data, headers=headers)
            assert asked.status == 200
        assert ["a", "b"] in seen

    asyncio.run(test())


@pytest.mark.parametrize("model", [0, False, [], {}])
def test_a_model_that_is_no_text_is_not_mended(store: Store, tmp_path: Path, model: object) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        sent = {**request(), "model": model}
        assert (await p.chat(sent))[0] == 400
        assert engine.requests == [sent]
        for named in ({"model": None}, {"model": ""}):
            assert (await p.chat({**request(), **named}))[0] == 200

    both(test, store, tmp_path)
