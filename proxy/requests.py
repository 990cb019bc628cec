"""Parses HTTP requests as uvicorn, under vLLM, does, for aiohttp's server.

aiohttp's own parser refuses requests that vLLM accepts: with two User-Agents, without Host, with
more than 128 headers. This one uses the same llhttp as uvicorn, so both agree on what is HTTP, and
on what is request smuggling. It never decompresses a body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache

import httptools
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpVersion, HttpVersion10, HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from proxy.paths import known_as, of_episode

PATH_EPISODE = "x-nextstate-path-episode"
"""The header in which the episode of a request's path is handed on."""
HEAD_BYTES = 256 * 1024
"""A longer head is refused, unless one read brought it."""
MOST_HEADERS = 1024
_BUFFER_BYTES = 64 * 1024
"""Bytes of a body that nobody reads yet. With twice as many, the connection is no longer read."""
_CACHED_BYTES = 200
"""Targets up to this length are read once: most requests have the same."""
_VERSIONS = {"1.1": HttpVersion11, "1.0": HttpVersion10}
_FRAMING = ("Content-Length", "Transfer-Encoding")

Message = tuple[RawRequestMessage, StreamReader]


class BodyTooSlow(web.RequestPayloadError):
    """A body that has not come in time."""


class RequestParser:
    """The requests of one connection, with the interface of aiohttp's parser."""

    def __init__(self, protocol: BaseProtocol, loop: asyncio.AbstractEventLoop) -> None:
        self.path = "/"
        """The newest request's path, as far as it is known."""
        self.since: float | None = loop.time()
        """When the head or body that has not ended began; None between two requests."""
        self.taken = 0
        """Bytes of that body that have come."""
        self.in_head = True
        self.begun = False
        """Whether any byte of that head has come."""
        self.broken = False
        """Whether nothing further on this connection can be read."""
        self.refusal: HttpProcessingError | None = None
        """Why nothing further can be read, unless a body broke. `feed_data` raises it once."""
        self._protocol = protocol
        self._loop = loop
        self._messages: list[Message] = []
        self._payload: StreamReader | None = None
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._framed: CIMultiDict[str] = CIMultiDict()
        """The newest request's headers."""
        self._resumed = False
        """Whether llhttp reads a made-up head for the body of a request for an upgrade."""
        self._parser = self._new_parser()

    def feed_data(self, data: bytes) -> tuple[Sequence[Message], bool, bytes]:
        """(the requests whose heads are whole, False, b""). Raises HttpProcessingError."""
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            raise refusal
        if data and not self.broken:
            self._take(data)
        found, self._messages = self._messages, []
        if not found and self.refusal is not None:
            return self.feed_data(b"")
        return found, False, b""

    def refuse(self, status: int, message: str) -> None:
        """Stops reading within a head: `feed_data` raises the error next."""
        self.broken, self.since = True, None
        if self._url:
            self.path = known_as(of_episode(_parts(_text(self._url))[1])[1])
        self.refusal = HttpProcessingError(code=status, message=message)

    def break_body(self, error: web.RequestPayloadError) -> None:
        """Stops reading within a body: its reader gets the error."""
        self.broken, self.since = True, None
        payload, self._payload = self._payload, None
        if payload is not None:
            payload.set_exception(error)
            payload.feed_eof()

    def message_consumed(self) -> None:
        """Part of the interface. The requests of one read are the most that wait."""

    def pause_reading(self) -> None:
        """Part of the interface. The connection itself is not read, which is enough."""

    def _take(self, data: bytes) -> None:
        was_in_head = self.in_head and self.begun
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            if self.refusal is not None or self.broken:
                return
            if self._payload is not None:
                self.break_body(web.RequestPayloadError(str(error)))
            else:
                self.refuse(400, f"This is not a valid HTTP request: {error}.")
            return
        if was_in_head and self.in_head and self.begun:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.refuse(431, f"The request's head is longer than {HEAD_BYTES} bytes.")

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The upgrade is declined. llhttp stops before the body, and uvicorn loses it. Java's
            # client asks for h2c in its first request and goes on without it.
            rest = data[upgrade.args[0] :]
            self._parser = self._new_parser()
            if self._payload is not None:
                self._resumed = True
                framing = [
                    f"{name}: {self._framed[name]}\r\n" for name in _FRAMING if name in self._framed
                ]
                rest = b"POST / HTTP/1.1\r\n" + "".join(framing).encode() + b"\r\n" + rest
            if rest:
                self._feed(rest)

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        return parser

    # For llhttp

    def on_message_begin(self) -> None:
        if not self._resumed:
            self.since, self.in_head, self.begun = self._loop.time(), True, True
            self._url, self._headers, self._head_bytes = b"", [], 0

    def on_url(self, url: bytes) -> None:
        if not self._resumed:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._resumed or not self.in_head:  # trailers are ignored
            return
        if len(self._headers) == MOST_HEADERS:
            self.refuse(431, f"The request has more than {MOST_HEADERS} headers.")
            raise ValueError(self.refusal)
        self._headers.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        if self._resumed:
            self._resumed = False
            return
        read = _cached_target if len(self._url) <= _CACHED_BYTES else _read_target
        authority, target, written, episode = read(self._url)
        if not written.startswith("/"):
            self.refuse(400, f"The request's target {written[:100]!r} is not a path.")
            raise ValueError(self.refusal)
        headers = CIMultiDict((_text(name), _text(value)) for name, value in self._headers)
        if authority:  # the form for a proxy: both hosts are checked
            headers.add("Host", authority)
        if episode is not None:
            headers[PATH_EPISODE] = episode
        chunked = "Transfer-Encoding" in headers  # llhttp accepts no other last coding
        if chunked or int(headers.get("Content-Length", "0")):
            self._payload = StreamReader(self._protocol, _BUFFER_BYTES, loop=self._loop)
        self._framed = headers
        named = self._parser.get_http_version()
        version = _VERSIONS.get(named) or HttpVersion(*map(int, named.split(".")))
        self.path = target.path
        message = RawRequestMessage(
            method=self._parser.get_method().decode("ascii"),
            path=written,
            version=version,
            headers=CIMultiDictProxy(headers),
            raw_headers=tuple(self._headers),
            # In HTTP/1.0 a stream ends with its connection, whatever the client asked for.
            should_close=version < HttpVersion11 or not self._parser.should_keep_alive(),
            compression=None,
            upgrade=False,
            chunked=chunked,
            url=target,
        )
        self._messages.append((message, self._payload or EMPTY_PAYLOAD))
        self.in_head, self.taken, self.since = False, 0, self._loop.time()

    def on_body(self, body: bytes) -> None:
        self.taken += len(body)
        if self._payload is not None:
            self._payload.feed_data(body)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade() and self._payload is not None:
            return  # its body is still to come
        self.since, self.in_head, self.begun = None, True, False
        payload, self._payload = self._payload, None
        if payload is not None:
            payload.feed_eof()


def _parts(target: str) -> tuple[str, str, str]:
    """(host and port, path, query) of a request's target. What follows a `#` is dropped.

    >>> _parts("/v1/models?a=b#c"), _parts("http://me@host:80?a")
    (('', '/v1/models', 'a=b'), ('host:80', '/', 'a'))
    """
    path, _, query = target.partition("#")[0].partition("?")
    scheme, found, rest = path.partition("://")
    if path.startswith("/") or not found or scheme.lower() not in ("http", "https"):
        return "", path, query
    authority, _, path = rest.partition("/")
    return authority.rpartition("@")[2], f"/{path}", query


def _read_target(url: bytes) -> tuple[str, URL, str, str | None]:
    """(host and port, target, target as text, episode in its path) of a request.

    The target is without the episode. One that is not a path has no URL.
    """
    authority, path, query = _parts(_text(url))
    if not path.startswith("/"):
        return authority, URL(), path, None
    episode, path = of_episode(path)
    path = known_as(path)
    target = URL.build(path=path, query_string=query, encoded=True)
    return authority, target, f"{path}?{query}" if query else path, episode


_cached_target = lru_cache(maxsize=256)(_read_target)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
