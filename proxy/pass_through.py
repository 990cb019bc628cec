"""Requests that are passed on as they are, and their replies, but for a model's name in them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from string import punctuation
from types import TracebackType
from typing import Self
from urllib.parse import quote

import aiohttp
from aiohttp import web
from yarl import URL

from nextstate.error_text import safe_text
from nextstate.errors import WrongEngineError
from nextstate.file_descriptors import out_of_descriptors
from nextstate.records import PolicyVersion
from proxy.answers import Refused, error_response, is_redirect, redirected
from proxy.bodies import stream_body, unreadable
from proxy.config import ProxyConfig
from proxy.relay import ATTEMPTS, client_headers, upstream_headers
from proxy.sse import EventSplitter
from proxy.upstream import CONNECT_TIMEOUT_S, IDLE_S
from proxy.versions import Versions

log = logging.getLogger(__name__)


class Passing:
    """Passes requests on to one engine, inside `async with`. `headers` go with every request."""

    def __init__(
        self,
        config: ProxyConfig,
        versions: Versions,
        headers: Mapping[str, str],
        out_of_files: Callable[[BaseException], Refused],
    ) -> None:
        self._config = config
        self._versions = versions
        self._out_of_files = out_of_files
        self.session = _session(headers, IDLE_S)
        self._fresh = _session(headers, None)
        """Like it, on a new connection each time."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.session.close()
        await self._fresh.close()

    async def forward(
        self,
        request: web.Request,
        data: bytes | None,
        changed: Callable[[bytes], bytes] | None = None,
        version: PolicyVersion | None = None,
        refused: str | None = None,
    ) -> web.StreamResponse:
        """Passes a request and its reply on as they are, but for what `changed` does to a reply.

        `changed` gets a whole body, or each event of a stream. `version` is what the request names:
        if the engine does not know its adapter, it is brought back. `refused` is what the client
        is told if the engine does not refuse the request itself.
        """
        response: web.StreamResponse | None = None
        try:
            async with await self._answer(request, data) as upstream:
                if is_redirect(upstream.status, upstream.headers):
                    raise redirected(request.path, upstream.status)
                if refused is not None and upstream.status < 400:
                    return error_response(request.path, 400, refused)
                headers = client_headers(upstream.headers)
                response = web.StreamResponse(status=upstream.status, headers=headers)
                if changed is not None and upstream.content_type != "text/event-stream":
                    body = await upstream.read()
                    if upstream.status == 404 and version is not None:
                        unknown = str(version.adapter_name).encode() in body
                        if unknown and await self._versions.restored(version):
                            return await self.forward(request, data, changed)
                    return web.Response(status=upstream.status, body=changed(body), headers=headers)
                response.content_length = upstream.content_length
                await response.prepare(request)
                splitter = EventSplitter()
                async for chunk in upstream.content.iter_any():
                    if changed is None:
                        await response.write(chunk)
                    else:
                        await response.write(b"".join(map(changed, splitter.feed(chunk))))
                await response.write(splitter.rest)
                await response.write_eof()
                return response
        except WrongEngineError as error:
            message = f"The inference engine cannot be used: {error}."
            return error_response(request.path, 503, message)
        except (aiohttp.ClientError, TimeoutError) as error:
            if response is not None:
                return await _cut_off(request, response, error)
            if isinstance(error.__cause__, Refused):
                raise error.__cause__ from None
            if isinstance(broken := request.content.exception(), web.RequestPayloadError):
                return unreadable(request, broken)
            if out_of_descriptors(error):
                raise self._out_of_files(error) from error
            log.warning(
                "%s %s: the engine is unreachable: %s",
                request.method,
                request.path,
                safe_text(error),
            )
            message = "The inference engine is unreachable."
            return error_response(request.path, 503, message)

    async def _answer(self, request: web.Request, data: bytes | None) -> aiohttp.ClientResponse:
        """The engine's answer, once its head has come; waits for an engine that is down.

        What need not be streamed is sent once more if the connection breaks before an answer; what
        cannot be sent again does not go on a connection that may be closed already.
        """
        headers = upstream_headers(request.headers)
        if "Content-Type" in request.headers:
            headers["Content-Type"] = request.headers["Content-Type"]
        max_mb = self._config.max_body_mb
        streamed = stream_body(request, max_mb) if data is None and request.can_read_body else None
        deadline = asyncio.get_running_loop().time() + self._config.hold_s
        attempt = 0
        while True:
            if not self._versions.up:
                async with asyncio.timeout_at(deadline):
                    await self._versions.wait_admitted()
            try:
                fresh = attempt > 0 or streamed is not None
                return await (self._fresh if fresh else self.session).request(
                    request.method,
                    self._target(request),
                    data=data if streamed is None else streamed,
                    headers=headers,
                    allow_redirects=False,
                )
            except aiohttp.ClientConnectionError as error:
                attempt += 1
                if streamed is not None or out_of_descriptors(error) or attempt == ATTEMPTS:
                    raise
                if isinstance(error, aiohttp.ServerDisconnectedError) and _within_head(error):
                    raise
                if attempt > 1 and await self._versions.is_well():
                    raise

    def _target(self, request: web.Request) -> URL:
        """Where a request goes at the engine: its path as the client wrote it."""
        path = quote(str(request.rel_url), safe=punctuation, errors="surrogateescape")
        return URL(
            f"{self._versions.engine.url}{path}", encoded=True
        )  # yarl would resolve and decode it


def _session(headers: Mapping[str, str], idle_s: float | None) -> aiohttp.ClientSession:
    """A client of the engine; its connections are kept for `idle_s`, or never used again."""
    return aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=idle_s, force_close=idle_s is None
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        auto_decompress=False,
    )


def _within_head(error: aiohttp.ServerDisconnectedError) -> bool:
    """Whether a part of an answer's head came: the engine may have done what was asked."""
    return not isinstance(error.message, str)


async def _cut_off(
    request: web.Request, response: web.StreamResponse, error: BaseException
) -> web.StreamResponse:
    """Passes a cut on as a cut: the client must not take a broken answer for a whole one.

    Of one that was to be renamed as a whole nothing but the head goes out.
    """
    log.warning("%s %s: the answer was cut: %s", request.method, request.path, safe_text(error))
    if not response.prepared:
        await response.prepare(request)
    if request.transport is not None:
        request.transport.abort()
    return response
