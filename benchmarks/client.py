"""A minimal HTTP/1.1 client that notes when each event of a reply arrived.

It is cheap on purpose: client, engine and proxy share the machine's cores, and a heavy client would
hide what a proxy costs.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast

HOST = "127.0.0.1"
_LENGTH = re.compile(rb"^(?:[^\r\n]+\r\n)*?content-length: *(\d+)\r\n", re.IGNORECASE)
_END = b"\r\n0\r\n\r\n"
"""The end of a chunked body after its last chunk."""


@dataclass(slots=True)
class Reply:
    """One streamed reply; all times are those of `time.perf_counter`."""

    started: float
    times: list[float] = field(default_factory=list[float])
    """When each event arrived."""
    ended: float = 0.0
    received: list[bytes] = field(default_factory=list[bytes])
    """The received pieces: head, chunk sizes and events."""

    @property
    def first_s(self) -> float:
        """Seconds to the first event."""
        return self.times[0] - self.started

    @property
    def whole_s(self) -> float:
        """Seconds to the end of the body."""
        return self.ended - self.started


def chat_request(port: int, body: bytes) -> bytes:
    """The bytes of a chat request."""
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


class Connection(asyncio.Protocol):
    """One kept-alive connection for one reply after the other."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reply = Reply(0.0)
        self._tail = b""
        """The last received bytes, for an event that two reads split."""
        self._missing: int | None = None
        """Bytes that are missing of a body with a known length; None for a chunked body."""
        self._waiting: asyncio.Future[Reply] | None = None
        self._lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    async def ask(self, body: bytes) -> Reply:
        """Sends a chat request; returns when its reply is whole. Raises ConnectionError."""
        self._tail = b""
        self._missing = None
        self._waiting = asyncio.get_running_loop().create_future()
        request = chat_request(self._port, body)
        self._reply = Reply(perf_counter())
        self._transport.write(request)
        return await self._waiting

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self._fail(f"port {self._port} answered {data[:400].decode(errors='replace')}")
            return
        if not self._tail and (length := _LENGTH.search(data)) is not None:
            self._missing = int(length[1]) + data.index(b"\r\n\r\n") + 4
            self._reply.times.append(now)
        self._reply.received.append(data)
        if self._missing is not None:
            self._tail = data[-1:]
            self._missing -= len(data)
            if not self._missing:
                self._end(now)
            return
        events = data.count(b"\n\n")
        if self._tail.endswith(b"\n") and data.startswith(b"\n"):
            events += 1
        if events == 1:
            self._reply.times.append(now)
        elif events:
            self._reply.times.extend([now] * events)
        self._tail = (self._tail + data[-len(_END) :])[-len(_END) :]
        if self._tail == _END:
            self._end(now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set()
        self._fail(f"port {self._port} closed the connection: {exc!r}")

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    async def wait_closed(self) -> None:
        """Returns when the socket is closed."""
        await self._lost.wait()

    def _end(self, now: float) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._reply.ended = now
            self._waiting.set_result(self._reply)

    def _fail(self, why: str) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionError(why))


async def connect(port: int) -> Connection:
    """A new connection to a loopback port."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(port), HOST, port)
    return connection
