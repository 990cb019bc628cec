"""A proxy on a port of its own before a scripted engine, for the tests of this folder."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from nextstate.engine.client import EngineClient, publish
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from proxy.app import Proxy
from proxy.config import ProxyConfig
from proxy.intervals import INTERVALS, Intervals
from proxy.lineages import Access, Lineages
from proxy.writer_process import WriterProcess
from tests.proxy.writer_thread import WriterThread
from tests.scripted_engine import (
    MODEL,
    ScriptedEngine,
    adapter,
    scripted_engine,
    write_weights,
)

TIMEOUT = aiohttp.ClientTimeout(total=20)
V1, V2 = (adapter("main", number, f"v{number}") for number in (1, 2))


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
    engine_url: str | Sequence[str],
    store: Store,
    tmp_path: Path,
    key: str | None = None,
    access: Mapping[str, Access] | None = None,
    worker: str | None = None,
    writer: WriterProcess | None = None,
    intervals: Intervals = INTERVALS,
    engine_key: str = "engine-key",
    record: bool = True,
    of_episodes: dict[str, Any] | None = None,
    profile: str = "generic",
    **config: Any,
) -> AsyncGenerator[Running]:
    urls = [engine_url] if isinstance(engine_url, str) else engine_url
    async with AsyncExitStack() as opened:
        clients = [EngineClient(url, MODEL, engine_key) for url in urls]
        proxy = Proxy(
            ProxyConfig(**({"port": 0, "record_timeout_s": 10.0} | config)),
            store,
            [await opened.enter_async_context(client) for client in clients],
            profile,
            writer=writer or WriterThread(),
            zero_adapter=tmp_path / "none",
            record=record,
            lineages=Lineages(MODEL, key, access or {}),
            engine_key=engine_key,
            worker=worker,
            intervals=intervals,
            of_episodes=of_episodes,
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
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
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
    store.versions.add(version, None)
    return version


async def serve(store: Store, p: Running, tmp_path: Path, number: int) -> None:
    """Publishes the version; the proxy serves it when this returns."""
    await publish(store, p.proxy.engines, add_version(store, tmp_path, number))
    await until(lambda: p.proxy.versions.serving["main"].number == number)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for another task's effect, at most ten seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
