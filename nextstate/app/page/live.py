"""Pages that update themselves: a stream says that something changed, and the page loads its part.

A stream carries no content, so it costs the same for any page. All streams of a process share one
look at the store every `LOOK_S`, which ends with the last of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

from aiohttp import web

from nextstate.app.child_states import read_child_states
from nextstate.errors import NextStateError
from nextstate.records import Json
from nextstate.store import Store
from proxy.answers import Refused

log = logging.getLogger(__name__)

MOST_STREAMS = 16
"""Of one process; a page without one is loaded again by hand."""
LOOK_S = 2.0
"""The shortest time between two messages of a stream."""
_KEEP_ALIVE_S = 15.0
_LASTS_S = 600.0
"""A stream ends then and the browser asks for another one: a login may have ended."""
_CHANGED, _STILL_HERE = b"event: changed\ndata: \n\n", b": still here\n\n"


def watched(store: Store, health: Callable[[], Json]) -> object:
    """A value that differs when there is something new to show."""
    return store.lookup.pulse(), health(), read_child_states(store.dir)


class Streams:
    """The open streams of one process."""

    def __init__(self, look: Callable[[], object], look_s: float = LOOK_S) -> None:
        """`look` is called in a thread."""
        self._look = look
        self._look_s = look_s
        self._bells: set[asyncio.Event] = set()
        """One for each stream; it rings when something changed."""
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    async def stream(self, request: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
        """Answers with server-sent events. Raises Refused if there are too many streams."""
        if len(self._bells) >= MOST_STREAMS or self._closed:
            raise Refused(503, f"{MOST_STREAMS} pages update themselves already.")
        bell = asyncio.Event()
        bell.set()  # what was shown may be older than the stream
        self._bells.add(bell)
        if self._watch is None or self._watch.done():
            bell.clear()  # its first look rings
            self._watch = asyncio.create_task(self._run())
        try:
            response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream"})
            await response.prepare(request)
            end = asyncio.get_running_loop().time() + _LASTS_S
            while not self._closed and asyncio.get_running_loop().time() < end:
                with suppress(TimeoutError):
                    await asyncio.wait_for(bell.wait(), _KEEP_ALIVE_S)
                message = _CHANGED if bell.is_set() else _STILL_HERE
                bell.clear()  # before the message: it may ring again while that is sent
                if not self._closed:
                    await response.write(message)
        finally:
            self._bells.discard(bell)
        return response

    async def close(self) -> None:
        """Ends every stream."""
        self._closed = True
        for bell in self._bells:
            bell.set()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _run(self) -> None:
        """Rings the bells at the first look and at each change, as long as there is one."""
        seen: object = None
        while self._bells:
            found = await self._seen()
            if found is not None and found != seen:
                seen = found
                for bell in self._bells:
                    bell.set()
            await asyncio.sleep(self._look_s)

    async def _seen(self) -> object:
        try:
            return await asyncio.to_thread(self._look)
        except (NextStateError, OSError) as error:
            log.warning("pages do not update themselves for now: %s", error)
            return None
