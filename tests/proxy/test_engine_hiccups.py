"""A broken connection fails one request at most: nobody else waits while the engine is well."""

from __future__ import annotations

import asyncio
import errno
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from nextstate.engine.client import EngineClient
from nextstate.store import Store
from proxy.intervals import Intervals
from tests.proxy.running_proxy import Running, both, request, running, until
from tests.scripted_engine import MODEL, ScriptedEngine, compact

ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": request(),
    "/v1/completions": {"model": MODEL, "prompt": "hi"},
    "/v1/score": {"model": MODEL, "text": "hi"},
}
CASES = [*((path, False) for path in ASKED), ("/v1/chat/completions", True)]


async def ask(p: Running, path: str, stream: bool = False) -> tuple[int, bytes]:
    body = ASKED[path] | ({"stream": True} if stream else {})
    async with p.http.post(p.url + path, data=orjson.dumps(body)) as answer:
        return answer.status, await answer.read()


@pytest.mark.parametrize(("path", "stream"), CASES)
def test_one_reset_is_not_noticed(store: Store, tmp_path: Path, path: str, stream: bool) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        failed = count_failures(p)
        warmed = len(engine.completions)
        engine.resets = 1
        status, _ = await ask(p, path, stream)
        assert (status, engine.was_reset, failed) == (200, [path], [])
        assert len(engine.completions) - warmed == (path == "/v1/completions")

    both(test, store, tmp_path)


@pytest.mark.parametrize(("path", "stream"), CASES)
def test_a_request_that_a_healthy_engine_resets_again_fails_alone(
    store: Store, tmp_path: Path, path: str, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        failed = count_failures(p)
        engine.resets = 2
        status, data = await ask(p, path, stream)
        assert (status, orjson.loads(data)["error"]["code"]) == (503, 503)
        assert (engine.was_reset, failed) == ([path] * 2, [])
        assert (await ask(p, path, stream))[0] == 200

    both(test, store, tmp_path, hold_s=0.5)


@pytest.mark.parametrize(("path", "stream"), CASES)
def test_what_an_engine_that_is_down_resets_waits_for_it(
    store: Store, tmp_path: Path, path: str, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        failed = count_failures(p)
        engine.resets, engine.healthy = 2, False
        asked = asyncio.create_task(ask(p, path, stream))
        while not failed:
            await asyncio.sleep(0)
        assert not p.proxy.versions.up
        engine.healthy = True
        assert (await asked)[0] == 200

    both(test, store, tmp_path)


def test_requests_that_fail_together_share_one_health_check(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        asked: list[asyncio.Event] = []

        async def healthy(_: EngineClient, timeout_s: float = 0) -> bool:
            asked.append(asyncio.Event())
            await asked[-1].wait()
            return True

        monkeypatch.setattr(EngineClient, "healthy", healthy)
        versions = p.proxy.versions
        looks = [asyncio.create_task(versions.replicas[0].is_well()) for _ in range(50)]
        while not asked:
            await asyncio.sleep(0)
        before = len(asked)
        assert before <= 2  # the watch's own look may be the other
        for event in asked:
            event.set()
        assert all(await asyncio.gather(*looks))

    both(test, store, tmp_path)


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 200 OK\r\nContent-"])
@pytest.mark.parametrize("path", ASKED)
def test_a_request_is_not_sent_again_once_a_part_of_an_answer_has_come(
    store: Store, tmp_path: Path, path: str, part: bytes
) -> None:
    taken: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                sent = await reader.readexactly(int(length or 0))
                if b"hi" in sent:
                    taken.append(sent)
                    writer.write(part)
                    await writer.drain()
                    return
                body = compact({"data": [], "model": MODEL, "choices": [{"text": "x"}]})
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def test() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with running(f"http://127.0.0.1:{port}", store, tmp_path) as p:
                await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
                failed = count_failures(p)
                status, _ = await ask(p, path)
                assert (status, len(taken), failed) == (503, 1, [])

    asyncio.run(test())


def test_a_form_is_sent_again_too(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.resets = 1
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = await p.http.post(f"{p.url}/v1/echo", data=b"--x--", headers=headers)
        assert (await answer.read(), engine.was_reset) == (b"--x--", ["/v1/echo"])

    both(test, store, tmp_path)


def test_a_look_at_the_engine_without_descriptors_changes_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        tried: list[None] = []

        async def connect(*_: object, **__: object) -> None:
            tried.append(None)
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", connect)
        session = p.proxy.engines[0]._session
        assert session.connector is not None
        await session.connector.close()
        session._connector = aiohttp.TCPConnector()
        await until(lambda: len(tried) > 2)
        assert p.proxy.versions.up
        assert await p.proxy.versions.replicas[0].is_well()

    both(test, store, tmp_path, intervals=Intervals(health_poll_s=0.01))


def count_failures(p: Running) -> list[None]:
    """Grows whenever further requests are held."""
    failed: list[None] = []
    [replica] = p.proxy.versions.replicas
    known = replica.failed

    def noted() -> None:
        failed.append(None)
        known()

    replica.failed = noted
    return failed
