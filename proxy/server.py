"""The HTTP server under the proxy: aiohttp's, with vLLM's idea of HTTP, deadlines and a limit.

Every error that it answers by itself is in the API's JSON. Connections are bounded by the files
that the process may open: each may need one more to the engine. Beyond the bound the one that is
idle for longest makes room; with none idle the next request is answered with a 503.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from nextstate import file_descriptors
from proxy.answers import error_response
from proxy.requests import BodyTooSlow, RequestParser

log = logging.getLogger(__name__)

HEAD_S = 20.0
"""A head must be whole so long after its first byte, and the first head after the connection."""
BODY_S = 30.0
BODY_BYTES_PER_S = 8 * 1024
"""A body may take `BODY_S`, and longer where it comes faster than this on the average."""
LOOK_S = 1.0
_RESERVED = 128
"""Files that are not for connections: the store's, the writer's, the log, those to be refused."""
_MOST_SURPLUS = 32
"""Connections that wait to be told that there is no room; further ones are dropped."""
_TELL_S = 60.0
_SHUTDOWN_S = 10.0


@dataclass(slots=True)
class Gate:
    """The connections that are open, and how many may be."""

    files: int = field(default_factory=file_descriptors.limit)
    """How many files this process may have open."""
    fronts: set[Front] = field(default_factory=set["Front"])
    surplus: set[Front] = field(default_factory=set["Front"])
    """Those among them that get nothing but a 503."""
    refused: int = 0
    """Connections without room so far."""
    exhausted: int = 0
    """Times that no file could be opened."""
    _told_at: float | None = None

    @property
    def limit(self) -> int:
        """How many connections may be open."""
        return max(1, (self.files - min(_RESERVED, self.files // 2)) // 2)

    def admits(self, front: Front) -> bool:
        """Lets a new connection in, at the cost of an idle one if need be."""
        self.fronts.add(front)
        if len(self.fronts) - len(self.surplus) <= self.limit:
            return True
        idle = {one: one.idle_since for one in self.fronts - self.surplus - {front}}
        since = {one: at for one, at in idle.items() if at is not None}
        if since:
            min(since, key=lambda one: since[one]).force_close()
            return True
        self.refused += 1
        self.surplus.add(front)
        self._tell(f"all {self.limit} connections are busy and further ones get a 503")
        return False

    def left(self, front: Front) -> None:
        """Forgets a connection."""
        self.fronts.discard(front)
        self.surplus.discard(front)

    def ran_out(self, error: BaseException) -> None:
        """Counts a failure to open a file or a socket."""
        self.exhausted += 1
        self._tell(f"no file can be opened: {error}")

    def _tell(self, what: str) -> None:
        now = time.monotonic()
        if self._told_at is None or now > self._told_at + _TELL_S:
            self._told_at = now
            log.error("%s: raise the limit of open files (ulimit -n), now %d", what, self.files)


class Front(RequestHandler):
    """One client's connection."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop=loop, access_log=cast(Any, None))
        self._gate = server.gate
        self._requests = RequestParser(self, loop)
        self._parser = cast(Any, self._requests)
        self._clock: asyncio.TimerHandle | None = None

    @property
    def idle_since(self) -> float | None:
        """The longer ago, the smaller; None while a request is under way or comes in."""
        waits = self._waiter is not None and not self._waiter.done()
        if not waits or self._requests.begun or self.transport is None:
            return None
        return self._next_keepalive_close_time

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        admitted = self._gate.admits(self)
        if len(self._gate.surplus) > _MOST_SURPLUS:
            cast(asyncio.Transport, transport).abort()
            return
        super().connection_made(transport)
        if not admitted:
            self._request_handler = cast(Any, _no_room)
        self._watch()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._gate.left(self)
        if self._clock is not None:
            self._clock.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._requests.refusal is not None:
            super().data_received(b"")  # answered after the requests before it
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
        """The answer where no handler gives one."""
        if isinstance(exc, HttpProcessingError):
            status, text = exc.code, exc.message
            log.info("a request from %s was refused: %s", request.remote, text)
        else:
            log.error("%s %s failed", request.method, self._requests.path, exc_info=exc)
            text = "The proxy failed; its log says how."
        if request.writer.output_size > 0:
            raise ConnectionError("part of an answer is out already")
        response = error_response(self._requests.path, status, text)
        response.force_close()
        return response

    def _watch(self) -> None:
        if self._requests.since is not None and self._clock is None and self.transport is not None:
            self._clock = self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """Ends a head or a body that takes too long."""
        self._clock = None
        requests = self._requests
        if requests.since is None or self.transport is None:
            return
        if self._reading_paused or self._buffer_paused:
            requests.since += LOOK_S  # the wait is ours
        waited = self._loop.time() - requests.since
        if requests.in_head and waited > HEAD_S:
            if not requests.begun:
                self.force_close()
                return
            requests.refuse(408, f"The request's head was not whole within {HEAD_S:g} s.")
            self.data_received(b"")
        elif not requests.in_head and waited > BODY_S + requests.taken / BODY_BYTES_PER_S:
            requests.break_body(
                BodyTooSlow(f"only {requests.taken} bytes of it came within {waited:.0f} s")
            )
            self._close = True
        self._watch()


class Server(web.Server):
    """Makes a `Front` for each connection."""

    def __init__(self, made: web.Server, gate: Gate) -> None:
        super().__init__(
            made.request_handler, request_factory=made.request_factory, handler_cancellation=True
        )
        self.gate = gate

    def __call__(self) -> RequestHandler:
        return Front(self, self._loop)


class Runner(web.AppRunner):
    """Runs the proxy's application on this server."""

    def __init__(self, app: web.Application, gate: Gate) -> None:
        super().__init__(app, shutdown_timeout=_SHUTDOWN_S)
        self._gate = gate

    async def _make_server(self) -> web.Server:
        return Server(await super()._make_server(), self._gate)


async def _no_room(request: web.BaseRequest) -> web.StreamResponse:
    message = "The proxy has no room for another connection now: come back later."
    response = error_response(request.path, 503, message)
    response.force_close()
    return response
