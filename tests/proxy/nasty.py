"""An engine that answers anything, and requests that hold anything, by a seed."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import unquote_to_bytes

from tests.proxy.running_proxy import until
from tests.scripted_engine import MODEL, Script, compact, plain_reply, stream_chunks

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
        """Closes what the proxy keeps open, also what it opens meanwhile to ask for the models."""

        def closed() -> bool:
            for writer in self.writers:
                writer.close()
            return not self.writers

        await until(closed)

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
