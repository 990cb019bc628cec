"""A server that says what a test wants, and a client of the engine for it."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from proxy.upstream import Answer, Upstream

Serve = Callable[["Talk"], Awaitable[None]]


class Talk:
    """One connection, as the server sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.requests: list[tuple[bytes, bytes]] = []
        """Head and body of each."""
        self.ended = asyncio.Event()
        """The client has closed it."""

    async def request(self) -> bool:
        """Takes one request; False at the end of the connection."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self.requests.append((head, await self.reader.readexactly(int(length or 0))))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.ended.set()
            return False
        return True

    async def say(self, *pieces: bytes) -> None:
        """Sends pieces, each in a turn of the loop that leaves the client time to read it."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            for _ in range(3):
                await asyncio.sleep(0)

    def reset(self) -> None:
        """Ends the connection as a crash would."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


@asynccontextmanager
async def server(
    serve: Serve,
    tls: ssl.SSLContext | None = None,
    user: str = "",
    base: str = "",
    **times: float,
) -> AsyncGenerator[tuple[Upstream, list[Talk]]]:
    """A server that serves every connection with `serve`, and a client for it."""
    talks: list[Talk] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.append(talk := Talk(reader, writer))
        try:
            await serve(talk)
        except ConnectionError:
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    port = listening.sockets[0].getsockname()[1]
    scheme = "http" if tls is None else "https"
    try:
        url = f"{scheme}://{user}127.0.0.1:{port}{base}"
        async with Upstream(url, {"X-Fixed": "1"}, **times) as upstream:
            yield upstream, talks
    finally:
        listening.close()


def saying(*pieces: bytes, keep: bool = True) -> Serve:
    """Answers every request with the pieces; closes after the first unless `keep`."""

    async def serve(talk: Talk) -> None:
        while await talk.request():
            await talk.say(*pieces)
            if not keep:
                return

    return serve


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(test)


async def whole(answer: Answer) -> bytes:
    """The body, read to its end."""
    parts: list[bytes] = []
    while part := await answer.read():
        parts.append(part)
    return b"".join(parts)


async def ask(upstream: Upstream, body: bytes = b"{}") -> bytes:
    """The body of one answer."""
    return await whole(await upstream.ask("POST", "/", {}, body))


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


OK = b"HTTP/1.1 200 OK\r\n"
SIZED = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
