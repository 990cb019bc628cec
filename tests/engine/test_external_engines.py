"""Engines other than a managed vLLM: relayed, recorded, and it is said what learning lacks."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from nextstate.config import EngineConfig
from nextstate.errors import ConfigError
from nextstate.store import Store
from proxy.config import ProxyConfig
from proxy.intervals import Intervals
from tests.engine.foreign_engines import ENGINES, STRICT, Foreign, relayed, serving
from tests.proxy.running_proxy import add_version, request, running, until
from tests.scripted_engine import MODEL, ScriptedEngine, compact, plain_reply, stream_chunks


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_answers_chat_is_relayed_and_recorded(
    store: Store, tmp_path: Path, name: str, stream: bool
) -> None:
    options, lacks = ENGINES[name]
    (tmp_path / "none").mkdir()  # the adapter that warms up

    async def test() -> None:
        engine = Foreign(**options)
        async with relayed(engine, store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            status, data, headers = await p.chat(request(stream=stream))
            assert (status, headers["x-nextstate-version"]) == (200, "0")
            said = request(stream=stream)
            if name.startswith("strict") and stream:
                chunks = [b"data: " + compact(c) for c in stream_chunks(said, engine.script)]
                assert data == b"\n\n".join([*chunks, b"data: [DONE]", b""])
            elif not stream:
                assert data == compact(plain_reply(said, engine.script))
            turn = store.turns.get(headers["x-nextstate-turn"])
            assert turn is not None
            assert (turn.client_model, turn.reply["content"]) == (MODEL, "Hello")
            assert turn.trainable == name.startswith("vLLM")
            found = await (await p.http.get(f"{p.url}/healthz")).json()
            assert (found["engine"], found["learning_lacks"]) == ("up", lacks)

    asyncio.run(test())


@pytest.mark.parametrize("name", ["ollama", "strict, 400", "vLLM without LoRA"])
def test_the_base_serves_where_adapters_cannot(
    store: Store, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    add_version(store, tmp_path, 1)
    store.versions.set_serving("main", 1)

    class Hears(Foreign):
        def app(self) -> web.Application:
            app = super().app()
            app.router.add_post("/v1/audio/transcriptions", self._echo)
            return app

    async def test() -> None:
        async with relayed(Hears(**ENGINES[name][0]), store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            form = {"Content-Type": "multipart/form-data; boundary=x"}
            url = f"{p.url}/v1/audio/transcriptions"
            assert (await p.http.post(url, data=b"--x--", headers=form)).status == 200
            status, _, headers = await p.chat(request())
            turn = store.turns.get(headers["x-nextstate-turn"])
            assert turn is not None
            assert (status, turn.policy_version, headers["x-nextstate-version"]) == (200, 0, "0")
            found = await (await p.http.get(f"{p.url}/healthz")).json()
            assert found["version"] == 0

    asyncio.run(test())
    assert "the base model serves in place of the versions of main" in caplog.text
    assert store.versions.serving("main").number == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["strict, 400", "ollama", "vLLM without LoRA"])
def test_requests_that_waited_for_an_unknown_engine_go_in_the_form_that_it_accepts(
    store: Store, tmp_path: Path, name: str, stream: bool
) -> None:
    add_version(store, tmp_path, 1)
    store.versions.set_serving("main", 1)

    async def test() -> None:
        engine = Foreign(**(ENGINES[name][0] | {"health": True}))
        engine.healthy = False
        async with relayed(engine, store, tmp_path) as p:
            asked = asyncio.create_task(p.chat(request(stream=stream)))
            await until(lambda: bool(p.proxy.versions.running))
            engine.healthy = True
            status, data, _ = await asked
            assert status == 200
            assert b"Hel" in data
            [turn] = [store.turns.get(i) for i in store.turns.ids()]
            assert turn is not None
            assert turn.policy_version == 0

    asyncio.run(test())


def test_an_engine_that_gets_what_it_lacked_serves_the_version(
    store: Store, tmp_path: Path
) -> None:
    often = Intervals(look_again_s=0.0, health_poll_s=0.02)
    (tmp_path / "none").mkdir()
    add_version(store, tmp_path, 1)
    store.versions.set_serving("main", 1)

    async def test() -> None:
        engine = ScriptedEngine(refuses_adapters=True)
        async with relayed(engine, store, tmp_path, intervals=often) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            assert (await p.chat(request()))[2]["x-nextstate-version"] == "0"
            engine.refuses_adapters = False
            await until(lambda: not p.proxy.engines[0].abilities.lacks)
            assert (await p.chat(request()))[2]["x-nextstate-version"] == "1"

    asyncio.run(test())


def test_fields_that_only_chat_refuses_are_left_out_from_then_on(
    store: Store, tmp_path: Path
) -> None:
    """A server may take a warm-up and refuse what is added to the request of a client."""

    class Picky(Foreign):
        async def _chatted(self, request: web.Request) -> web.StreamResponse:
            body = await request.json()
            self.asked += 1
            if "stream_options" in body or body.get("return_token_ids"):
                return web.json_response({"detail": STRICT}, status=422)
            return await self._answered(body, request)

    async def test() -> None:
        engine = Picky(tells_ids=False)
        async with relayed(engine, store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            for times in (2, 3):
                status, _, headers = await p.chat(request(stream=True))
                assert (status, engine.asked) == (200, times)
                turn = store.turns.get(headers["x-nextstate-turn"])
                assert turn is not None
                assert "refuses" in (turn.untrainable or "")
            bad, data, _ = await p.chat(request(return_token_ids=True))
            assert (bad, orjson.loads(data)) == (422, {"detail": STRICT})  # the client's own

    asyncio.run(test())


def test_a_model_that_the_engine_does_not_know_is_reported_and_its_own_answer_passes(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> None:
        async with relayed(Foreign(names=("other", "more")), store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            status, data, _ = await p.chat(request())
            assert (status, orjson.loads(data)["error"]["message"]) == (404, "no such model")
            found = await (await p.http.get(f"{p.url}/healthz")).json()
            [lack] = found["learning_lacks"]
            assert f"the model {MODEL!r}" in lack
            assert "other" not in lack

    asyncio.run(test())


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/", "/v1/chat/completions"])
def test_the_address_may_end_where_clients_end_it(store: Store, tmp_path: Path, path: str) -> None:
    async def test() -> None:
        async with relayed(ScriptedEngine(), store, tmp_path, path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            assert (await p.chat(request()))[0] == 200
            answer = await p.http.post(f"{p.url}/v1/echo", data=b"x")
            assert (answer.status, await answer.read()) == (200, b"x")

    asyncio.run(test())


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h:8000/v1", "http://h:8000"),
        (" https://h/api/v1/ ", "https://h/api"),
        ("http://h/v1/completions", "http://h"),
        ("http://h/v2", "http://h/v2"),
        ("http://h/models", "http://h/models"),
        ("http://[::1]:8000/v1//", "http://[::1]:8000"),
        ("http://h/v1/responses", "http://h"),
        ("http://h/v1/messages/", "http://h"),
        ("http://h/v1/chat", "http://h"),
        ("http://h/v1/gateway", "http://h/v1/gateway"),
    ],
)
def test_an_address_may_have_small_mistakes(url: str, address: str) -> None:
    assert EngineConfig(url=url).url == address


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "localhost:8000/v1",
        "ws://h",
        "http://",
        "http://h:x",
        "http://h?a=1",
        "http:\\\\h",
        "http://h\\v1",
        f"http://{'a' * 64}.de",
        "http://h..de",
    ],
)
def test_an_invalid_address_says_what_to_write(url: str) -> None:
    with pytest.raises(ConfigError, match=r"\[engine\] url = .*http://HOST:PORT"):
        EngineConfig(url=url)


@pytest.mark.parametrize("key", ["", "key"])
def test_a_password_in_the_address_is_used_unless_there_is_a_key_and_is_not_logged(
    store: Store, tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked: set[str] = set()

    class Locked(ScriptedEngine):
        def app(self) -> web.Application:
            @web.middleware
            async def note(request: web.Request, handler: Any) -> web.StreamResponse:
                asked.add(request.headers["Authorization"])
                return await handler(request)

            app = super().app()
            app.middlewares.append(note)
            return app

    async def test() -> None:
        async with serving(Locked()) as url:
            url = url.replace("http://", "http://jo:pass-w\u00f6rd@")
            async with running(url, store, tmp_path, engine_key=key) as p:
                assert (await p.chat(request()))[0] == 200

    asyncio.run(test())
    assert asked == {"Bearer key" if key else "Basic am86cGFzcy13w7ZyZA=="}
    assert "the engine serves" in caplog.text
    assert "pass-w" not in caplog.text


def test_the_proxys_address_is_one_that_clients_understand() -> None:
    assert ProxyConfig(host="::1", port=80).url == "http://[::1]:80"
    assert ProxyConfig(host="localhost").url == "http://localhost:8080"
