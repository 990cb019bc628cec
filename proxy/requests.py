"""HTTP requests as uvicorn, under vLLM, reads them, in the shape that aiohttp's server takes.

aiohttp's own parser refuses what vLLM takes: a User-Agent sent twice, a request without Host, more
than 128 headers. This one has the same llhttp as uvicorn below it, so the two agree on what is
HTTP, smuggling included. It never inflates a body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httptools
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpVersion, HttpVersion10, HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from proxy.paths import known_as

HEAD_BYTES = 256 * 1024
"""A longer head is refused, unless a single read brought it."""
MOST_HEADERS = 1024
_BUFFER_BYTES = 64 * 1024
"""Of a body that nobody reads yet: with twice as many the connection is not read any further."""
_VERSIONS = {"1.1": HttpVersion11, "1.0": HttpVersion10}
_FRAMING = ("Content-Length", "Transfer-Encoding")

Message = tuple[RawRequestMessage, StreamReader]


class BodyTooSlow(web.RequestPayloadError):
    """A body that has not come in time."""


class RequestParser:
    """The requests of one connection, with the interface of aiohttp's parser."""

    def __init__(self, protocol: BaseProtocol, loop: asyncio.AbstractEventLoop) -> None:
        self.path = "/"
        """Of the newest request, as far as it is known."""
        self.since: float | None = loop.time()
        """When the head or body began that has not ended; None between two requests."""
        self.taken = 0
        """Bytes of that body so far."""
        self.in_head = True
        self.begun = False
        """Whether a byte of that head has come."""
        self.broken = False
        """Whether nothing further on this connection can be read."""
        self.refusal: HttpProcessingError | None = None
        """Why, where no request's body is what is broken; raised once by `feed_data`."""
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
        """In a head made up to read the body behind one that asked for another protocol."""
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
        """Ends the reading within a head: `feed_data` raises the error next."""
        self.broken, self.since = True, None
        if self._url:
            self.path = known_as(_parts(_text(self._url))[1])
        self.refusal = HttpProcessingError(code=status, message=message)

    def break_body(self, error: web.RequestPayloadError) -> None:
        """Ends the reading within a body: whoever reads it gets the error."""
        self.broken, self.since = True, None
        payload, self._payload = self._payload, None
        if payload is not None:
            payload.set_exception(error)
            payload.feed_eof()

    def message_consumed(self) -> None:
        """Part of the interface: how many requests wait is bounded by what one read brings."""

    def pause_reading(self) -> None:
        """Part of the interface: the connection is not read, which is enough."""

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
            # Declined. llhttp stops before the body, and uvicorn loses it; Java's client asks for
            # h2c in each first request and goes on without.
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
        if self._resumed or not self.in_head:  # what follows a chunked body is nobody's
            return
        if len(self._headers) == MOST_HEADERS:
            self.refuse(431, f"The request has more than {MOST_HEADERS} headers.")
            raise ValueError(self.refusal)
        self._headers.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        if self._resumed:
            self._resumed = False
            return
        authority, path, query = _parts(_text(self._url))
        if not path.startswith("/"):
            self.refuse(400, f"The request's target {path[:100]!r} is not a path.")
            raise ValueError(self.refusal)
        headers = CIMultiDict((_text(name), _text(value)) for name, value in self._headers)
        if authority:  # a proxy's form of a request: both hosts count
            headers.add("Host", authority)
        chunked = "Transfer-Encoding" in headers  # llhttp takes no other coding at its end
        if chunked or int(headers.get("Content-Length", "0")):
            self._payload = StreamReader(self._protocol, _BUFFER_BYTES, loop=self._loop)
        self._framed = headers
        path = known_as(path)
        target = URL.build(path=path, query_string=query, encoded=True)
        named = self._parser.get_http_version()
        version = _VERSIONS.get(named) or HttpVersion(*map(int, named.split(".")))
        self.path = target.path
        message = RawRequestMessage(
            method=self._parser.get_method().decode("ascii"),
            path=f"{path}?{query}" if query else path,
            version=version,
            headers=CIMultiDictProxy(headers),
            raw_headers=tuple(self._headers),
            # In 1.0 only the end of its connection ends a stream, whatever the client asked for.
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
            return  # its body comes yet
        self.since, self.in_head, self.begun = None, True, False
        payload, self._payload = self._payload, None
        if payload is not None:
            payload.feed_eof()


def _parts(target: str) -> tuple[str, str, str]:
    """(host and port, path, query) of a request's target; what follows a `#` is nobody's.

    >>> _parts("/v1/models?a=b#c"), _parts("http://me@host:80?a")
    (('', '/v1/models', 'a=b'), ('host:80', '/', 'a'))
    """
    path, _, query = target.partition("#")[0].partition("?")
    scheme, found, rest = path.partition("://")
    if path.startswith("/") or not found or scheme.lower() not in ("http", "https"):
        return "", path, query
    authority, _, path = rest.partition("/")
    return authority.rpartition("@")[2], f"/{path}", query


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
