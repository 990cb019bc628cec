"""Bytes that somebody on the network sends: smuggled requests, broken heads, other protocols."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import orjson

from tests.attacks.from_pages import CHAT
from tests.attacks.lab import TAUGHT, Attack, Attacker, Lab, condition
from tests.proxy.running_proxy import request

BODY = orjson.dumps(request(TAUGHT)).decode()
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
KEYED = HEAD + "Authorization: Bearer $chat$\r\n"
LENGTH = f"Content-Length: {len(BODY)}\r\n"
HIDDEN = f"{HEAD}Authorization: Bearer $admin$\r\n{LENGTH}\r\n{BODY}"
"""The request that is smuggled: it must never be served."""
CHUNKED = f"{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n"


def _smuggled() -> Iterator[tuple[str, str]]:
    """Two readers of each of these could disagree where the first request ends."""
    te = "Transfer-Encoding: chunked\r\n"
    yield "length before chunked", f"{KEYED}Content-Length: 4\r\n{te}\r\n{CHUNKED}{HIDDEN}"
    yield "chunked before length", f"{KEYED}{te}Content-Length: 4\r\n\r\n{CHUNKED}{HIDDEN}"
    for how, line in (
        ("a space before the colon", "Transfer-Encoding : chunked"),
        ("a tab before the colon", "Transfer-Encoding\t: chunked"),
        ("a folded line", "Transfer-Encoding:\r\n chunked"),
        ("a vertical tab", "Transfer-Encoding: \x0bchunked"),
        ("another coding after it", "Transfer-Encoding: chunked, identity"),
        ("another coding alone", "Transfer-Encoding: xchunked"),
        ("quotes", 'Transfer-Encoding: "chunked"'),
        ("a semicolon", "Transfer-Encoding: chunked;q=0.5"),
        ("nothing", "Transfer-Encoding:"),
        ("a CR in front", "X: y\rTransfer-Encoding: chunked"),
        ("an LF in front", "X: y\n\nTransfer-Encoding: chunked"),
        ("a name in two lines", "Transfer-\r\nEncoding: chunked"),
        ("a letter beyond ASCII", "Tran\u017ffer-Encoding: chunked"),
    ):
        yield f"chunked with {how}", f"{KEYED}{line}\r\n{LENGTH}\r\n{CHUNKED}{HIDDEN}"
    for how, value in (
        ("two that differ", "4\r\nContent-Length: 5"),
        ("two in one", "4, 4"),
        ("signed", "+4"),
        ("negative", "-1"),
        ("hexadecimal", "0x4"),
        ("with an exponent", "1e1"),
        ("cut", "4 4"),
        ("a fraction", "4.0"),
        ("none", ""),
        ("huge", "99999999999999999999"),
        ("grouped", "4_0"),
        ("in other digits", "\u0664"),
        ("with a comma", "4,"),
    ):
        yield f"a length that is {how}", f"{KEYED}Content-Length: {value}\r\n\r\nabcd{HIDDEN}"
    for how, chunk in (
        ("signed", "+4\r\nabcd"),
        ("negative", "-1\r\nabcd"),
        ("prefixed", "0x4\r\nabcd"),
        ("beyond 64 bits", "1" + "0" * 16 + "\r\nabcd"),
        ("empty", "\r\nabcd"),
        ("no number", "zz\r\nabcd"),
        ("too short", "2\r\nabcd"),
        ("with a space", "4 \r\nabcd"),
        ("ended by LF", "4\nabcd"),
        ("grouped", "0_4\r\nabcd"),
    ):
        yield f"a chunk size that is {how}", f"{KEYED}{te}\r\n{chunk}\r\n0\r\n\r\n{HIDDEN}"


def _heads() -> Iterator[tuple[str, str | bytes]]:
    """What is no request, or one that nobody may send."""
    line = "Host: localhost\r\n\r\n"
    yield "TLS where none is spoken", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n" * 9
    yield "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "HTTP/0.9", b"GET /page/turns\r\n\r\n"
    yield "the PROXY protocol", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\nGET / HTTP/1.1\r\n\r\n"
    yield "SMTP, by a form of a page", b"EHLO x\r\nMAIL FROM:<a@b.c>\r\n\r\n"
    yield "a tunnel", f"CONNECT 169.254.169.254:80 HTTP/1.1\r\n{line}"
    yield "another host's page", f"GET ftp://evil.example/x HTTP/1.1\r\n{line}"
    yield "no path", f"GET * HTTP/1.1\r\n{line}"
    yield "a NUL in the path", f"GET /page/\0turns HTTP/1.1\r\n{line}"
    yield "a bare LF", f"GET /page/turns HTTP/1.1\n{line}"
    yield "a CR in the path", f"GET /page\r/turns HTTP/1.1\r\n{line}"
    yield "a method of small letters", f"get /page/turns HTTP/1.1\r\n{line}"
    yield "another version", f"GET /page/turns HTTP/7.7\r\n{line}"
    yield "a NUL in a header", f"GET / HTTP/1.1\r\nX: a\0b\r\n{line}"
    yield "a header without a name", f"GET / HTTP/1.1\r\n: x\r\n{line}"
    yield "a header without a colon", f"GET / HTTP/1.1\r\nnothing\r\n{line}"
    yield "a space in a header's name", f"GET / HTTP/1.1\r\nX Y: z\r\n{line}"
    yield "a folded header", f"GET / HTTP/1.1\r\nX: a\r\n b\r\n{line}"
    yield (
        "2000 headers",
        "GET / HTTP/1.1\r\n" + "".join(f"X-{n}: a\r\n" for n in range(2000)) + line,
    )
    yield "a head of 1 MB", f"GET / HTTP/1.1\r\nX: {'a' * (1 << 20)}\r\n{line}"
    yield "a target of 1 MB", f"GET /{'a' * (1 << 20)} HTTP/1.1\r\n{line}"
    yield "bytes alone", bytes(range(256)) * 8
    yield "an answer", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def _injected() -> Iterator[tuple[str, str]]:
    """Line ends in what may come back in a header of the answer or in the log."""
    for how, value in (
        ("CR LF", "a\r\nSet-Cookie: x=y\r\n\r\n<script>"),
        ("CR", "a\rSet-Cookie: x=y"),
        ("LF", "a\nSet-Cookie: x=y"),
        ("NUL", "a\0b"),
    ):
        for header in ("X-Session-Id", "Origin"):
            raw = f"{KEYED}{header}: {value}\r\n{LENGTH}\r\n{BODY}"
            yield f"{how} in {header}", raw.replace(CHAT, "/v1/nothing", 1)


def _holds(name: str, begun: bytes, connections: int, *, slow: bool) -> None:
    """Connections that begin something and do not end it: others are served meanwhile."""

    async def happens(lab: Lab) -> None:
        port = int(lab.closed.url.rpartition(":")[2])
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
        try:
            for _, writer in opened:
                writer.write(begun)
            async with asyncio.timeout(20):
                status, _, turn = await lab.chat("hello", "chat")
            assert (status, bool(turn)) == (200, True)
        finally:
            for _, writer in opened:
                writer.transport.abort()

    happens.__name__ = f"{connections}_connections_hold_{name}"
    condition(Attacker.NETWORK, slow=slow)(happens)


for _name, _begun in (
    ("nothing", b""),
    ("half_a_head", b"POST /v1/chat/completions HTTP/1.1\r\nX: "),
    ("half_a_body", f"{HEAD}Content-Length: 100000\r\n\r\n{{".encode()),
    ("half_a_chunk", f"{HEAD}Transfer-Encoding: chunked\r\n\r\nffff\r\n{{".encode()),
    ("a_request_for_a_body", f"{HEAD}Expect: 100-continue\r\n{LENGTH}\r\n".encode()),
):
    _holds(_name, _begun, 20, slow=False)
    _holds(_name, _begun, 200, slow=True)

REFUSED = (0, 400, 403, 404, 405, 408, 413, 431, 501, 505)
ATTACKS = [
    *(
        Attack(f"smuggles by {name}", Attacker.NETWORK, "", (0, 400, 413), raw=raw)
        for name, raw in _smuggled()
    ),
    *(
        Attack(f"sends {name}", Attacker.NETWORK, "", (*REFUSED, 303), raw=raw)
        for name, raw in _heads()
    ),
    *(
        Attack(f"injects {name}", Attacker.NETWORK, "", REFUSED, raw=raw, reaches=True)
        for name, raw in _injected()
    ),
]
