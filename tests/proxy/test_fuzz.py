"""Requests and engine answers of every bad kind, over real sockets: the proxy stands and leaks not.

Case N is made from N alone: NEXTSTATE_FUZZ_CASE=N runs it by itself. NEXTSTATE_FUZZ_CASES sets how
many the long form runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import gzip
import json
import logging
import os
import sqlite3
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote_to_bytes

import psutil
import pytest
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from nextstate.store.store import Store
from proxy.exchange import Exchange
from tests.proxy.test_proxy import Running, running, until
from tests.scripted_engine import MODEL, Script, compact, plain_reply, stream_chunks

SHORT, LONG = 400, int(os.environ.get("NEXTSTATE_FUZZ_CASES", "100000"))
AT_ONCE = 16
CASE_TIMEOUT_S = 30.0
LEAK_MB = 64

KEY = "secret"
RUBBISH: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 10**9, 2**31, 2**63, 2**64, -(2**70)),
    *("", "x", "0", "2", "true", "\x00", "ü" * 50, "data: [DONE]\n\n", "a" * 5000, "\ud800"),
    *([], [None], [[]], ["x"], [0], [{}], {}, {"a": None}, {"x": {"y": []}}, [1, "a", None, {}]),
)
"""Values in places where others belong."""


# Engine answers


@dataclass
class Answer:
    """What the engine sends for one request, as pieces of bytes."""

    kind: str
    pieces: list[bytes]
    status: int | None = 200
    """None: no answer that could be passed on."""
    body: bytes | None = None
    """The body where it has to arrive unchanged."""
    whole: bool = True
    """False: the answer breaks off."""
    pause_s: float = 0.0
    """Between two pieces: time for the client to leave."""


def head(status: int, headers: bytes, chunked: bool) -> bytes:
    framing = b"Transfer-Encoding: chunked\r\n" if chunked else b""
    return b"HTTP/1.1 %d Made Up\r\n" % status + headers + framing + b"\r\n"


def split(rng: Random, data: bytes, most: int = 8) -> list[bytes]:
    """`data` cut at random bytes."""
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(most)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]


def http(rng: Random, status: int, body: bytes, kind: bytes = b"application/json") -> list[bytes]:
    """A sound HTTP answer with this body, in random pieces."""
    headers = b"Content-Type: " + kind + b"\r\n"
    if rng.random() < 0.5:
        headers += b"Content-Length: %d\r\n" % len(body)
        return split(rng, head(status, headers, False) + body)
    chunks = b"".join(b"%x\r\n" % len(p) + p + b"\r\n" for p in split(rng, body, 20))
    return split(rng, head(status, headers, True) + chunks + b"0\r\n\r\n", 20)


def mutated(rng: Random, value: Any, times: int) -> Any:
    """`value` with rubbish in random places, some of it missing or twice."""
    value = copy.deepcopy(value)
    for _ in range(times):
        node, parent, key = value, None, None
        while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.8):
            parent, key = (
                node,
                rng.choice(list(node) if isinstance(node, dict) else [*range(len(node))]),
            )
            node = node[key]
        if parent is None:
            return copy.deepcopy(rng.choice(RUBBISH))
        if rng.random() < 0.2:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(rng.choice(RUBBISH))
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


ASKING = {"model": MODEL, "return_token_ids": True, "logprobs": True}


def chunks(rng: Random) -> list[Any]:
    calls = [
        {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]
    script = Script(pieces=("Gr", "", "ü", "!"), tool_calls=calls if rng.random() < 0.5 else None)
    return stream_chunks({**ASKING, "stream_options": {"include_usage": True}}, script)


def sse(rng: Random, events: list[Any], end: bytes) -> bytes:
    """Events with all line ends and fields that SSE knows."""
    data = b""
    for event in events:
        text = event if isinstance(event, bytes) else as_json(event)
        lines = [b"data: " + text]
        if rng.random() < 0.1:
            lines.insert(0, rng.choice((b"event: message", b": note", b"id: 1", b"retry: 1", b"x")))
        line_end = rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r"))
        data += line_end.join(lines) + line_end * 2
    return data + end


def garbage(rng: Random) -> bytes:
    return rng.choice(
        (
            b"",
            b"null",
            b"[1, 2]",
            b'"text"',
            b'{"id": "x", "choi',
            b"\xff\xfe\x00",
            b"data",
            b"data: \n\n",
            b"data: [DONE]",
            b"\n\n\n\n\r\r\r\n",
            b'data: {"a\n\n',
            b"data: \xff\xff\n\n: x\n\ndata: [DONE]\n\n",
            b"[" * 5000,
            b'{"a":' * 3000,
            b'{"choices": NaN}',
            rng.randbytes(rng.randrange(3000)),
        )
    )


def sound(rng: Random, stream: bool) -> Answer:
    done = b"data: [DONE]\n\n"
    body = sse(rng, chunks(rng), done) if stream else as_json(plain_reply(ASKING, Script()))
    kind = b"text/event-stream" if stream else b"application/json"
    return Answer("sound", http(rng, 200, body, kind))


def wrong_types(rng: Random, stream: bool) -> Answer:
    if not stream:
        body = as_json(mutated(rng, plain_reply(ASKING, Script()), rng.randrange(1, 4)))
        return Answer("wrong_types", http(rng, 200, body))
    events = chunks(rng)
    for _ in range(rng.randrange(1, 4)):
        number = rng.randrange(len(events))
        events[number] = mutated(rng, events[number], rng.randrange(1, 3))
    done = rng.choice((b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b""))
    return Answer("wrong_types", http(rng, 200, sse(rng, events, done), b"text/event-stream"))


def not_understood(rng: Random, stream: bool) -> Answer:
    body = garbage(rng)
    kind = rng.choice((b"text/event-stream", b"application/json", b"text/html", b"x"))
    return Answer("not_understood", http(rng, 200, body, kind), body=body)


def error_status(rng: Random, stream: bool) -> Answer:
    body = rng.choice((garbage(rng), b'{"error": {"message": "m", "code": 400}}'))
    status = rng.choice((400, 401, 404, 413, 422, 429, 500, 502, 503, 599, 300, 302, 418, 201))
    return Answer("error_status", http(rng, status, body), status=status, body=body)


def broken_off(rng: Random, stream: bool) -> Answer:
    answer = sound(rng, stream) if rng.random() < 0.7 else error_status(rng, stream)
    data = b"".join(answer.pieces)
    start = data.index(b"\r\n\r\n") + 4
    cut = rng.randrange(start, len(data)) if len(data) > start else start
    pieces = split(rng, data[:cut])
    return Answer("broken_off", pieces, status=answer.status, whole=cut == len(data))


def odd_headers(rng: Random, stream: bool) -> Answer:
    answer = sound(rng, stream)
    lines = (
        b"x-odd: \xff\xfe",
        b"x-odd: caf\xc3\xa9",
        b"Set-Cookie: a=1\r\nSet-Cookie: b=2",
        b"x-long: " + b"a" * 6000,
        b"x-empty:",
        b"Keep-Alive: timeout=1",
        b"Content-Type: nonsense",
        b"x-nextstate-turn: mine",
        b"Date: yesterday",
    )
    data = b"".join(answer.pieces).replace(b"\r\n", b"\r\n" + rng.choice(lines) + b"\r\n", 1)
    return Answer("odd_headers", split(rng, data))


def not_http(rng: Random, stream: bool) -> Answer:
    data = rng.choice(
        (
            b"SSH-2.0-x\r\n",
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
            b"HTTP/9.9 200 OK\r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
            b"HTTP/1.1 200 OK\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
        )
    )
    return Answer("not_http", [data], status=None, whole=False)


def nothing(rng: Random, stream: bool) -> Answer:
    return Answer("nothing", [], status=None, whole=False)


ANSWERS: tuple[tuple[Callable[[Random, bool], Answer], int], ...] = (
    (sound, 8),
    (wrong_types, 8),
    (not_understood, 4),
    (error_status, 4),
    (broken_off, 3),
    (odd_headers, 2),
    (not_http, 1),
    (nothing, 1),
)


class NastyEngine:
    """Healthy when asked; every case gets the answer that `answers` holds for its number."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.models = compact({"object": "list", "data": [{"id": MODEL, "root": "/m"}]})
        self.asked = 0
        """How often for its models."""
        self.harm: list[str] = []
        """What the guard should have kept back."""
        self.reached: set[str] = set()
        """Cases that came this far."""
        self.under_way = 0
        self.writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24)

    async def close_connections(self) -> None:
        """Closes what the proxy keeps open to ask again."""
        for writer in list(self.writers):
            writer.close()
        await until(lambda: not self.writers)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self.close_connections()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while await self._answer(reader, writer):
                pass
        except (OSError, ValueError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self.writers.discard(writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = await reader.readuntil(b"\r\n\r\n")
        self.under_way += 1
        try:
            first, _, rest = request.partition(b"\r\n")
            headers = dict(
                line.lower().split(b": ", 1) for line in rest.split(b"\r\n") if b": " in line
            )
            body = await read_body(reader, headers)
            target = first.split(b" ")[1]
            number = headers.get(b"x-request-id", b"").decode("latin-1")
            answer = self.answers.get(number)
            if answer is None:
                writer.write(self._own(target))
                return True
            self.reached.add(number)
            is_json = headers.get(b"content-type", b"").startswith(b"application/json")
            if (harm := harm_in(first, body if is_json else b"")) is not None:
                self.harm.append(f"case {headers[b'x-request-id'].decode()}: {harm}")
            if first.startswith(b"HEAD "):
                writer.write(head(answer.status or 200, b"Content-Length: 5\r\n", False))
                return True
            for piece in answer.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(answer.pause_s)
            return answer.whole
        finally:
            self.under_way -= 1

    def _own(self, target: bytes) -> bytes:
        body = self.models
        self.asked += target.endswith(b"models")
        if target.endswith(b"completions"):
            body = compact({"model": MODEL, "choices": [{"text": "x"}]})
        return head(200, b"Content-Length: %d\r\n" % len(body), False) + body


def harm_in(first: bytes, body: bytes) -> str | None:
    """Why the engine should never have got this request, in the eyes of a lenient server."""
    path = unquote_to_bytes(first.split(b" ")[1].partition(b"?")[0])
    if not path.startswith(b"/v1/") or not {b".", b".."}.isdisjoint(path.split(b"/")):
        return f"{first!r} leads out of /v1/"
    path = path.strip(b"/")
    if path in (b"v1/sleep", b"v1/load_lora_adapter"):
        return f"{first!r} administers the engine"
    if not path.endswith(b"chat/completions") or not first.startswith(b"POST"):
        return None
    try:
        asked = json.loads(body)  # UTF-16, NaN and lone surrogates are fine here
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict):
        return None
    if asked.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    try:
        many = int(asked.get("n") or 1) > 1024
    except (TypeError, ValueError):
        return None
    return f"n = {asked['n']!r}" if many else None


async def read_body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> bytes:
    """One HTTP body, by length or in chunks."""
    if headers.get(b"transfer-encoding") == b"chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return body
    return await reader.readexactly(int(headers.get(b"content-length", b"0")))


# Client requests


@dataclass
class Case:
    """One request as bytes, and the engine's answer to it."""

    number: int
    kind: str
    path: bytes
    request: bytes
    answer: Answer
    leaves_after: int | None
    """The client is gone after this many bytes of its request, or, if they are all sent, after the
    first of the reply."""
    sound: bool


def chat(rng: Random, stream: bool) -> dict[str, Any]:
    said = [{"role": "user", "content": f"hello {rng.randrange(50)}"}]
    if rng.random() < 0.3:
        said += [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "go on"}]
    body: dict[str, Any] = {"model": MODEL, "messages": said, "stream": stream}
    if rng.random() < 0.3:
        body |= {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}
    if rng.random() < 0.3:
        body |= {"stream_options": {"include_usage": True}, "n": 1, "temperature": 1.0, "user": "u"}
    if rng.random() < 0.3:
        body |= {"metadata": {"session_id": "s"}, "logprobs": True, "return_token_ids": True}
    return body


def body_sound(rng: Random, stream: bool) -> bytes:
    return as_json(chat(rng, stream))


def body_wrong_types(rng: Random, stream: bool) -> bytes:
    known = {
        **{"model": MODEL, "messages": [], "stream": stream, "n": 1, "logprobs": None},
        **{"prompt_logprobs": None, "echo": None, "top_logprobs": 1, "tools": [], "stop": []},
        **{"user": "u", "session_id": "s", "prompt_cache_key": "k", "metadata": {}},
        **{"stream_options": {}, "return_token_ids": True, "tool_choice": "auto", "seed": 1},
    }
    body = known | chat(rng, stream) if rng.random() < 0.7 else chat(rng, stream)
    changed = mutated(rng, body, rng.randrange(1, 4))
    if isinstance(changed, dict) and rng.random() < 0.8:
        changed["model"] = MODEL  # or the request goes by unread
    return as_json(changed)


def body_odd_json(rng: Random, stream: bool) -> bytes:
    start = as_json(chat(rng, stream))[:-1]
    if rng.random() < 0.2:
        start += rng.choice((b',"prompt_logprobs":1', b',"n":1e9', b',"n":"9999"', b',"n":1025'))
    return rng.choice(
        (
            start + b',"temperature":NaN}',
            start + b',"temperature":Infinity,"x":1e999}',
            start + b',"seed":' + b"9" * 400 + b"}",
            start + b',"model":"base","model":"base","n":1,"n":2}',
            start + b',"user":"\\ud800"}',
            start + b',"user":"\xff\xfe"}',
            start + b',"x":' + b"[" * 900 + b"]" * 900 + b"}",
            start + b',"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
            start + b',"\\u0000":"\\u0000"}',
            b"\xef\xbb\xbf" + start + b"}",
            (start + b"}").decode().encode("utf-16"),
            start,
        )
    )


def body_rubbish(rng: Random, stream: bool) -> bytes:
    return rng.choice((b"", garbage(rng), as_json(rng.choice(RUBBISH)), rng.randbytes(200)))


BODIES: tuple[tuple[Callable[[Random, bool], bytes], int], ...] = (
    (body_sound, 10),
    (body_wrong_types, 8),
    (body_odd_json, 3),
    (body_rubbish, 2),
)
PATHS = (
    *(b"/v1/chat/completions",) * 40,
    *(b"/v1/completions", b"/v1/embeddings", b"/v1/models", b"/v1/responses", b"/v1/", b"/v1"),
    *(b"/v1//chat/completions", b"/v1/chat/completions/", b"/v1/chat/completions?a=1&a=%00"),
    *(b"/v1/%00", b"/v1/%ff%fe", b"/v1/a%2Fb", b"/v1/;x", b"/v1/?", b"/v1/" + b"a" * 3000),
    *(b"/v1/sleep", b"/v1/load_lora_adapter", b"/", b"/api", b"/metrics", b"/healthz", b"*"),
    *(b"/v1/x/../sleep", b"/v1/%2e%2e/v1/load_lora_adapter", b"/v1/./sleep", b"/v1/../metrics"),
    *(b"/v1/feedback", b"//", b"/..", b"/v2/chat/completions", b"/%", b"/v1/%zz", b"/v1/\xff"),
)
METHODS = (*(b"POST",) * 30, b"GET", b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"PATCH", b"BREW")
HEADERS = (
    *(b"X-Session-Id: \xff\xfe", b"X-Session-Id: " + b"s" * 900, b"X-Session-Id: caf\xc3\xa9"),
    *(b"x-session-affinity: a", b"x-api-key: \xff", b"Authorization: Basic", b"x:"),
    *(b"Cookie: a=\xff; b", b"Accept-Encoding: br", b"Range: bytes=0-1", b"TE: trailers"),
    *(b"Expect: 100-continue", b"Expect: x", b"Upgrade: websocket", b"Connection: x"),
    *(b"Content-Encoding: gzip", b"Content-Encoding: br", b"x-long: " + b"a" * 7000, b"x-a: \x01"),
    *(b"traceparent: 0", b"If-None-Match: *", b"Host: \xff", b": x", b"bad header", b"Date: x"),
)
TYPES = (
    *(b"application/json",) * 8,
    *(b"text/plain", b"application/JSON; charset=latin-1", b"multipart/form-data", b"x", b"\xff"),
)


def case(number: int) -> Case:
    """The case of this number."""
    rng = Random(number)
    stream = rng.random() < 0.6
    answered, weights = zip(*ANSWERS, strict=True)
    answer = rng.choices(answered, weights)[0](rng, stream)
    made, weights = zip(*BODIES, strict=True)
    make = rng.choices(made, weights)[0]
    body = make(rng, stream)
    path, method = rng.choice(PATHS), rng.choice(METHODS)
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: a", b"Connection: close"]
    lines += [b"Authorization: Bearer " + KEY.encode()] * (rng.random() < 0.95)
    content_type = rng.choice(TYPES)
    lines += [b"x-request-id: %d" % number, b"Content-Type: " + content_type]
    odd = rng.choice(HEADERS) if rng.random() < 0.2 else b""
    lines += [odd] * bool(odd)
    if odd == b"Content-Encoding: gzip" and rng.random() < 0.5:
        body = gzip.compress(body)
    if rng.random() < 0.3:
        lines.append(b"Transfer-Encoding: chunked")
        body = b"".join(b"%x\r\n" % len(p) + p + b"\r\n" for p in split(rng, body)) + b"0\r\n\r\n"
    else:
        lines.append(b"Content-Length: %d" % len(body))
    kind = f"{method.decode()} {path[:40]!r} {make.__name__} {odd[:30]!r} {answer.kind}"
    answer.pause_s = 0.01 * (rng.random() < 0.1)
    request = b"\r\n".join(lines) + b"\r\n\r\n" + body
    leaves_after = rng.randrange(2 * len(request)) if rng.random() < 0.1 else None
    sound = kind == "POST b'/v1/chat/completions' body_sound b'' sound"
    sound = sound and content_type == b"application/json"
    return Case(number, kind, path, request, answer, leaves_after, sound)


# What came back


@dataclass
class Got:
    """A reply as a client reads it."""

    status: int | None
    body: bytes
    whole: bool
    raw: bytes = field(repr=False, default=b"")

    @property
    def turn(self) -> str:
        """The id of the turn, if the reply names one."""
        return self.raw.partition(b"x-nextstate-turn: ")[2][:25].decode()


def parsed(raw: bytes, to_head: bool) -> Got:
    """Reads one HTTP reply until the connection's end."""
    while raw.startswith(b"HTTP/1.1 100"):
        raw = raw.partition(b"\r\n\r\n")[2]
    start, found, body = raw.partition(b"\r\n\r\n")
    if not found:
        return Got(None, raw, False, raw)
    status = int(start.split(b" ")[1])
    headers = dict(line.lower().split(b": ", 1) for line in start.split(b"\r\n") if b": " in line)
    if to_head or status in (204, 304):
        return Got(status, b"", True, raw)
    if headers.get(b"transfer-encoding") != b"chunked":
        whole = b"content-length" not in headers or len(body) == int(headers[b"content-length"])
        return Got(status, body, whole, raw)
    data = b""
    while body:
        size_text, _, body = body.partition(b"\r\n")
        size = int(size_text, 16)
        if size == 0:
            return Got(status, data, True, raw)
        data, body = data + body[:size], body[size + 2 :]
    return Got(status, data, False, raw)


async def send(port: int, case: Case) -> Got | None:
    """The reply; None for a client that left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    raw = b""
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(case.request[: case.leaves_after])
            await writer.drain()
            if case.leaves_after is not None and case.leaves_after < len(case.request):
                return None
            while data := await reader.read(1 << 20):
                raw += data
                if case.leaves_after is not None:
                    return None
    finally:
        writer.transport.abort()
    return parsed(raw, case.request.startswith(b"HEAD "))


def complaint(case: Case, got: Got, reached: bool) -> str | None:
    """What the proxy did wrong, or None."""
    answer = case.answer
    if got.status is not None and got.status >= 500 and got.status != answer.status:
        unreachable = got.status == 503 and not answer.whole
        if not unreachable:
            return f"answered {got.status} of its own: {got.body[:80]!r}"
    if (
        not reached
        or not case.path.startswith(b"/v1/chat/completions")
        or got.status != answer.status
    ):
        return None
    if not case.request.startswith(b"POST"):
        return None
    if answer.whole != got.whole:
        return f"the engine's answer was whole = {answer.whole}, the client's {got.whole}"
    if answer.body is not None and answer.body != got.body:
        return f"changed {answer.body[:60]!r} to {got.body[:60]!r}"
    return None


class Errors(logging.Handler):
    """Keeps what asyncio and aiohttp's server report, except for requests that are not HTTP."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        not_http = isinstance(error, HttpProcessingError | web.RequestPayloadError)
        if isinstance(error, ConnectionResetError):  # aiohttp greets a client that has left
            frames = traceback.extract_tb(error.__traceback__)
            not_http = not any("proxy" in Path(frame.filename).parts for frame in frames)
        if record.levelno >= logging.ERROR and not not_http:
            self.found.append(f"{record.getMessage()}: {error!r:.300}")


@contextmanager
def listening() -> Iterator[Errors]:
    """Logs are heard here and nowhere else: pytest would keep them all."""
    errors = Errors()
    loggers = [logging.getLogger(name) for name in ("aiohttp", "asyncio", "proxy", "nextstate")]
    for logger in loggers:
        logger.propagate = False
        if logger.name in ("aiohttp", "asyncio"):
            logger.addHandler(errors)
        else:
            logger.addHandler(logging.NullHandler())
    try:
        yield errors
    finally:
        for logger in loggers:
            logger.propagate = True
            logger.removeHandler(errors)


@asynccontextmanager
async def between(store: Store, tmp_path: Path) -> AsyncGenerator[tuple[NastyEngine, Running]]:
    engine = NastyEngine()
    await engine.start()
    settings: dict[str, Any] = {"hold_s": 0.05, "record_timeout_s": 30.0, "max_body_mb": 1}
    try:
        async with running(engine.url, store, tmp_path, KEY, **settings) as proxy:
            await asyncio.wait_for(proxy.proxy.versions.wait_up(), 10)
            yield engine, proxy
    finally:
        await engine.close()


async def ask(engine: NastyEngine, port: int, case: Case, ended: list[str]) -> str | None:
    """Runs one case; what went wrong with it. Notes the turn that has to be in the store now."""
    engine.answers[str(case.number)] = case.answer
    try:
        got = await asyncio.wait_for(send(port, case), CASE_TIMEOUT_S)
    except TimeoutError:
        wrong: str | None = f"no end after {CASE_TIMEOUT_S} s"
    else:
        reached = str(case.number) in engine.reached
        wrong = got and complaint(case, got, reached)
        if got is not None and case.sound and got.status == 200:
            ended.append(got.turn)
    del engine.answers[str(case.number)]
    engine.reached.discard(str(case.number))
    return wrong and f"case {case.number} ({case.kind}): {wrong}"


async def run(numbers: range, store: Store, tmp_path: Path) -> None:
    """All cases, then: everything as it was before."""
    memory = psutil.Process()
    wrong: list[str] = []
    ended: list[str] = []
    rss_mb: dict[int, float] = {}
    with listening() as errors:
        async with between(store, tmp_path) as (engine, p):
            port = int(p.url.rpartition(":")[2])
            tasks = len(asyncio.all_tasks())
            for start in range(numbers.start, numbers.stop, AT_ONCE):
                batch = [case(n) for n in range(start, min(start + AT_ONCE, numbers.stop))]
                # An engine that answers nothing counts as down, for all.
                alone = [c for c in batch if c.answer.kind == "nothing"]
                others = [c for c in batch if c.answer.kind != "nothing"]
                heard = len(errors.found)
                found = await asyncio.gather(*(ask(engine, port, c, ended) for c in others))
                for lonely in alone:
                    found.append(await ask(engine, port, lonely, ended))
                    await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
                wrong += [complaint for complaint in found if complaint]
                wrong += [f"logged among {batch[0].number}+: {e}" for e in errors.found[heard:]]
                done = 100 * (start + AT_ONCE - numbers.start) // len(numbers)
                if done // 10 > max(rss_mb, default=0) // 10 or len(wrong) > 100:
                    gc.collect()
                    rss_mb[done] = memory.memory_info().rss / 2**20
                    print(f"{done} %, RSS {rss_mb[done]:.0f} MB, {len(wrong)} complaints")
                if len(wrong) > 100:
                    break
            gc.collect()
            wrong += [f"reached the engine: {harm}" for harm in engine.harm]
            wrong += [f"turn {turn} is lost" for turn in ended if store.turn(turn) is None]
            assert not wrong, "\n".join([f"{len(wrong)} complaints", *wrong[:100]])
            status, _, _ = await p.chat(chat(Random(0), False), {"Authorization": f"Bearer {KEY}"})
            assert status == 200, "the proxy does not serve any more"
            await until(lambda: engine.under_way == 0)
            assert not +p.proxy.versions.running
            upstream = p.proxy.upstream
            in_use = upstream._connections.difference(upstream._free)  # pyright: ignore[reportPrivateUsage]
            assert not in_use
            await p.http.close()
            await engine.close_connections()
            await until(lambda: len(asyncio.all_tasks()) <= tasks)
            counts = p.proxy.recorder.counts
            print(f"{counts.recorded} turns recorded, {counts.lost} lost")
            assert counts.lost == 0
            assert counts.recorded > len(numbers) // 20
            assert len(ended) > len(numbers) // 200
    late = [mb for done, mb in rss_mb.items() if done >= 30]
    if len(numbers) == LONG:
        assert late[-1] - late[0] < LEAK_MB, f"memory grows: {rss_mb}"


@pytest.mark.parametrize(
    "count",
    [SHORT, pytest.param(LONG, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])],
    ids=["short", "long"],
)
def test_no_request_and_no_answer_brings_the_proxy_down(
    store: Store, tmp_path: Path, count: int
) -> None:
    one = os.environ.get("NEXTSTATE_FUZZ_CASE")
    numbers = range(count) if one is None else range(int(one), int(one) + 1)
    asyncio.run(run(numbers, store, tmp_path))


def test_an_engine_that_answers_our_own_questions_with_nonsense_is_asked_again(
    store: Store, tmp_path: Path
) -> None:
    async def test(models: bytes) -> None:
        engine = NastyEngine()
        sound, engine.models = engine.models, models
        await engine.start()
        try:
            async with running(engine.url, store, tmp_path) as p:
                await until(lambda: engine.asked > 1)
                engine.models = sound
                await asyncio.wait_for(p.proxy.versions.wait_up(), 10)
        finally:
            await engine.close()

    with listening():
        for models in (b"", b"[]", b'{"data": 5}', b'{"data": [{}]}', b"\xff"):
            asyncio.run(test(models))


def test_a_stream_without_a_finish_reason_is_recorded_before_its_end_too(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with between(store, tmp_path) as (engine, p):
            events = [*chunks(Random(0))[:2], {"error": {"message": "out of memory"}}]
            body = sse(Random(0), events, b"data: [DONE]\n\n")
            engine.answers["1"] = Answer("error", http(Random(1), 200, body, b"text/event-stream"))
            record, received, before = p.proxy.recorder.record, bytearray(), bytearray()

            async def slow(exchange: Exchange) -> None:
                await asyncio.sleep(0.1)  # time for [DONE] to arrive, if it was sent
                before.extend(received)
                await record(exchange)

            monkeypatch.setattr(p.proxy.recorder, "record", slow)
            headers = {"Authorization": f"Bearer {KEY}", "x-request-id": "1"}
            headers["Content-Type"] = "application/json"
            asked = as_json(chat(Random(0), True))
            async with p.http.post(
                f"{p.url}/v1/chat/completions", data=asked, headers=headers
            ) as answer:
                async for data in answer.content.iter_any():
                    received.extend(data)
            assert b"out of memory" in received
            assert b"[DONE]" in received
            assert b"[DONE]" not in before

    with listening():
        asyncio.run(test())


ODD = [
    {"model": 5},
    {"usage": []},
    {"prompt_token_ids": "ab"},
    {"prompt_token_ids": [-1]},
    {"choices": [{"index": "0"}]},
    {"choices": [{"index": 0, "finish_reason": {}, "message": {"content": 5}}]},
    {"choices": [{"finish_reason": 5, "token_ids": [2**40], "message": {"content": "x"}}]},
    {"choices": [{"token_ids": [1.5], "logprobs": {"content": [{}]}, "message": {}}]},
    {"choices": [{"token_ids": [1], "logprobs": {"content": [{"logprob": 0.5}]}}]},
    {"choices": [{"message": {"tool_calls": [{"index": [], "function": {"name": 1}}]}}]},
]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_turn_whose_reply_is_malformed_is_kept_and_says_that_it_must_not_train(
    store: Store, tmp_path: Path, odd: dict[str, Any]
) -> None:
    async def test() -> None:
        async with between(store, tmp_path) as (engine, p):
            engine.answers["1"] = Answer("odd", http(Random(1), 200, as_json(odd)))
            headers = {"Authorization": f"Bearer {KEY}", "x-request-id": "1"}
            status, body, answered = await p.chat(chat(Random(0), False), headers)
            assert (status, json.loads(body).keys()) == (200, odd.keys())
            turn = store.turn(answered["x-nextstate-turn"])
            assert turn is not None
            assert turn.untrainable is not None

    with listening():
        asyncio.run(test())


def test_a_store_that_is_gone_is_said_and_fails_no_reply(store: Store, tmp_path: Path) -> None:
    async def test() -> None:
        async with between(store, tmp_path) as (_, p):
            p.http.headers["Authorization"] = f"Bearer {KEY}"
            with sqlite3.connect(tmp_path / "state" / "nextstate.sqlite3") as file:
                for table in ("next_states", "judgements", "verdicts", "samples", "turns"):
                    file.execute(f"DROP TABLE {table}")
            file.close()
            assert (await p.chat(chat(Random(0), False)))[0] == 200
            assert p.proxy.recorder.counts.lost == 1
            vote = {"turn_id": "turn_x", "score": 1}
            assert (await p.http.post(f"{p.url}/v1/feedback", json=vote)).status == 503
            answer = await p.http.get(f"{p.url}/metrics")
            assert (answer.status, "turns_lost_total 1\n" in await answer.text()) == (200, True)

    with listening():
        asyncio.run(test())
