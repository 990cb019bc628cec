"""Clients that ask the demo's questions; each asks again when its reply has ended."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from benchmarks.client import Connection, Reply, connect
from demo.talk import MAX_TOKENS, VERSION_HEADER
from demo.tasks import Domain, task_stream

_EVENT = re.compile(rb"data: (\{.*\})\n\n")
_HEAD_END = b"\r\n\r\n"
_AFTER_FAILURE_S = 0.1
TURN_HEADER = "x-nextstate-turn"


class Broken(Exception):
    """A reply that a client cannot use, and why."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One whole reply; times are those of `time.perf_counter`."""

    version: int
    turn: str
    text: str
    started: float
    times: Sequence[float]
    """When each event arrived, up to the one with the finish reason."""
    ended: float


def read(reply: Reply) -> Answered:
    """Reads a streamed reply. Raises Broken if it has no finish reason or no version."""
    head, _, body = b"".join(reply.received).partition(_HEAD_END)
    headers = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
    text: list[str] = []
    finish = count = 0
    for found in _EVENT.finditer(body):
        event: dict[str, Any] = orjson.loads(found[1])
        count += 1
        if "error" in event:
            raise Broken(f"the stream ended with {event['error']}")
        for choice in event["choices"]:
            text.append(choice["delta"].get("content") or "")
            finish = finish or (count if choice["finish_reason"] else 0)
    if not finish:
        raise Broken(f"no finish reason in {count} events")
    if not headers.get(VERSION_HEADER, "").isdigit():
        raise Broken(f"{VERSION_HEADER} is {headers.get(VERSION_HEADER)!r}: expected a number")
    return Answered(
        version=int(headers[VERSION_HEADER]),
        turn=headers.get(TURN_HEADER, ""),
        text="".join(text),
        started=reply.started,
        times=reply.times[:finish],
        ended=reply.ended,
    )


class Clients:
    """Several clients at once, with their replies and failures."""

    def __init__(self, port: int, model: str) -> None:
        self.replies: list[Answered] = []
        self.failures: list[str] = []
        self.after: Callable[[Answered], Awaitable[None]] | None = None
        """Called after each reply, before the client asks again."""
        self._port = port
        self._model = model
        self._asked = 0
        self._came = asyncio.Event()

    @asynccontextmanager
    async def asking(self, count: int) -> AsyncGenerator[None]:
        """`count` clients ask while the block runs; replies under way at its end are still read."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                self._asked += 1
                group.create_task(self._ask(self._asked, stop))
            try:
                yield
            finally:
                stop.set()

    async def reply_by(self, version: int, since: float = 0.0) -> Answered:
        """Waits for a whole reply by the version to a request that was made after `since`."""
        seen = 0
        while True:
            for answered in self.replies[seen:]:
                if answered.version == version and answered.started >= since:
                    return answered
            seen = len(self.replies)
            self._came.clear()
            await self._came.wait()

    async def _ask(self, seed: int, stop: asyncio.Event) -> None:
        connection: Connection | None = None
        for task in task_stream(Domain.STUDENT, seed, held_out=False):
            if stop.is_set():
                break
            said = {"role": "user", "content": task.question}
            body = {"model": self._model, "messages": [said], "max_tokens": MAX_TOKENS}
            try:
                connection = connection or await connect(self._port)
                answered = read(await connection.ask(orjson.dumps({**body, "stream": True})))
            except (Broken, OSError) as error:
                self.failures.append(str(error))
                await _close(connection)
                connection = None
                await asyncio.sleep(_AFTER_FAILURE_S)
                continue
            self.replies.append(answered)
            self._came.set()
            if self.after is not None:
                await self.after(answered)
        await _close(connection)


async def _close(connection: Connection | None) -> None:
    if connection is not None:
        connection.close()
        await connection.wait_closed()
