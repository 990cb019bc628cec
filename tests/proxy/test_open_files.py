"""A proxy with few free files closes idle connections, refuses in the API's format, and logs it."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from nextstate import file_descriptors
from nextstate.engine.process import free_port
from nextstate.file_descriptors import out_of_descriptors
from nextstate.store import Store
from proxy.intervals import Intervals
from proxy.server import Connections
from tests.proxy.running_proxy import Running, both, request
from tests.proxy.test_edge import JSON, get, post
from tests.proxy.test_engine_hiccups import count_failures
from tests.proxy.test_requests import Answer, answer, ask
from tests.proxy.test_workers import write_config
from tests.scripted_engine import ScriptedEngine, scripted_engine

BODY = orjson.dumps(request())


class Client:
    """A connection that stays open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, path: str = "/v1/chat/completions", body: bytes = BODY) -> Answer:
        raw = post(path, JSON, body=body).replace(b"Connection: close\r\n", b"")
        self.writer.write(raw)
        return await answer(self.reader)


async def connected(stack: AsyncExitStack, p: Running) -> Client:
    host, port = p.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    stack.callback(writer.close)
    return Client(reader, writer)


def name_of(url: str) -> bytes:
    return url.removeprefix("http://").encode()


def test_the_bound_leaves_each_connection_one_more_to_the_engine() -> None:
    for files in (64, 256, 1024, 4096, 1 << 20):
        gate = Connections(files=files)
        assert 1 <= 2 * gate.limit <= files - min(files // 2, 128)


def test_an_idle_connection_makes_room(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        p.proxy.connections.files = 12  # room for three
        assert p.proxy.connections.limit == 3
        async with AsyncExitStack() as stack:
            clients = [await connected(stack, p) for _ in range(3)]
            for client in clients:
                assert (await client.ask()).status == 200
            assert (await clients[0].ask()).status == 200  # no longer idle for longest
            newest = await connected(stack, p)
            assert (await newest.ask()).status == 200
            assert await clients[1].reader.read() == b""
            for client in (clients[0], clients[2], newest):
                assert (await client.ask()).status == 200
        assert p.proxy.connections.refused == 0

    both(test, store, tmp_path)


def test_a_new_connection_does_not_make_room_before_its_first_request(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        p.proxy.connections.files = 12
        async with AsyncExitStack() as stack:
            clients = [await connected(stack, p) for _ in range(3)]
            assert (await (await connected(stack, p)).ask()).status == 503
            assert [(await client.ask()).status for client in clients] == [200] * 3

    both(test, store, tmp_path)


def test_a_connection_that_never_asks_makes_room_after_a_while(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        p.proxy.connections.files = 12
        async with AsyncExitStack() as stack:
            clients = [await connected(stack, p) for _ in range(3)]
            assert (await (await connected(stack, p)).ask()).status == 200
            assert await clients[0].reader.read() == b""

    both(test, store, tmp_path, intervals=Intervals(first_request_s=0.0))


def test_without_room_a_request_gets_a_503_and_the_log_one_line(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        p.proxy.connections.files = 12
        engine.script.gate = gate = asyncio.Event()
        async with AsyncExitStack() as stack:
            clients = [await connected(stack, p) for _ in range(3)]
            stream = orjson.dumps(request(stream=True))
            busy = [asyncio.create_task(c.ask(body=stream)) for c in clients]
            while p.proxy.relay.counts.requests < 3:
                await asyncio.sleep(0)
            for path in ("/v1/chat/completions", "/v1/models", "/healthz"):
                found = await (await connected(stack, p)).ask(path)
                assert (found.status, found.headers["retry-after"]) == (503, "10")
                assert found.headers["connection"] == "close"
                assert found.error["type"] == "ServiceUnavailableError"
            said = await (await connected(stack, p)).ask("/v1/messages")
            assert b'"type": "error"' in said.body
            held = [await connected(stack, p) for _ in range(100)]  # more than may wait
            for client in held[40:]:
                head, _, body = (await client.reader.read()).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503 ")
                assert b"Retry-After: 10" in head
                assert orjson.loads(body)["error"]["type"] == "ServiceUnavailableError"
            for client in held:
                client.writer.close()
            gate.set()
            assert {found.status for found in await asyncio.gather(*busy)} == {200}
        assert p.proxy.versions.up
        while len(p.proxy.connections.opened):
            await asyncio.sleep(0)
        found = await ask(p.url, get("/metrics"))
        assert b"nextstate_connections_limit 3\n" in found.body
        refused = p.proxy.connections.refused
        assert refused >= 104
        assert f"nextstate_connections_refused_total {refused}\n".encode() in found.body
        health = await ask(p.url, get("/healthz"))
        assert orjson.loads(health.body)["connections"] == {"open": 1, "limit": 3}

    with caplog.at_level(logging.ERROR):
        both(test, store, tmp_path)
    told = [r.message for r in caplog.records if "ulimit -n" in r.message]
    assert len(told) == 1
    assert "all 3 connections are busy" in told[0]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS])
def test_which_errors_mean_that_no_file_is_left(number: int) -> None:
    assert out_of_descriptors(OSError(number, "none left"))
    assert not out_of_descriptors(ConnectionResetError(errno.ECONNRESET, "reset"))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/score", "/v1/models", "/v1/echo"])
def test_no_file_for_the_engine_is_a_503_and_no_dead_engine(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        failed = count_failures(p)
        made = socket.socket

        def none_left(*given: Any, **more: Any) -> socket.socket:
            raise OSError(errno.EMFILE, "Too many open files")

        host, port = p.url.removeprefix("http://").split(":")
        for stream in (False, True):
            reader, writer = await asyncio.open_connection(host, int(port))
            await p.proxy.versions.replicas[0].upstream.__aexit__()
            monkeypatch.setattr(socket, "socket", none_left)
            raw = post(path, JSON, body=orjson.dumps(request(stream=stream)))
            writer.write(raw if path != "/v1/models" else get(path))
            found = await answer(reader)
            monkeypatch.setattr(socket, "socket", made)
            writer.close()
            assert (found.status, found.headers["retry-after"]) == (503, "10")
            assert "no files left" in found.error["message"]
        assert (failed, p.proxy.versions.up) == ([], True)
        metrics = await ask(p.url, get("/metrics"))
        assert b"nextstate_out_of_files_total 2\n" in metrics.body
        assert b'nextstate_engine_up{engine="%s"} 1\n' % name_of(engine.url) in metrics.body
        assert (await p.chat(request()))[0] == 200

    both(test, store, tmp_path)


def test_every_command_raises_the_soft_limit() -> None:
    code = (
        "import resource, nextstate.app.cli as cli\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))\n"
        "cli.command_parser = lambda: type('P', (), {'parse_args': lambda self, a: "
        "type('O', (), {'run': lambda self, o: print(resource.getrlimit(7)) or 0})()})()\n"
        "cli.main([])\n"
    )
    if resource.RLIMIT_NOFILE != 7:
        pytest.skip("another system's number")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "(512, 512)\n"


def test_an_unlimited_limit_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert file_descriptors.limit() > 100_000


def test_a_running_proxy_with_few_files_answers_all_and_goes_on(tmp_path: Path) -> None:
    """The real process, whose hard limit is 256, with more clients than it can have."""

    async def test() -> None:
        async with scripted_engine() as engine:
            engine.script.gate = gate = asyncio.Event()
            port = free_port()
            config = write_config(tmp_path, engine.url, port, 1)
            process = start_with_few_files(config, tmp_path / "log")
            url = f"http://127.0.0.1:{port}"
            try:
                await until_up(url, lambda: process.poll() is None)
                async with AsyncExitStack() as stack:
                    stream = orjson.dumps(request(stream=True))
                    asked: list[asyncio.Task[Answer]] = []
                    for _ in range(90):
                        reader, writer = await asyncio.open_connection("127.0.0.1", port)
                        stack.callback(writer.close)
                        asked.append(asyncio.create_task(Client(reader, writer).ask(body=stream)))
                    while len(engine.requests) + sum(task.done() for task in asked) < 90:
                        await asyncio.sleep(0.01)
                    gate.set()
                    statuses = [(await task).status for task in asked]
                assert statuses.count(200) == 64
                assert statuses.count(503) == 26
                text = (await ask(url, get("/metrics"))).body
                assert b"nextstate_connections_refused_total 26\n" in text
                assert b'nextstate_engine_up{engine="%s"} 1\n' % name_of(engine.url) in text
                assert (tmp_path / "log").read_text().count("ulimit -n") == 1
            finally:
                process.terminate()
                await asyncio.to_thread(process.wait, 60)

    asyncio.run(test())


def start_with_few_files(config: Path, log: Path) -> subprocess.Popen[bytes]:
    command = f"ulimit -n 256; exec {sys.executable} -P -m nextstate proxy --config {config}"
    with log.open("wb") as output:
        return subprocess.Popen(["bash", "-c", command], stdout=output, stderr=output)


async def until_up(url: str, lives: Callable[[], bool]) -> None:
    """Waits until the proxy serves."""
    async with aiohttp.ClientSession() as http, asyncio.timeout(60):
        while lives():
            try:
                async with http.get(f"{url}/health") as found:
                    if found.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)
    raise AssertionError("the proxy has ended")
