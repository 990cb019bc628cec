"""The HTTP server: aiohttp's, with the parser of `proxy/requests.py`, deadlines and a limit.

Its own errors are in the API's JSON. The number of connections is limited by the files that the
process may open, because each may need another connection to the engine. Beyond the limit, the
connection that has been idle longest is closed. If none is idle, the next one gets a 503.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from nextstate import file_descriptors
from proxy.answers import RETRY_AFTER_S, error_response
from proxy.intervals import Intervals
from proxy.requests import BodyTooSlow, RequestParser

log = logging.getLogger(__name__)

BODY_BYTES_PER_S = 8 * 1024
"""A body may take longer than its time if it comes faster than this on average."""
_RESERVED = 128
"""Files that are not for connections: of the store, the writer, the log, and of refused clients."""
_MOST_SURPLUS = 32
"""Connections whose request is read before its 503. Further ones get theirs at once."""
_NO_ROOM_HEAD = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
    b"Retry-After: %d\r\nConnection: close\r\n\r\n" % RETRY_AFTER_S
)
_READ_BYTES = 256 * 1024
_LOG_AGAIN_S = 60.0
_SHUTDOWN_S = 10.0
HANDSHAKE_S = 10.0
"""How long a client may take to agree on a TLS connection."""


@dataclass(slots=True)
class Connections:
    """The connections that are open, and how many may be."""

    files: int = field(default_factory=file_descriptors.limit)
    """How many files this process may have open."""
    opened: set[Connection] = field(default_factory=set["Connection"])
    surplus: set[Connection] = field(default_factory=set["Connection"])
    """Those that get nothing but a 503."""
    refused: int = 0
    """Connections beyond the limit so far."""
    exhausted: int = 0
    """How often no file could be opened."""
    _logged_at: float | None = None

    @property
    def limit(self) -> int:
        """How many connections may be open."""
        return max(1, (self.files - min(_RESERVED, self.files // 2)) // 2)

    def admits(self, connection: Connection) -> bool:
        """Whether a new connection is served. May close an idle one for it."""
        self.opened.add(connection)
        if len(self.opened) - len(self.surplus) <= self.limit:
            return True
        idle = {one: one.idle_since for one in self.opened - self.surplus - {connection}}
        since = {one: at for one, at in idle.items() if at is not None}
        if since:
            min(since, key=lambda one: since[one]).force_close()
            return True
        self.refused += 1
        self.surplus.add(connection)
        self._log(f"all {self.limit} connections are busy and further ones get a 503")
        return False

    def left(self, connection: Connection) -> None:
        """Forgets a connection."""
        self.opened.discard(connection)
        self.surplus.discard(connection)

    def ran_out(self, error: BaseException) -> None:
        """Counts a failure to open a file or a socket."""
        self.exhausted += 1
        self._log(f"no file can be opened: {error}")

    def _log(self, what: str) -> None:
        now = time.monotonic()
        if self._logged_at is None or now > self._logged_at + _LOG_AGAIN_S:
            self._logged_at = now
            log.error("%s: raise the limit of open files (ulimit -n), now %d", what, self.files)


class Connection(RequestHandler):
    """One client's connection."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop=loop, access_log=cast(Any, None))
        self._connections = server.open_connections
        self._intervals = server.intervals
        self._requests = RequestParser(self, loop)
        self._parser = cast(Any, self._requests)
        self._clock: asyncio.TimerHandle | None = None
        self._unused = self._new_until = 0.0

    @property
    def idle_since(self) -> float | None:
        """When it became idle, to compare with others; None while a request is under way.

        The first request of a new connection may be on its way.
        """
        waits = self._waiter is not None and not self._waiter.done()
        if not waits or self._requests.begun or self.transport is None:
            return None
        if self._next_keepalive_close_time == self._unused and self._loop.time() < self._new_until:
            return None
        return self._next_keepalive_close_time

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        admitted = self._connections.admits(self)
        if len(self._connections.surplus) > _MOST_SURPLUS:
            refused = cast(asyncio.Transport, transport)
            with suppress(OSError):  # closed with a request unread, the answer might be lost
                if refused.get_extra_info("ssl_object") is None:
                    os.read(refused.get_extra_info("socket").fileno(), _READ_BYTES)
            refused.write(_NO_ROOM_HEAD + (_no_room_answer("").text or "").encode())
            refused.close()
            return
        super().connection_made(transport)
        self._unused = self._next_keepalive_close_time  # a request's end moves it on
        self._new_until = self._loop.time() + self._intervals.first_request_s
        if not admitted:
            self._request_handler = cast(Any, _no_room)
        self._watch()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.left(self)
        if self._clock is not None:
            self._clock.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._requests.refusal is not None:
            super().data_received(b"")  # it is answered after the requests before it
        if self._requests.broken:
            self._close = True
        self._watch()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer if no handler gives one."""
        if isinstance(exc, HttpProcessingError):
            status, text = exc.code, exc.message
            log.info("a request from %s was refused: %s", request.remote, text)
        else:
            log.error("%s %s failed", request.method, self._requests.path, exc_info=exc)
            text = "The proxy failed; its log says how."
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer was sent already")
        response = error_response(self._requests.path, status, text)
        response.force_close()
        return response

    def _watch(self) -> None:
        if self._requests.since is not None and self._clock is None and self.transport is not None:
            self._clock = self._loop.call_later(self._intervals.look_s, self._look)

    def _look(self) -> None:
        """Ends a head or a body that takes too long."""
        self._clock = None
        requests = self._requests
        if requests.since is None or self.transport is None:
            return
        if self._reading_paused or self._buffer_paused:
            requests.since += self._intervals.look_s  # the proxy itself does not read
        waited = self._loop.time() - requests.since
        times = self._intervals
        if requests.in_head and waited > times.head_s:
            if not requests.begun:
                self.force_close()
                return
            message = f"The request's head was not whole within {times.head_s:g} s."
            requests.refuse(408, message)
            self.data_received(b"")
        elif not requests.in_head and waited > times.body_s + requests.taken / BODY_BYTES_PER_S:
            requests.break_body(
                BodyTooSlow(f"only {requests.taken} bytes of it came within {waited:.0f} s")
            )
            self._close = True
        self._watch()


class Server(web.Server):
    """Makes a `Connection` for each connection."""

    def __init__(self, made: web.Server, connections: Connections, intervals: Intervals) -> None:
        super().__init__(
            made.request_handler, request_factory=made.request_factory, handler_cancellation=True
        )
        self.open_connections = connections
        self.intervals = intervals

    def __call__(self) -> RequestHandler:
        return Connection(self, self._loop)


class Site(web.TCPSite):
    """Listens at an address, with TLS if there is a context.

    A connection counts only once TLS is agreed on, so that has a deadline of its own.
    """

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        listening = await asyncio.get_running_loop().create_server(
            cast(Any, server),
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            reuse_port=self._reuse_port,
            ssl_handshake_timeout=None if self._ssl_context is None else HANDSHAKE_S,
        )
        self._server = listening
        self._bound_port = listening.sockets[0].getsockname()[1]


class Runner(web.AppRunner):
    """Runs an application on this server."""

    def __init__(
        self, app: web.Application, connections: Connections, intervals: Intervals
    ) -> None:
        super().__init__(app, shutdown_timeout=_SHUTDOWN_S)
        self._connections, self._intervals = connections, intervals

    async def _make_server(self) -> web.Server:
        return Server(await super()._make_server(), self._connections, self._intervals)


async def _no_room(request: web.BaseRequest) -> web.StreamResponse:
    response = _no_room_answer(request.path)
    response.force_close()
    return response


def _no_room_answer(path: str) -> web.Response:
    message = "The proxy has no room for another connection now: come back later."
    return error_response(path, 503, message)
