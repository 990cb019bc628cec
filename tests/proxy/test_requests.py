"""Raw requests to the proxy's server and to uvicorn, vLLM's server: both agree on HTTP."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import httptools
import openai
import orjson
import pytest
import uvicorn
from aiohttp import StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError

from nextstate.store import Store
from proxy.intervals import Intervals
from proxy.requests import RequestParser
from tests.proxy.running_proxy import Running, both, request, running
from tests.scripted_engine import MODEL, ScriptedEngine, scripted_engine

CHAT = "/v1/chat/completions"
BODY = orjson.dumps(request())
TYPE = b"Content-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
CHUNKED = b"%x;name=value\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (len(BODY), BODY)


def whole(*lines: bytes, head: bytes = HEAD) -> bytes:
    """A request that is right but for what `lines` add to its head."""
    return head + b"".join(line + b"\r\n" for line in lines) + TYPE + LENGTH + b"\r\n" + BODY


TAKEN = {
    "user-agent twice": whole(b"User-Agent: one/1", b"User-Agent: two/2"),
    "user-agent thrice": whole(*[b"user-agent: a"] * 3),
    "content-type twice": whole(b"Content-Type: application/json"),
    "etag twice": whole(b"ETag: a", b"ETag: b"),
    "server twice": whole(b"Server: a", b"Server: b"),
    "max-forwards twice": whole(b"Max-Forwards: 1", b"Max-Forwards: 2"),
    "content-location twice": whole(b"Content-Location: /a", b"Content-Location: /b"),
    "content-range twice": whole(b"Content-Range: bytes 0-1/2", b"Content-Range: bytes 0-1/2"),
    "host twice": whole(b"Host: 127.0.0.1"),
    "no host": whole(head=f"POST {CHAT} HTTP/1.1\r\n".encode()),
    "no host, 1.0": whole(head=f"POST {CHAT} HTTP/1.0\r\n".encode()),
    "empty host": whole(head=f"POST {CHAT} HTTP/1.1\r\nHost:\r\n".encode()),
    "latin-1": whole(b"X-Title: caf\xe9 \xff"),
    "utf-8": whole("X-Title: ✓".encode()),
    "tab": whole(b"X-Title:\ta\tb\t"),
    "empty value": whole(b"X-Empty:", b"X-Blank:   "),
    "underscore": whole(b"x_session_id: a"),
    "odd names": whole(b"!#$%&'*+-.^`|~9: a"),
    "long value": whole(b"X-Long: " + b"a" * 100_000),
    "many headers": whole(*(b"X-%d: a" % n for n in range(500))),
    "other expectation": whole(b"Expect: something"),
    "absolute": whole(head=f"POST http://localhost:80{CHAT} HTTP/1.1\r\nHost: a\r\n".encode()),
    "fragment": whole(head=f"POST {CHAT}#top HTTP/1.1\r\nHost: localhost\r\n".encode()),
    "blank lines before": b"\r\n\r\n" + whole(),
    "chunk extension": HEAD + TYPE + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "chunked, spelt otherwise": HEAD + TYPE + b"transfer-encoding: CHUNKED\r\n\r\n" + CHUNKED,
    "trailers announced": HEAD
    + TYPE
    + b"TE: trailers\r\nTrailer: Trailer\r\nTransfer-Encoding: chunked\r\n\r\n"
    + CHUNKED,
    "data after close": whole(b"Connection: close") + b"\r\n",
    "sec-fetch": whole(b"Sec-Fetch-Mode: cors", b"Accept-Language: *"),
}
REFUSED = {
    "length and chunked": HEAD + TYPE + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "chunked and length": HEAD + TYPE + b"Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY,
    "two lengths": whole(b"Content-Length: 3"),
    "two codings": HEAD
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "unknown coding": HEAD + b"Transfer-Encoding: identity\r\n\r\n" + BODY,
    "chunked before another": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "space before colon": whole(b"Transfer-Encoding : chunked"),
    "signed length": HEAD + TYPE + b"Content-Length: +5\r\n\r\n" + BODY,
    "hex length": HEAD + TYPE + b"Content-Length: 0x5\r\n\r\n" + BODY,
    "bare CR in a value": whole(b"X: a\rTransfer-Encoding: chunked"),
    "bare LF ends": HEAD.replace(b"\r\n", b"\n") + b"\n",
    "NUL": whole(b"X: a\0b"),
    "space in a name": whole(b"X Y: a"),
    "no colon": whole(b"nothing"),
    "lower-case method": whole(head=f"post {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()),
    "unknown version": whole(head=f"POST {CHAT} HTTP/9.9\r\nHost: localhost\r\n".encode()),
    "connect": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n" * 9,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "not ASCII": b"GET /v1/caf\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


class Answer:
    """What came back on a connection that was written to."""

    def __init__(self, data: bytes) -> None:
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.raw = data
        self.status = int(lines[0].split()[1]) if data else 0
        self.headers = {
            name.lower(): value for name, _, value in (x.partition(": ") for x in lines[1:])
        }
        self.body = rest

    @property
    def error(self) -> dict[str, Any]:
        """The error in the API's format."""
        assert self.headers["content-type"].startswith("application/json"), self.raw[:300]
        return json.loads(self.body)["error"]


async def ask(url: str, *parts: bytes) -> Answer:
    """Writes the parts, waits for the first answer, and closes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await answer(reader)
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> Answer:
    """The next answer on a connection."""
    async with asyncio.timeout(20):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return Answer(b"")
        found = Answer(head)
        if found.status == 100:
            return found
        if found.headers.get("transfer-encoding") == "chunked":
            return Answer(head + await reader.readuntil(b"0\r\n\r\n"))
        return Answer(head + await reader.readexactly(int(found.headers.get("content-length", 0))))


@asynccontextmanager
async def native() -> AsyncGenerator[str]:
    """uvicorn with httptools, as vLLM has it; the application reads and says 200."""

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(app, port=0, http="httptools", log_level="critical", lifespan="off")
    served = uvicorn.Server(config)
    served.capture_signals = nullcontext  # the test's own signals stay
    task = asyncio.create_task(served.serve())
    while not served.started:
        await asyncio.sleep(0)
    yield f"http://127.0.0.1:{served.servers[0].sockets[0].getsockname()[1]}"
    served.should_exit = True
    await task


def test_the_proxy_accepts_what_uvicorn_accepts(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        async with native() as url:
            for name, raw in TAKEN.items():
                assert (await ask(url, raw)).status == 200, name
                found = await ask(p.url, raw)
                assert found.status == 200, (name, found.raw[:300])
                assert "x-nextstate-turn" in found.headers, name
        assert len(store.turns.ids()) == len(TAKEN) == len(engine.requests)

    both(test, store, tmp_path)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_invalid_http_is_refused_in_the_apis_format(
    store: Store, tmp_path: Path, path: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        async with native() as url:
            for name, raw in REFUSED.items():
                raw = raw.replace(CHAT.encode(), path.encode())
                assert (await ask(url, raw)).status in (0, 400), name
                found = await ask(p.url, raw)
                assert found.status == 400, name
                assert found.error["message"], name
        assert engine.requests == []

    both(test, store, tmp_path)


class Bodies:
    """The bodies of requests as llhttp alone reads them."""

    def __init__(self) -> None:
        self.found: list[bytes] = []

    def on_headers_complete(self) -> None:
        self.found.append(b"")

    def on_body(self, body: bytes) -> None:
        self.found[-1] += body


def read_alone(raw: bytes) -> tuple[list[bytes], bool]:
    """(bodies, whether it is refused) as uvicorn's parser has it."""
    bodies = Bodies()
    parser = httptools.HttpRequestParser(bodies)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserError:
        return bodies.found, True
    return bodies.found, False


async def read_here(raw: bytes, cuts: list[int]) -> tuple[list[bytes], bool, str]:
    """The same as the proxy's parser has it, given the request in pieces; and why it refuses it."""
    loop = asyncio.get_running_loop()
    parser = RequestParser(BaseProtocol(loop), loop)
    payloads: list[StreamReader] = []
    why = ""
    for start, end in pairwise([0, *sorted(cuts), len(raw)]):
        try:
            payloads += [payload for _, payload in parser.feed_data(raw[start:end])[0]]
        except HttpProcessingError as error:
            why = error.message
            break
    found = [payload.read_nowait() if not payload.exception() else b"" for payload in payloads]
    if parser.refusal is not None:  # told once the requests before it are answered
        why = parser.refusal.message
    return found, parser.broken, why


def test_mangled_requests_are_accepted_exactly_if_uvicorns_parser_accepts_them() -> None:
    rng = random.Random(7)
    pieces = [b"\r", b"\n", b"\r\n", b":", b" ", b"\t", b"\0", b"\xff", b"a", b"chunked", b"0"]
    outcomes: Counter[bool] = Counter()
    pool = [raw for raw in (*TAKEN.values(), *REFUSED.values()) if len(raw) < 5000]
    pool.remove(REFUSED["connect"])  # it ends where another protocol begins

    async def test() -> None:
        for _ in range(20_000):
            raw = bytearray(b"".join(rng.choices(pool, k=2)))
            for _ in range(rng.randint(0, 3)):
                at = rng.randrange(len(raw)) % rng.choice([50, 200, 400])
                raw[at : at + rng.randint(0, 3)] = rng.choice(pieces)
            raw = bytes(raw)
            bodies, refused = read_alone(raw)
            cuts = [rng.randrange(len(raw)) for _ in range(rng.randint(0, 3))]
            ours, broken, why = await read_here(raw, cuts)
            outcomes[refused] += 1
            if broken and not refused:
                assert "is not a path" in why, raw
                continue
            assert broken == refused, raw
            if not refused:
                assert ours == bodies, raw

    asyncio.run(test())
    assert min(outcomes.values()) > 2000


def test_the_openai_client_may_name_itself(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        client = openai.AsyncOpenAI(
            base_url=f"{p.url}/v1", api_key="x", default_headers={"user-agent": "my agent"}
        )
        async with client:
            messages: Any = [{"role": "user", "content": "hi"}]
            reply = await client.chat.completions.create(model=MODEL, messages=messages)
        assert reply.choices[0].message.content == "Hello"

    both(test, store, tmp_path)


def test_bodies_come_whole_however_they_are_split_and_asked_for(
    store: Store, tmp_path: Path
) -> None:
    """Byte by byte, several on one connection, and behind a protocol switch that is declined."""
    switch = b"Connection: Upgrade, HTTP2-Settings"

    async def test(engine: ScriptedEngine, p: Running) -> None:
        plain, chunked = TAKEN["user-agent twice"], TAKEN["chunk extension"]
        for raw in (plain, chunked):
            assert (await ask(p.url, *(bytes([b]) for b in raw))).status == 200
        for raw in (
            whole(switch, b"Upgrade: h2c", b"HTTP2-Settings: AAA"),
            whole(b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: a"),
            chunked.replace(b"\r\n", b"\r\nUpgrade: h2c\r\n" + switch + b"\r\n", 1),
        ):
            host, port = p.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(raw + plain + raw[:-1])
            assert (await answer(reader)).status == 200
            assert (await answer(reader)).status == 200
            writer.write(raw[-1:] + chunked)
            assert (await answer(reader)).status == 200
            assert (await answer(reader)).status == 200
            writer.close()
        assert all(found["messages"] == request()["messages"] for found in engine.requests)
        assert len(engine.requests) == 14

    both(test, store, tmp_path)


def test_a_client_that_waits_to_send_its_body_is_asked_once_its_key_is_right(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for path in (CHAT, "/v1/echo"):
            for value in (b"100-continue", b"100-Continue"):
                lines = (b"Expect: " + value, b"Authorization: Bearer secret")
                raw = whole(*lines).replace(CHAT.encode(), path.encode())
                host, port = p.url.removeprefix("http://").split(":")
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(raw.removesuffix(BODY))
                assert (await answer(reader)).status == 100
                writer.write(BODY)
                assert (await answer(reader)).status == 200
                writer.close()
        unasked = whole(b"Expect: 100-continue").removesuffix(BODY)
        assert (await ask(p.url, unasked)).status == 401

    both(test, store, tmp_path, key="secret")


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_of_http_1_0_ends_with_its_answer(
    store: Store, tmp_path: Path, stream: bool
) -> None:
    """A stream has no other end there, also for a client that asks to keep the connection."""

    async def test(engine: ScriptedEngine, p: Running) -> None:
        body = orjson.dumps(request(stream=stream))
        head = f"POST {CHAT} HTTP/1.0\r\nConnection: keep-alive\r\n".encode()
        host, port = p.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + TYPE + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        async with asyncio.timeout(20):
            found = Answer(await reader.read())
        writer.close()
        assert found.status == 200
        assert b"lo" in found.body
        assert "transfer-encoding" not in found.headers

    both(test, store, tmp_path)


def test_a_head_without_an_end_is_refused(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for endless in (b"X: " + b"a" * 1_000_000, b"X" * 1_000_000, b"a: b\r\n" * 100_000):
            found = await ask(
                p.url, HEAD, *(endless[i : i + 9999] for i in range(0, 600_000, 9999))
            )
            assert (found.status, found.error["code"]) == (431, 431)

    both(test, store, tmp_path)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/echo"])
@pytest.mark.parametrize("begun", [b"5\r\nab", b"zz\r\n", b"5\r\nabcdefgh\r\n"])
def test_a_broken_body_is_a_400(store: Store, tmp_path: Path, path: str, begun: bytes) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        head = HEAD.replace(CHAT.encode(), path.encode()) + TYPE
        raw = head + b"Transfer-Encoding: chunked\r\n\r\n" + begun
        if begun == b"5\r\nab":
            raw += b"cde\r\nnothing\r\n"
        found = await ask(p.url, raw)
        assert found.status == 400
        assert "body" in found.error["message"]

    both(test, store, tmp_path)


def test_slow_heads_and_bodies_get_a_408(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for begun in (b"P", HEAD, HEAD + b"X: a"):
            found = await ask(p.url, begun)
            assert (found.status, found.error["type"]) == (408, "RequestTimeoutError")
        for path in (CHAT, "/v1/score", "/v1/feedback", "/v1/messages", "/v1/echo"):
            head = whole().replace(CHAT.encode(), path.encode())
            if path == "/v1/echo":
                head = head.replace(b"application/json", b"text/plain")
            found = await ask(p.url, head[:-1])
            assert (found.status, found.headers["connection"]) == (408, "close"), path
            assert "did not" in found.error["message"] or "came within" in found.error["message"]
        assert (await ask(p.url)).status == 0  # one that says nothing is closed
        assert engine.requests == []

    both(test, store, tmp_path, intervals=Intervals(look_s=0.02, head_s=0.1, body_s=0.1))


def test_the_deadlines_leave_a_slow_reply_and_an_idle_connection_alone(
    store: Store, tmp_path: Path
) -> None:
    short = Intervals(look_s=0.01, head_s=0.01, body_s=0.01)
    looks = asyncio.Event()

    async def test() -> None:
        async with (
            scripted_engine() as engine,
            running(engine.url, store, tmp_path, intervals=short) as p,
        ):
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            engine.script.gate = gate = asyncio.Event()
            host, port = p.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            streamed = orjson.dumps(request(stream=True))
            writer.write(HEAD + TYPE + b"Content-Length: %d\r\n\r\n" % len(streamed) + streamed)
            assert b" 200 " in await reader.readline()
            asyncio.get_running_loop().call_later(0.2, looks.set)
            await looks.wait()
            gate.set()
            assert b"[DONE]" in await reader.readuntil(b"0\r\n\r\n")
            looks.clear()
            asyncio.get_running_loop().call_later(0.2, looks.set)
            await looks.wait()
            writer.write(whole())
            assert (await answer(reader)).status == 200
            writer.close()

    asyncio.run(test())
