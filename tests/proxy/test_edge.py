"""Paths, redirects and bodies at the proxy's edge: which are served, and how others are refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.engine.client import EngineClient
from nextstate.errors import EngineError
from nextstate.store import Store
from proxy.bodies import excess
from proxy.lineages import Access
from tests.proxy.running_proxy import Running, add_version, both, request, running
from tests.proxy.test_requests import ask
from tests.scripted_engine import MODEL, ScriptedEngine

BODY = orjson.dumps(request())
JSON = "Content-Type: application/json"


def post(target: str, *lines: str, host: str = "localhost", body: bytes = BODY) -> bytes:
    """A raw request, closed after its answer."""
    head = [f"POST {target} HTTP/1.1", f"Host: {host}", "Connection: close", *lines]
    return ("\r\n".join([*head, f"Content-Length: {len(body)}"]) + "\r\n\r\n").encode() + body


def get(target: str, *lines: str, host: str = "localhost", method: str = "GET") -> bytes:
    head = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", *lines]
    return ("\r\n".join(head) + "\r\n\r\n").encode()


SPELLINGS = [
    "/v1/chat/completions/",
    "/v1/chat/completions///",
    "/v1/chat%2Fcompletions",
    "/v1/chat%2fcompletions/",
    "/v1/%63hat/completions",
    "/%76%31/chat/completions?a=b",
    "/v1/chat/completions%2F",
    "/v1/completions/",
    "/v1/complet%69ons",
    "/v1/messages/",
    "/v1/mess%61ges",
    "/v1/responses/",
    "/v1%2Fresponses",
    "http://localhost/v1/chat/completions/",
]


@pytest.mark.parametrize("target", SPELLINGS)
def test_every_spelling_that_the_engine_would_take_is_recorded(
    store: Store, tmp_path: Path, target: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        body = request(prompt="a", input="a", max_tokens=9)
        found = await ask(p.url, post(target, JSON, body=orjson.dumps(body)))
        assert "location" not in found.headers
        assert "x-nextstate-turn" in found.headers, found.raw

    both(test, store, tmp_path)


LOOK_ALIKES = [
    "/v1//chat/completions",
    "//v1/chat/completions",
    "/V1/chat/completions",
    "/v1/Chat/Completions",
    "/v1/chat/completions;v=1",
    "/v1;a/chat/completions",
    "/v1/%2563hat/completions",
    "/v1/chat%252Fcompletions",
    "/v1/chat/completions%20",
    "/v1/chat/completions/;",
    "/v1/./chat/completions",
    "/v1/x/../chat/completions",
    "/v1/%2e/messages",
    "/chat/completions",
    "/invocations",
    "/inference/v1/generate",
    "/",
]


@pytest.mark.parametrize("target", LOOK_ALIKES)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_path_that_only_resembles_a_route_is_a_404_of_the_proxy(
    store: Store, tmp_path: Path, target: str, method: str
) -> None:
    async def test() -> None:
        async with any_engine() as (url, seen), running(url, store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            raw = post(target, JSON).replace(b"POST", method.encode(), 1)
            found = await ask(p.url, raw)
            assert (found.status, found.error["type"]) == (404, "NotFoundError")
            assert seen == []

    asyncio.run(test())


@asynccontextmanager
async def any_engine(
    status: int = 200, location: str | None = None
) -> AsyncGenerator[tuple[str, list[tuple[str, bytes]]]]:
    """(address, what it was asked) of an engine that answers, or redirects, every request."""
    seen: list[tuple[str, bytes]] = []
    own = ("/health", "/v1/completions", "/v1/models")

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        if request.path not in own:
            seen.append((request.path, body))
            if status != 200:
                here = f"http://{request.host}"
                headers = {} if location is None else {"Location": location.format(here)}
                return web.Response(status=status, headers=headers, text=f"see {here}/moved")
        return web.json_response({"data": [], "model": MODEL, "choices": [{"text": "x"}]})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/"), seen


@pytest.mark.parametrize(
    "location", ["{}/moved", "/moved", "http://127.0.0.1:1/elsewhere", "//127.0.0.1:1/x", "", None]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_redirect_of_the_engine_is_neither_followed_nor_passed_on(
    store: Store, tmp_path: Path, location: str | None, stream: bool
) -> None:
    async def test() -> None:
        async with any_engine(307, location) as (url, seen), running(url, store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            paths = ("/v1/chat/completions", "/v1/messages", "/v1/embeddings/", "/tokenize")
            for path in paths:
                body = orjson.dumps(request(stream=stream, max_tokens=9))
                found = await ask(p.url, post(path, JSON, body=body))
                assert found.status == 502, path
                assert "[engine] url" in found.error["message"]
                assert "location" not in found.headers
                assert url.encode() not in found.raw
            assert (await ask(p.url, get("/v1/batches"))).status == 502
            assert "/moved" not in {path for path, _ in seen}

    asyncio.run(test())


def test_the_engines_client_follows_no_redirect() -> None:
    async def test() -> None:
        async with any_engine(307, "{}/moved") as (url, seen), EngineClient(url, MODEL) as engine:
            with pytest.raises(EngineError, match="307"):
                await engine.tokenize([{"role": "user", "content": "secret"}], None, {})
            assert [path for path, _ in seen] == ["/tokenize"]

    asyncio.run(test())


def test_what_agents_probe_is_answered(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        with_key = "Authorization: Bearer secret"
        for target in ("/health", "/ping", "/health/"):
            found = await ask(p.url, get(target))
            assert (found.status, found.body) == (200, b""), target
        assert (await ask(p.url, post("/ping"))).status == 200
        messages = orjson.dumps(request())
        assert (await ask(p.url, post("/tokenize", JSON, body=messages))).status == 401
        found = await ask(p.url, post("/tokenize", JSON, with_key, body=messages))
        assert (found.status, json.loads(found.body)["count"] > 0) == (200, True)
        assert (await ask(p.url, get("/version"))).status == 401
        assert json.loads((await ask(p.url, get("/version", with_key))).body) == {"version": "0"}

        engine.healthy = False
        p.proxy.versions.replicas[0].failed()
        for target in ("/health", "/ping"):
            found = await ask(p.url, get(target))
            assert (found.status, found.headers["retry-after"]) == (503, "10")
            assert found.error["code"] == 503

    both(test, store, tmp_path, key="secret")


def test_errors_have_the_format_of_the_api_that_was_asked(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for raw, status in (
            (get("/v1/feedback"), 405),
            (post("/metrics"), 405),
            (get("/favicon.ico"), 404),
            (post("/v1/chat/completions", JSON, "Content-Encoding: gzip"), 415),
            (post("/v1/feedback", "Content-Type: text/plain", body=b"{}"), 415),
            (post("/v1/feedback", JSON, body=b"{"), 400),
            (b"NOPE / HTTP/1.1\r\n\r\n", 400),
        ):
            found = await ask(p.url, raw)
            assert (found.status, found.error["code"]) == (status, status), raw
            assert set(found.error) == {"message", "type", "param", "code"}
        for lines in (("Content-Encoding: br",), ("Content-Length: x",)):
            found = await ask(p.url, post("/v1/messages", JSON, *lines))
            said = json.loads(found.body)
            assert said["type"] == "error"
            assert set(said["error"]) == {"type", "message"}

    both(test, store, tmp_path)


def test_a_failure_of_the_proxy_has_the_apis_format_too(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        def broken(*_: object) -> None:
            raise ZeroDivisionError("secret detail")

        monkeypatch.setattr(p.proxy.dispatch, "_guard", broken)
        found = await ask(p.url, post("/v1/chat/completions", JSON))
        assert (found.status, found.error["type"]) == (500, "InternalServerError")
        assert b"secret detail" not in found.raw

    both(test, store, tmp_path)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "x-gzip", "identity, gzip"])
def test_a_compressed_body_is_refused_after_the_key_and_never_inflated(
    store: Store, tmp_path: Path, coding: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for path in ("/v1/chat/completions", "/v1/echo", "/v1/feedback", "/tokenize"):
            lines = (JSON, f"Content-Encoding: {coding}")
            # The body never comes: nobody waits for it.
            waiting = post(path, *lines, body=b"x" * 10_000)[:-9_000]
            assert (await ask(p.url, waiting)).status == 401
            keyed = waiting.replace(b"\r\n", b"\r\nx-api-key: secret\r\n", 1)
            found = await ask(p.url, keyed)
            assert found.status == 415
            assert "uncompressed" in found.error["message"]
        plain = post(
            "/v1/chat/completions", JSON, "Content-Encoding: identity", "x-api-key: secret"
        )
        assert (await ask(p.url, plain)).status == 200

    both(test, store, tmp_path, key="secret")


def test_a_length_beyond_the_limit_is_refused_before_the_body(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for path in ("/v1/chat/completions", "/v1/feedback", "/v1/messages"):
            raw = get(path, JSON, "Content-Length: 99999999999", method="POST")
            assert (await ask(p.url, raw)).status == 413

    both(test, store, tmp_path)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/score", "/v1/feedback", "/tokenize"])
@pytest.mark.parametrize(
    "data",
    [
        b"[" + b"[]," * 500_000 + b"0]",
        b'{"a":[' + b"{}," * 500_000 + b"0]}",
        b'{"a":[' + b'{"b":[0]},' * 200_000 + b"0]}",
        b"[" * 600_000,
        b'{"a":[' + b"1," * 4_500_000 + b"0]}",
        b'{"a":[' + b'"",' * 4_500_000 + b"0]}",
        b'{"\\\\":[' + b"[]," * 500_000 + b"0]}",
        b'{"a":{' + b'"":1,' * 600_000 + b'"b":0}}',
    ],
)
def test_json_with_too_many_values_is_refused_before_it_is_parsed(
    store: Store, tmp_path: Path, path: str, data: bytes
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        found = await ask(p.url, post(path, JSON, body=data))
        assert (found.status, found.error["code"]) == (400, 400)
        assert "more than" in found.error["message"]

    both(test, store, tmp_path)


def test_large_bodies_of_real_agents_pass() -> None:
    code = 'if (a[1] == {2}) { b("\\n", [c, d]) } else { e = "\\\\" }\n' * 50_000
    table = "1,2,3,[4],{5}\n" * 200_000
    for body in (
        {"messages": [{"role": "user", "content": code + table}]},
        {"messages": [{"role": "user", "content": f'"{table}"'}] * 3},
        {"messages": [{"role": "tool", "content": [{"type": "text", "text": "a"}]}] * 30_000},
        {"prompt": list(range(1_000_000))},
        {"messages": [{"role": "user", "content": "QUJD" * 4_000_000}]},
    ):
        assert excess(orjson.dumps(body)) is None


def test_models_lists_those_that_generate_here_and_shows_no_paths(
    store: Store, tmp_path: Path
) -> None:
    add_version(store, tmp_path, 1)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.adapters["somebody's"] = "/home/somebody/adapter"
        found = await p.http.get(f"{p.url}/v1/models")
        assert {m["id"]: m["root"] for m in (await found.json())["data"]} == {
            **{MODEL: MODEL, "open": MODEL}
        }
        answer = await p.http.post(
            f"{p.url}/v1/chat/completions", json={**request(), "model": "somebody's"}
        )
        assert answer.status == 400
        assert "use base, open." in (await answer.json())["error"]["message"]

    both(test, store, tmp_path, access={"open": Access("open", None)})


def test_no_answer_is_compressed_unless_the_client_asks(store: Store, tmp_path: Path) -> None:
    """Nor could the list of models be changed."""

    class Gateway(ScriptedEngine):
        @web.middleware
        async def _reset(self, request: web.Request, handler: Any) -> web.StreamResponse:
            response = await handler(request)
            if response.body and "gzip" in request.headers.get("Accept-Encoding", ""):
                response.enable_compression(web.ContentCoding.gzip)
            return response

    async def test() -> None:
        engine = Gateway()
        async with TestServer(engine.app()) as server:
            engine.server = server
            async with running(engine.url, store, tmp_path) as p:
                await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
                for raw in (get("/v1/models"), get("/version"), post("/v1/score", JSON)):
                    found = await ask(p.url, raw)
                    assert "content-encoding" not in found.headers
                    assert isinstance(json.loads(found.body), dict)
                [base] = json.loads((await ask(p.url, get("/v1/models"))).body)["data"]
                assert base["root"] == MODEL

    asyncio.run(test())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("text", ["∀", "℀", "\\u2200", "乜", "\\\\", "≢\\"])
def test_the_bounds_hold_in_every_encoding(encoding: str, text: str) -> None:
    """In UTF-16 a character may hold the byte of a quote, of a bracket or of a backslash."""
    said = json.dumps({"a": text}, ensure_ascii=False)[:-1]
    assert excess((said + ', "b": [' + "[]," * 260_000 + "1]}").encode(encoding)) is not None
    assert excess((said + ', "b": [' + "1," * 1_100_000 + "1]}").encode(encoding)) is not None
    fine = (said + ', "b": "' + "[]," * 1_100_000 + '"}').encode(encoding)
    assert json.loads(fine)["a"] == text
    assert excess(fine) is None
