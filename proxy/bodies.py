"""Reads a request's body, within bounds on its size and on what parsing it would create."""

from __future__ import annotations

import asyncio

from aiohttp import web

from nextstate.wire import without_escapes
from proxy.answers import Refused, error_response
from proxy.requests import BodyTooSlow

MOST_CONTAINERS = 250_000
"""Objects and arrays of one body. Each takes 60 to 300 bytes of memory and may be 3 bytes long."""
MOST_KEYS = 250_000
"""Colons of one body: a key takes two microseconds to parse, ten times as long as a value."""
MOST_VALUES = 1_000_000
"""Commas of one body: enough for the longest prompts as token ids. Fewer are read if orjson cannot
read the body (`read_json`)."""
_FEW = 100_000
"""A body of fewer bytes cannot hold enough of either."""
_MANY = 1 << 20
"""A body of more bytes is counted in a thread, so that others are served meanwhile."""


def refuse_coded(request: web.Request) -> None:
    """Raises Refused for a compressed body: it could grow a thousandfold."""
    if "Content-Encoding" not in request.headers:
        return
    for coding in ",".join(request.headers.getall("Content-Encoding", ())).split(","):
        if coding.strip().lower() not in ("", "identity"):
            raise Refused(
                415, f"Content-Encoding: {coding.strip()[:40]!r}: send the body uncompressed."
            )


async def read_body(request: web.Request, max_mb: int) -> bytes:
    """A body that may be JSON. Raises Refused if it is too large or would unfold too far."""
    data = await read_any_body(request, max_mb)
    why = await asyncio.to_thread(excess, data) if len(data) > _MANY else excess(data)
    if why is not None:
        raise Refused(400, f"The request body has {why}.")
    return data


async def read_any_body(request: web.Request, max_mb: int) -> bytes:
    """The whole body. Raises Refused if it is larger than `max_mb` MiB."""
    size = request.content_length
    if size is not None and size > max_mb << 20:
        raise too_large(max_mb)
    await _ask_for_body(request)
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large(max_mb) from None


def unreadable(request: web.Request, error: BaseException) -> web.Response:
    """The answer to a client whose body broke off or came too slowly."""
    status = 408 if isinstance(error, BodyTooSlow) else 400
    message = f"The request body cannot be read: {error}."
    response = error_response(request.path, status, message)
    response.force_close()
    return response


def too_large(max_mb: int) -> Refused:
    """The error for a body beyond the limit."""
    return Refused(413, f"The request is larger than {max_mb} MB: send less, or in parts.")


def excess(data: bytes) -> str | None:
    """Why JSON in `data` would take far more memory than it has bytes, or None.

    Brackets and commas within strings do not count. The strings are cut out only if the count with
    them exceeds a bound.
    """
    if len(data) < _FEW or not _exceeds(data):
        return None
    plain = without_escapes(data)
    if plain.count(b'"') > MOST_VALUES:
        return f"more than {MOST_VALUES // 2} strings"
    return _exceeds(b"".join(plain.split(b'"')[::2]))


def _exceeds(data: bytes) -> str | None:
    if data.count(b"[") + data.count(b"{") > MOST_CONTAINERS:
        return f"more than {MOST_CONTAINERS} objects and arrays"
    if data.count(b":") > MOST_KEYS:
        return f"more than {MOST_KEYS} keys of objects"
    if data.count(b",") > MOST_VALUES:
        return f"more than {MOST_VALUES} values"
    return None


async def _ask_for_body(request: web.Request) -> None:
    """Asks for the body if the client waits for that."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= (1, 1):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun
