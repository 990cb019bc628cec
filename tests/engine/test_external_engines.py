"""Engines that are not a vLLM of ours: relayed and recorded, and told what learning lacks."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.app.doctor import checks
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.app.status import status
from nextstate.config import EngineConfig
from nextstate.engine.abilities import ADAPTERS, LOG_PROBS, TOKEN_IDS
from nextstate.engine.client import EngineClient
from nextstate.errors import ConfigError, StartError
from nextstate.store.store import Store
from proxy import versions
from proxy.config import ProxyConfig
from proxy.intervals import Intervals
from proxy.versions import Versions
from tests.proxy.test_proxy import Running, add_version, request, running, until
from tests.scripted_engine import MODEL, ScriptedEngine, compact, plain_reply, stream_chunks

STRICT = "return_token_ids: Extra inputs are not permitted"
COMPLETIONS = "/v1/completions (for the warm-up)"


@dataclass
class Foreign(ScriptedEngine):
    """A server with some of vLLM's routes and behaviour."""

    health: bool = True
    completions_route: bool = True
    lists: bool = True
    forbids: int = 0
    """The status for completions, or 0."""
    arrays: bool = True
    """Whether a prompt may be token ids."""
    tells_ids: bool = True
    tells_logprobs: bool = True
    lora_route: bool = False
    refuses: int = 0
    """The status for fields that it does not know, or 0."""
    names: tuple[str, ...] = (MODEL,)
    answers_any: bool = False
    key: str = ""
    asked: int = 0
    """Chat requests, refused ones among them."""

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._locked])
        if self.health:
            app.router.add_get("/health", self._health)
        if self.lists:
            app.router.add_get("/v1/models", self._listed)
        app.router.add_post("/v1/chat/completions", self._chatted)
        if self.completions_route:
            app.router.add_post("/v1/completions", self._completed)
        if self.lora_route:
            app.router.add_post("/v1/load_lora_adapter", self._not_enabled)
        return app

    @web.middleware
    async def _locked(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "Unauthorized"}}, status=401)
        return await handler(request)

    async def _listed(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": n} for n in self.names]})

    async def _not_enabled(self, request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "LoRA is not enabled."}}, status=500)

    async def _completed(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.forbids:
            return web.json_response({"error": {"message": "chat only"}}, status=self.forbids)
        if not self.arrays and isinstance(body["prompt"], list):
            return web.json_response({"error": {"message": "prompt: want string"}}, status=400)
        return await self._answered(body, request)  # pyright: ignore[reportReturnType]

    async def _chatted(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        return await self._answered(await request.json(), request)

    async def _answered(self, body: dict[str, Any], request: web.Request) -> web.StreamResponse:
        if body["model"] not in self.names and not self.answers_any:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if self.refuses and ("return_token_ids" in body or "logprobs" in body):
            return web.json_response({"detail": STRICT}, status=self.refuses)
        if not self.tells_ids:
            body = {name: value for name, value in body.items() if name != "return_token_ids"}
        if not self.tells_logprobs:
            body = {name: value for name, value in body.items() if name != "logprobs"}
        self.requests.append(body)
        if body.get("stream"):
            return await self._send(request, stream_chunks(body, self.script), self.script)
        return web.json_response(plain_reply(body, self.script))


QUICK = Intervals(slowest_poll_s=0.01)

ENGINES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama.cpp": (
        {"tells_ids": False, "names": ("models/q.gguf",), "answers_any": True},
        [TOKEN_IDS, ADAPTERS],
    ),
    "ollama": (
        {"health": False, "arrays": False, "tells_ids": False, "tells_logprobs": False},
        [COMPLETIONS, LOG_PROBS, TOKEN_IDS, ADAPTERS],
    ),
    "chat only": (
        {"health": False, "completions_route": False, "tells_ids": False},
        [COMPLETIONS, TOKEN_IDS, ADAPTERS],
    ),
    "strict, 400": (
        {"refuses": 400, "completions_route": False},
        [COMPLETIONS, LOG_PROBS, TOKEN_IDS, ADAPTERS],
    ),
    "strict, 422": (
        {"refuses": 422, "health": False},
        [COMPLETIONS, LOG_PROBS, TOKEN_IDS, ADAPTERS],
    ),
    "strict, 500": (
        {"refuses": 500, "completions_route": False},
        [COMPLETIONS, LOG_PROBS, TOKEN_IDS, ADAPTERS],
    ),
    "a gateway for chat": (
        {"forbids": 403, "tells_ids": False},
        [COMPLETIONS, TOKEN_IDS, ADAPTERS],
    ),
    "no list of models": (
        {"lists": False, "health": False, "completions_route": False, "tells_ids": False},
        [COMPLETIONS, TOKEN_IDS, ADAPTERS],
    ),
    "vLLM without LoRA": ({}, [ADAPTERS]),
    "vLLM with the route alone": ({"lora_route": True}, [ADAPTERS]),
}


@asynccontextmanager
async def serving(engine: ScriptedEngine) -> AsyncGenerator[str]:
    async with TestServer(engine.app()) as server:
        engine.server = server
        yield engine.url


@asynccontextmanager
async def relayed(
    engine: ScriptedEngine, store: Store, tmp_path: Path, path: str = "", **more: Any
) -> AsyncGenerator[Running]:
    async with serving(engine) as url, running(url + path, store, tmp_path, **more) as p:
        yield p


def configured(folder: Path, url: str, more: str = "", port: int = 1) -> Path:
    file = folder / "nextstate.toml"
    file.write_text(
        f'[store]\ndir = "{folder}/state"\n[engine]\nmode = "external"\nmodel = "{MODEL}"\n'
        f'url = "{url}"\n{more}\n[proxy]\nport = {port}\n'
    )
    return file


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
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
            status, data, headers = await p.chat(request(stream=stream))
            assert (status, headers["x-nextstate-version"]) == (200, "0")
            said = request(stream=stream)
            if name.startswith("strict") and stream:
                chunks = [b"data: " + compact(c) for c in stream_chunks(said, engine.script)]
                assert data == b"\n\n".join([*chunks, b"data: [DONE]", b""])
            elif not stream:
                assert data == compact(plain_reply(said, engine.script))
            turn = store.turn(headers["x-nextstate-turn"])
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
    store.set_serving("main", 1)

    class Hears(Foreign):
        def app(self) -> web.Application:
            app = super().app()
            app.router.add_post("/v1/audio/transcriptions", self._echo)
            return app

    async def test() -> None:
        async with relayed(Hears(**ENGINES[name][0]), store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
            form = {"Content-Type": "multipart/form-data; boundary=x"}
            url = f"{p.url}/v1/audio/transcriptions"
            assert (await p.http.post(url, data=b"--x--", headers=form)).status == 200
            status, _, headers = await p.chat(request())
            turn = store.turn(headers["x-nextstate-turn"])
            assert turn is not None
            assert (status, turn.policy_version, headers["x-nextstate-version"]) == (200, 0, "0")
            found = await (await p.http.get(f"{p.url}/healthz")).json()
            assert found["version"] == 0

    asyncio.run(test())
    assert "the base model serves in place of the versions of main" in caplog.text
    assert store.serving("main").number == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["strict, 400", "ollama", "vLLM without LoRA"])
def test_what_waited_for_an_unknown_engine_goes_as_that_engine_takes_it(
    store: Store, tmp_path: Path, name: str, stream: bool
) -> None:
    add_version(store, tmp_path, 1)
    store.set_serving("main", 1)

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
            [turn] = [store.turn(i) for i in store.turn_ids()]
            assert turn is not None
            assert turn.policy_version == 0

    asyncio.run(test())


def test_an_engine_that_gets_what_it_lacked_serves_the_version(
    store: Store, tmp_path: Path
) -> None:
    often = Intervals(look_again_s=0.0, health_poll_s=0.02)
    (tmp_path / "none").mkdir()
    add_version(store, tmp_path, 1)
    store.set_serving("main", 1)

    async def test() -> None:
        engine = ScriptedEngine(refuses_adapters=True)
        async with relayed(engine, store, tmp_path, intervals=often) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
            assert (await p.chat(request()))[2]["x-nextstate-version"] == "0"
            engine.refuses_adapters = False
            await until(lambda: not p.proxy.engine.abilities.lacks)
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
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
            for times in (2, 3):
                status, _, headers = await p.chat(request(stream=True))
                assert (status, engine.asked) == (200, times)
                turn = store.turn(headers["x-nextstate-turn"])
                assert turn is not None
                assert "refuses" in (turn.untrainable or "")
            bad, data, _ = await p.chat(request(return_token_ids=True))
            assert (bad, orjson.loads(data)) == (422, {"detail": STRICT})  # the client's own

    asyncio.run(test())


def html(status: int) -> ScriptedEngine:
    class Site(ScriptedEngine):
        def app(self) -> web.Application:
            async def page(_: web.Request) -> web.Response:
                return web.Response(text="<html>", content_type="text/html", status=status)

            app = web.Application()
            app.router.add_route("*", "/{path:.*}", page)
            return app

    return Site()


def moved() -> ScriptedEngine:
    class Moved(ScriptedEngine):
        def app(self) -> web.Application:
            app = web.Application()

            async def away(request: web.Request) -> web.Response:
                return web.Response(
                    status=400, text="The plain HTTP request was sent to HTTPS port"
                )

            app.router.add_route("*", "/{path:.*}", away)
            return app

    return Moved()


def shop() -> ScriptedEngine:
    class Shop(Foreign):
        async def _answered(self, body: dict[str, Any], request: web.Request) -> web.StreamResponse:
            return web.json_response({"choices": None})

    return Shop()


WRONG = {
    "a web page": (lambda: html(200), "no OpenAI server"),
    "one that answers without choices": (shop, "no OpenAI server.*without choices"),
    "another server": (lambda: html(404), "no OpenAI server"),
    "http to https": (moved, "no OpenAI server"),
    "a locked one": (lambda: Foreign(key="other"), r"refuses our key \(401\).*api_key_env"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_a_clear_503_at_once_and_one_log_line(
    store: Store,
    tmp_path: Path,
    name: str,
    stream: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, why = WRONG[name]
    seen: list[None] = []
    looked = versions.look

    async def look(*args: Any, **more: Any) -> Any:
        seen.append(None)
        return await looked(*args, **more)

    monkeypatch.setattr(versions, "look", look)

    async def test() -> None:
        async with relayed(make(), store, tmp_path, intervals=QUICK, hold_s=1e6) as p:
            for path in ("chat/completions", "score"):
                body = request(stream=stream)
                answer = await p.http.post(f"{p.url}/v1/{path}", json=body)
                told = (await answer.json())["error"]["message"]
                assert answer.status == 503
                assert re.search(why, told)
            looks = len(seen)
            await until(lambda: len(seen) > looks + 3)
            found = await (await p.http.get(f"{p.url}/healthz")).json()
            assert re.search(why, found["engine_problem"])

    asyncio.run(test())
    lines = [record for record in caplog.records if record.name == "proxy.versions"]
    assert [record.levelno for record in lines] == [logging.WARNING]


def test_an_engine_that_cannot_serve_yet_is_waited_for_with_one_log_line(
    store: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    class Loading(ScriptedEngine):
        looks = 0

        async def _models(self, request: web.Request) -> web.Response:
            self.looks += 1
            if self.looks < 6:
                return web.json_response({"error": {"message": "Loading model"}}, status=503)
            return await super()._models(request)

    async def test() -> None:
        async with relayed(Loading(), store, tmp_path, intervals=QUICK) as p:
            assert (await p.chat(request()))[0] == 200

    asyncio.run(test())
    lines = [record for record in caplog.records if record.name == "proxy.versions"]
    assert [record.levelno for record in lines] == [logging.WARNING, logging.INFO]
    assert "Loading model" in lines[0].getMessage()


def test_an_engine_that_is_not_there_is_one_log_line(
    store: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loud = Intervals(quiet_start_s=0.0, down_poll_s=0.01)
    looks: list[None] = []
    healthy = EngineClient.healthy

    async def looked(engine: EngineClient) -> bool:
        looks.append(None)
        return await healthy(engine)

    monkeypatch.setattr(EngineClient, "healthy", looked)

    async def test() -> None:
        async with running("http://127.0.0.1:1", store, tmp_path, intervals=loud):
            await until(lambda: len(looks) > 5)

    asyncio.run(test())
    [line] = [record for record in caplog.records if record.name == "proxy.versions"]
    assert "the engine is not there, requests wait" in line.getMessage()
    assert "http://127.0.0.1:1" in line.getMessage()


def test_the_pause_grows_while_an_engine_answers_and_cannot_serve(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def wait_for(waiting: Coroutine[Any, Any, bool], pause: float) -> None:
        waiting.close()
        pauses.append(pause)
        if len(pauses) == 8:
            raise asyncio.CancelledError

    async def test() -> None:
        async with serving(html(200)) as url, EngineClient(url, MODEL) as engine:
            watched = Versions(store, engine, ["main"], tmp_path / "none")
            monkeypatch.setattr(versions.asyncio, "wait_for", wait_for)
            with pytest.raises(asyncio.CancelledError):
                await watched._watch_engine()

    asyncio.run(test())
    assert pauses == [0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0]


def test_a_model_that_the_engine_does_not_know_is_told_and_its_own_answer_passes(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> None:
        async with relayed(Foreign(names=("other", "more")), store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
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
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
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
    ],
)
def test_an_address_is_read_kindly(url: str, address: str) -> None:
    assert EngineConfig(url=url).url == address


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "localhost:8000/v1", "ws://h", "http://", "http://h:x", "http://h?a=1"],
)
def test_what_is_no_address_says_what_to_write(url: str) -> None:
    with pytest.raises(ConfigError, match=r"\[engine\] url = .*http://HOST:PORT"):
        EngineConfig(url=url)


DOCTOR: dict[str, tuple[Any, list[str]]] = {
    "a vLLM": (ScriptedEngine, []),
    "ollama": (
        lambda: Foreign(**ENGINES["ollama"][0]),
        [r"learning lacks /v1/completions", "log-probs", "token ids", "runtime adapters"],
    ),
    "no model": (lambda: Foreign(names=("a", "b")), [r"lacks the model 'base'.*it serves a, b"]),
    "a web page": (lambda: html(200), ["no OpenAI server"]),
    "one without a list": (
        lambda: Foreign(lists=False, tells_ids=False),
        ["learning lacks token ids", "runtime adapters"],
    ),
    "a locked one": (lambda: Foreign(key="k"), [r"refuses our key \(401\).*api_key_env"]),
    "one that loads": (lambda: html(503), [r"does not serve: .*503"]),
}


@pytest.mark.parametrize("name", DOCTOR)
def test_the_doctor_says_of_an_external_engine_what_is_wrong_in_a_line_each(
    tmp_path: Path, name: str
) -> None:
    make, expected = DOCTOR[name]
    (tmp_path / "state").mkdir()

    async def test() -> list[str]:
        async with serving(make()) as url:
            file = configured(tmp_path, url)
            return await asyncio.to_thread(lambda: engine_problems(file))

    found = asyncio.run(test())
    assert len(found) == len(expected)
    for problem, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, problem)
        assert "\n" not in problem


def test_the_doctor_names_an_address_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    [problem] = engine_problems(configured(tmp_path, "http://127.0.0.1:1/v1"))
    assert "http://127.0.0.1:1" in problem
    [problem] = engine_problems(configured(tmp_path, "127.0.0.1:1"), "configuration")
    assert "expected http://HOST:PORT" in problem


def engine_problems(file: Path, name: str = "engine") -> list[str]:
    found = [check for check in checks(file) if check.name.startswith(name)]
    return [check.problem for check in found if check.problem is not None]


def test_https_to_a_server_without_tls_says_so(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()

    async def test() -> list[str]:
        async with serving(ScriptedEngine()) as url:
            file = configured(tmp_path, url.replace("http:", "https:"))
            return await asyncio.to_thread(lambda: engine_problems(file))

    [problem] = asyncio.run(test())
    assert "is it http://?" in problem


def test_status_says_what_learning_lacks(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine) -> str:
        async with relayed(engine, store, tmp_path) as p:
            versions_ = p.proxy.versions
            await until(lambda: versions_.up or versions_.wrong is not None)
            port = int(p.url.rpartition(":")[2])
            file = configured(tmp_path, engine.url, port=port)
            return (await status(Settings.read(file)))["engine"]

    said = asyncio.run(test(Foreign(**ENGINES["ollama"][0])))
    assert said.startswith(f"up; learning lacks {COMPLETIONS}")
    assert asyncio.run(test(ScriptedEngine())) == "up"
    assert "no OpenAI server" in asyncio.run(test(html(200)))


def test_status_of_a_proxy_with_a_key_says_as_much(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIENTS", "secret")

    async def test() -> None:
        engine = Foreign(key="engine-key", **ENGINES["ollama"][0])
        async with relayed(engine, store, tmp_path, key="secret") as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
            keyed = {"Authorization": "Bearer secret"}
            await p.http.post(f"{p.url}/v1/completions", data=b"no JSON", headers=keyed)
            port = int(p.url.rpartition(":")[2])
            file = configured(tmp_path, engine.url, 'api_key_env = "ENGINES"', port)
            file.write_text(file.read_text() + 'api_key_env = "CLIENTS"\n')
            found = await status(Settings.read(file))
            assert (found["proxy"], found["unrecorded"]) == ("up", {"body": 1})
            # The engine's key need not be known here: the proxy has asked.
            assert found["engine"].startswith(f"up; learning lacks {COMPLETIONS}")
            for other in ("wrong", ""):
                monkeypatch.setenv("CLIENTS", other)
                found = await status(Settings.read(file))
                assert found["engine"].startswith("up; learning lacks")
                assert "[proxy] api_key_env = 'CLIENTS'" in found["unrecorded"]

    asyncio.run(test())
    down = asyncio.run(status(Settings.read(configured(tmp_path, "http://h", 'api_key_env = "E"'))))
    assert (down["proxy"], down["unrecorded"]) == ("down", {})
    assert "the environment variable E is not set" in down["engine"]


def test_the_proxys_address_is_one_that_clients_understand() -> None:
    assert ProxyConfig(host="::1", port=80).url == "http://[::1]:80"
    assert ProxyConfig(host="localhost").url == "http://localhost:8080"


def test_up_ends_at_once_where_only_a_person_can_help(store: Store, tmp_path: Path) -> None:
    async def test() -> None:
        engine = Foreign(key="other")
        async with relayed(engine, store, tmp_path) as p:
            port = int(p.url.rpartition(":")[2])
            stack = Stack(Settings.read(configured(tmp_path, engine.url, port=port)))
            forever = asyncio.create_task(asyncio.Event().wait())
            with pytest.raises(StartError, match="refuses our key"):
                await asyncio.wait_for(stack.wait_ready(forever), 10)  # pyright: ignore
            forever.cancel()

    asyncio.run(test())
