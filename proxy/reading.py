"""Back-pressure on the engine, without what aiohttp does for it after every chunk.

aiohttp 3.14 resumes a connection after each chunk that is taken from its reader, paused or not, and
each time runs its parser on nothing: a tenth of the proxy's time. It still pauses by itself.
"""

from __future__ import annotations

import aiohttp


def resume_by_hand(answer: aiohttp.ClientResponse) -> None:
    """Stops the answer's reader from resuming: `resume` has to be called after each read."""
    answer.content._low_water = 0  # pyright: ignore[reportPrivateUsage]


def resume(answer: aiohttp.ClientResponse) -> None:
    """Lets the server send on, if it was paused because more had come than the reader takes."""
    connection = answer.connection
    if connection is None or connection.protocol is None or connection.transport is None:
        return  # the end has come
    if not connection.transport.is_reading():
        connection.protocol.resume_reading()
