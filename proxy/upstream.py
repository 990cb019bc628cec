"""The engine's side of a relayed request: HTTP/1.1 over connections that are kept open.

A request has a whole body, and its answer is given out as it comes. llhttp parses it. All that one
read brings reaches the relay as one piece, however many HTTP chunks it was.
"""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from typing import Self, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from nextstate.error_text import safe_text
from nextstate.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
IDLE_S = 4.0
"""uvicorn, under vLLM, closes connections that are idle for 5 s."""
_UNREAD_BYTES = 128 * 1024
"""With more than this unread, the engine's connection is not read any further."""
_HEAD_BYTES = 64 * 1024
_WITHOUT_BODY = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "CONNECT"))


class NotHttp(Exception):
    """The answer is not HTTP/1.1."""


class HeadCut(ConnectionResetError):
    """The engine broke off within the head of its answer, so it may have done what was asked."""


class Cut(Exception):
    """The engine broke off its answer."""


class Upstream:
    """Sends requests to one server, each on a connection of its own while it runs.

    `headers` go with every request. A user in the URL becomes the authorization, unless `headers`
    have one. Connections are not limited. The free one that was used last is taken first, and one
    that was free for `idle_s` is closed. Raises ConfigError for an invalid URL.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        connect_s: float = CONNECT_TIMEOUT_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self._connect_s, self._idle_s = connect_s, idle_s
        try:
            base = URL(url)
        except ValueError as error:
            raise ConfigError(f"[engine] url = {url!r}: {error}") from error
        if base.scheme not in ("http", "https") or not base.host or base.port is None:
            raise ConfigError(f"[engine] url = {url!r}: expected http://HOST:PORT or https://HOST")
        self._host, self._port = base.host, base.port
        self._ssl = ssl.create_default_context() if base.scheme == "https" else None
        self._base = base.raw_path.rstrip("/")
        sent = {"Host": base.host_port_subcomponent or "", **headers}
        if base.user is not None:
            login = b64encode(f"{base.user}:{base.password or ''}".encode()).decode()
            sent.setdefault("Authorization", f"Basic {login}")
        self._headers = [*sent.items()]
        self._connections: set[_Connection] = set()
        self._free: list[_Connection] = []
        """In the order in which they became free."""
        self._cleaning: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._cleaning is not None:
            self._cleaning.cancel()
        for connection in list(self._connections):
            connection.abort()

    async def ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        fresh: bool = False,
    ) -> Answer:
        """The answer, once its head has come. `target` is a path with its query.

        `fresh` takes a new connection: one that was kept may be closed already at the other end.
        Raises OSError if the server cannot be reached or closes before it answers, NotHttp if the
        answer is not HTTP, ValueError for a line break in `target` or a header.
        """
        lines = [f"{name}: {value}\r\n" for name, value in self._headers if name not in headers]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        if body or method not in _WITHOUT_BODY:
            lines.append(f"Content-Length: {len(body)}\r\n")
        head = f"{method} {self._base}{target} HTTP/1.1\r\n{''.join(lines)}\r\n"
        if not head.count("\r") == head.count("\n") == len(lines) + 2:
            raise ValueError(f"a line break in {target!r} or one of the headers {[*headers]}")
        connection = (None if fresh else self._unused()) or await self._connected()
        try:
            sent = head.encode("utf-8", "surrogateescape") + body
            return await connection.ask(sent, head_only=method == "HEAD")
        except BaseException:
            connection.abort()
            raise

    def _unused(self) -> _Connection | None:
        while self._free:
            connection = self._free.pop()
            if not connection.closing:
                return connection
        return None

    async def _connected(self) -> _Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._connect_s):
            _, connection = await loop.create_connection(
                lambda: _Connection(self, loop), self._host, self._port, ssl=self._ssl
            )
        return connection

    def drop_unanswered(self) -> None:
        """Breaks the connections that wait for an answer of which no byte has come."""
        for connection in [one for one in self._connections if one.waits]:
            connection.abort()

    def opened(self, connection: _Connection) -> None:
        """Adds a new connection."""
        self._connections.add(connection)

    def lost(self, connection: _Connection) -> None:
        """Removes a connection that is closed."""
        self._connections.discard(connection)
        if connection in self._free:
            self._free.remove(connection)

    def freed(self, connection: _Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Keeps a connection for the next request."""
        connection.freed_at = loop.time()
        self._free.append(connection)
        if self._cleaning is None:
            self._cleaning = loop.call_later(self._idle_s, self._clean, loop)

    def _clean(self, loop: asyncio.AbstractEventLoop) -> None:
        self._cleaning = None
        while self._free and self._free[0].freed_at <= loop.time() - self._idle_s:
            self._free.pop(0).abort()
        if self._free:
            self._cleaning = loop.call_at(self._free[0].freed_at + self._idle_s, self._clean, loop)


class Answer:
    """One answer: its head, and its body as it comes. Read it to the end or close it."""

    __slots__ = ("_connection", "_peeked", "headers", "status")

    def __init__(
        self, status: int, headers: CIMultiDictProxy[str], connection: _Connection
    ) -> None:
        self.status = status
        self.headers = headers
        self._connection: _Connection | None = connection
        self._peeked = b""
        """Bytes of the body that `peek` has taken and `read` has not given out."""

    @property
    def content_length(self) -> int | None:
        """The length of the body that the head names, in bytes."""
        length = self.headers.get("Content-Length")
        return None if length is None else int(length)

    async def peek(self) -> bytes:
        """The body as far as it comes, for `read` to give out again."""
        with suppress(Cut):  # `read` raises it again
            while data := await self._read():
                self._peeked += data
        return self._peeked

    async def read(self) -> bytes:
        """What has come since the last call: at least one byte, or b"" at the end. Raises Cut."""
        if self._peeked:
            data, self._peeked = self._peeked, b""
            return data
        return await self._read()

    async def _read(self) -> bytes:
        connection = self._connection
        if connection is None:
            return b""
        while not connection.parts and not connection.over:
            await connection.more()
        if data := connection.take():
            return data
        if connection.error is not None:
            raise connection.error
        self._connection = None
        connection.free()
        return b""

    def close(self) -> None:
        """Ends the connection if the body was not read to its end."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None


class _Connection(asyncio.Protocol):
    """One connection, with at most one request at a time."""

    def __init__(self, upstream: Upstream, loop: asyncio.AbstractEventLoop) -> None:
        self.parts: list[bytes] = []
        """The parts of the body that were not read."""
        self.over = True
        """Whether nothing more is to come: the answer is whole or broken, or nothing was asked."""
        self.error: Exception | None = None
        """Why the answer broke."""
        self.freed_at = 0.0
        self._upstream = upstream
        self._loop = loop
        self._answer: Answer | None = None
        self._fields: list[tuple[str, str]] = []
        self._unread = 0
        """Bytes that came since the parts were taken, or since the request if there is no head."""
        self._paused = False
        self._reusable = False
        self._head_only = False
        self._waiter: asyncio.Future[None] | None = None
        self.on_body = self.parts.append
        self._parser = HttpResponseParser(self)

    # Called by the relay

    async def ask(self, request: bytes, *, head_only: bool) -> Answer:
        """Sends a request; see `Upstream.ask`. The answer to HEAD has a head and no body."""
        if self.closing:
            raise ConnectionResetError("the engine closed the connection at once")
        self.over, self._reusable = False, False
        self._answer = None
        self._head_only = head_only
        self._unread = 0
        self._transport.write(request)
        while self._answer is None:
            if self.error is not None:
                raise self.error
            await self.more()
        return self._answer

    def more(self) -> asyncio.Future[None]:
        """A future that is done after the next read, or when the connection is lost."""
        self._waiter = self._loop.create_future()
        return self._waiter

    def take(self) -> bytes:
        """The parts of the body that were not read, as one."""
        data = b"".join(self.parts)
        self.parts.clear()
        self._unread = 0
        if self._paused and not self.closing:
            self._paused = False
            self._transport.resume_reading()
        return data

    def free(self) -> None:
        """Ends a request whose answer has been read to its end."""
        if self._reusable and not self.closing and not self._transport.get_write_buffer_size():
            self._upstream.freed(self, self._loop)
        else:
            self.abort()

    def abort(self) -> None:
        """Ends the connection at once."""
        self._transport.abort()

    @property
    def closing(self) -> bool:
        """Whether it can no longer be used."""
        return self._transport.is_closing()

    @property
    def waits(self) -> bool:
        """Whether a request was sent and no byte of its answer has come."""
        return not self.over and self._answer is None and not self._unread

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._upstream.opened(self)

    def data_received(self, data: bytes) -> None:
        if self.over:  # no request was sent
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            kind = NotHttp if self._answer is None else Cut
            self._end(kind(f"the engine's answer is broken: {safe_text(error)}"))
            self._reusable = False
        self._unread += len(data)
        if self._answer is None and self._unread > _HEAD_BYTES:
            self._end(NotHttp(f"the head of the engine's answer exceeds {_HEAD_BYTES} bytes"))
        elif self._unread > _UNREAD_BYTES and not self._paused and not self.closing:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.lost(self)
        if self._answer is None:
            kind = HeadCut if self._unread else ConnectionResetError
            error = kind("the engine closed the connection before it answered")
            error.__cause__ = exc
            self._end(error)
        elif exc is None and _until_closed(self._answer.headers):
            self._end(None)
        else:
            self._end(Cut(f"the engine closed the connection within its answer: {exc!r}"))
        self._wake()

    def _end(self, error: Exception | None) -> None:
        if not self.over:
            self.over, self.error = True, error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Called by llhttp

    def on_message_begin(self) -> None:
        if self.over:
            raise ValueError("more than one answer")
        self._fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        text = value.decode("utf-8", "surrogateescape")
        self._fields.append((name.decode("utf-8", "surrogateescape"), text))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            headers = CIMultiDictProxy(CIMultiDict(self._fields))
            self._answer = Answer(status, headers, self)
            if self._head_only:  # llhttp would wait for a body: the connection is not used again
                self._end(None)

    def on_message_complete(self) -> None:
        if self._answer is not None:  # not after an interim answer
            self._reusable = self._parser.should_keep_alive()
            self._end(None)


def _until_closed(headers: CIMultiDictProxy[str]) -> bool:
    """Whether a body with these headers ends where its connection does."""
    framing = headers.getall("Transfer-Encoding", [""])[-1]
    return "Content-Length" not in headers and not framing.lower().endswith("chunked")
