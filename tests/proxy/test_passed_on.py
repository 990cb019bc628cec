"""Routes that are passed on: which ones, how they reach the engine, and what comes back."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDict

from nextstate.store import Store
from tests.proxy.running_proxy import V1, Running, both, request, running, serve
from tests.scripted_engine import (
    MODEL,
    Script,
    ScriptedEngine,
    compact,
    scripted_engine,
)


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
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
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
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
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
def test_other_routes_are_held_too_while_the_engine_is_down(
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


def test_other_routes_bring_a_lost_adapter_back(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await serve(store, p, tmp_path, 1)
        engine.adapters.clear()
        answer = await p.http.post(f"{p.url}/v1/score", json={"model": MODEL})
        assert (answer.status, (await answer.json())["model"]) == (200, MODEL)
        assert [sent["model"] for sent in engine.requests] == [V1] * 2

    both(test, store, tmp_path)


def test_a_renamed_answer_that_the_engine_cut_reaches_the_client_as_a_cut(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await serve(store, p, tmp_path, 1)
        engine.script = Script(cut_after=9)
        answer = await p.http.post(f"{p.url}/v1/score", json={"model": MODEL})
        assert (answer.status, answer.content_type) == (200, "application/json")
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()

    both(test, store, tmp_path)


def test_a_request_on_a_connection_that_the_engine_has_closed_is_sent_again(
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
        assert b"larger than 1 MB" in body

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
