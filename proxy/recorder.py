"""The recorder: a bounded queue of finished exchanges in front of the writer process.

The writer (`proxy/writer.py`) reads, links and commits them. A store that is slow, full or gone
never fails a reply, and neither does a writer that ends. What cannot be stored is counted and
logged. What a writer did not answer before its end is sent to the next one.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from socket import socket

from nextstate.config import StoreConfig
from proxy.exchange import Exchange
from proxy.writer import LENGTH, Answer
from proxy.writer_process import WriterProcess

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
"""Before the next writer, if the last one answered nothing."""
QUEUE_SIZE = 1024
"""Turns that may wait for a slow store. Further turns are lost and counted."""
_BYTES_PER_TURN = 1 << 16
"""Average size of the exchanges in a full queue."""
_TRANSPORT_BYTES = 4 << 20
"""Sent but not yet in the socket: the transport holds a second copy of it."""
_MAX_CRASHES = 3
"""Give up on an exchange after this many writers crashed on it."""


@dataclass(slots=True)
class RecorderCounts:
    """What became of the exchanges; shown under /metrics."""

    recorded: int = 0
    late: int = 0
    """Replies that ended before their turn was recorded."""
    lost: int = 0
    waiting: int = 0
    """Exchanges without an answer from the writer."""
    store_waits: int = 0
    """How often the writer had to wait: the store was locked, or its disk was full."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """One exchange without an answer."""

    turn_id: str
    pickled: bytes
    answered: asyncio.Future[None]
    crashes: int = 0
    """Writers that ended while this was the only exchange that they had."""


class Recorder:
    """Records exchanges while `run` runs."""

    def __init__(
        self,
        writer: WriterProcess,
        store: StoreConfig,
        profile: str,
        timeout_s: float,
        *,
        queue_size: int = QUEUE_SIZE,
        enabled: bool = True,
    ) -> None:
        self.counts = RecorderCounts()
        self._writer = writer
        self._store = store
        self._profile = profile
        self._queue_size = queue_size
        self._timeout_s = timeout_s
        self.enabled = enabled
        """`[privacy] record`."""
        self._waiting: deque[_Waiting] = deque()
        """Oldest first: the order in which they are sent and answered."""
        self._waiting_bytes = 0
        self._sent = 0
        """How many of `_waiting`, from the oldest on, the present writer has been sent."""
        self._suspects = 0
        """How many of `_waiting`, from the oldest on, are sent one at a time: an earlier writer had
        them when it ended, so one of them may have crashed it."""
        self._stream: asyncio.StreamWriter | None = None
        """To the present writer."""
        self._ready = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def record(self, exchange: Exchange) -> None:
        """Returns once the turn is recorded, or after the timeout; never raises for the store.

        If it is cancelled, the client has left without the reply's end, and will send the request
        again: the turn is marked so that the new one takes its place.
        """
        waiting = self.submit(exchange)
        if waiting is None:
            return
        try:
            done, _ = await asyncio.wait((waiting.answered,), timeout=self._timeout_s)
        except asyncio.CancelledError:
            if not (exchange.cut or self._full()):
                self.submit(exchange._replace(cut=True, amends=True))
            raise
        if not done:
            self.counts.late += 1
            log.warning("turn=%s is late: not stored in %.2f s", exchange.turn_id, self._timeout_s)

    def submit(self, exchange: Exchange) -> _Waiting | None:
        """Queues an exchange without waiting for its turn.

        None if recording is off, or the exchange is lost: the queue is full, or it cannot be
        pickled.
        """
        if not self.enabled:
            return None
        if self._full():
            self.counts.lost += 1
            log.error(
                "turn=%s is lost: %d turns with %d bytes wait for the store",
                exchange.turn_id,
                len(self._waiting),
                self._waiting_bytes,
            )
            return None
        exchange.capture.join()
        try:
            pickled = pickle.dumps(exchange, pickle.HIGHEST_PROTOCOL)
        except Exception:  # for example nested too deep
            self.counts.lost += 1
            log.exception("turn=%s could not be recorded", exchange.turn_id)
            return None
        answered = asyncio.get_running_loop().create_future()
        waiting = _Waiting(exchange.turn_id, pickled, answered)
        self._waiting.append(waiting)
        self._waiting_bytes += len(pickled)
        self.counts.waiting = len(self._waiting)
        self._idle.clear()
        if self._sent + 1 == len(self._waiting):
            # Together with what else ends now: each send wakes the writer.
            asyncio.get_running_loop().call_soon(self._send)
        return waiting

    async def run(self) -> None:
        """Keeps a writer at work until cancelled, then waits for its end."""
        pause_s = _FIRST_PAUSE_S
        try:
            while self.enabled:
                answered = 0
                try:
                    answered = await self._serve(self._writer.start(self._store, self._profile))
                except OSError as error:
                    log.error("no writer starts, trying again in %.2f s: %s", pause_s, error)
                if answered:
                    pause_s = _FIRST_PAUSE_S
                    continue
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            await asyncio.to_thread(self._writer.close)

    async def wait_ready(self, timeout_s: float) -> None:
        """Waits until the first writer runs, at most `timeout_s`."""
        if self.enabled:
            try:
                await asyncio.wait_for(self._ready.wait(), timeout_s)
            except TimeoutError:
                log.warning("no writer runs after %.1f s: turns may be late or lost", timeout_s)

    async def settled(self, timeout_s: float) -> bool:
        """Waits until all that waits now is stored or lost; False after the timeout."""
        waiting = [one.answered for one in self._waiting]
        return not waiting or not (await asyncio.wait(waiting, timeout=timeout_s))[1]

    def once_stored(self, done: Callable[[], None]) -> None:
        """Calls `done` once all that waits now is stored or lost."""
        if not self._waiting:
            done()
        else:  # the oldest are answered first
            self._waiting[-1].answered.add_done_callback(lambda _: done())

    async def drain(self, timeout_s: float) -> None:
        """Waits until the queue is empty, at most `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            log.error(
                "%d turns wait: the writer stores them once the store takes them, unless it ends; "
                "%d more are lost",
                self._sent,
                len(self._waiting) - self._sent,
            )

    async def _serve(self, connection: socket) -> int:
        """Sends to one writer until it ends. Returns how many exchanges it answered."""
        answers, self._stream = await asyncio.open_unix_connection(sock=connection)
        self._sent = answered = 0
        ready = False
        # A writer that is not ready yet gets exchanges too: it commits what is in its socket, even
        # if the proxy is killed meanwhile.
        self._send()
        try:
            with suppress(ConnectionError):
                while data := await answers.read(1 << 16):
                    for answer in data:
                        if answer == Answer.READY:
                            ready = True
                            self._ready.set()
                        elif answer == Answer.BLOCKED:
                            self.counts.store_waits += 1
                        else:
                            answered += 1
                            self._take(answer)
                    self._send()
        finally:
            self._stream.transport.abort()
            self._stream = None
        log.warning("the writer has ended; %d turns wait for the next", len(self._waiting))
        # One that was not ready has not looked at them. One that answered some was perhaps killed:
        # the next gets all at once, so that they outlive the proxy. If one of them crashes writers,
        # the next answers nothing.
        if ready and (not answered or self._suspects):
            self._suspect()
        return answered

    def _send(self) -> None:
        """Sends what the writer may have."""
        stream = self._stream
        if stream is None or stream.is_closing():
            return
        allowed = 1 if self._suspects else len(self._waiting)
        for waiting in islice(self._waiting, self._sent, allowed):
            if stream.transport.get_write_buffer_size() >= _TRANSPORT_BYTES:
                break
            stream.write(LENGTH.pack(len(waiting.pickled)) + waiting.pickled)
            self._sent += 1

    def _take(self, answer: int) -> None:
        """Takes the writer's answer to the oldest exchange."""
        if answer == Answer.KEPT:
            self.counts.recorded += 1
        elif answer == Answer.LOST:
            self.counts.lost += 1
            log.error("turn=%s is lost: it cannot be recorded", self._waiting[0].turn_id)
        self._forget_oldest()
        self._sent -= 1

    def _forget_oldest(self) -> None:
        oldest = self._waiting.popleft()
        self._waiting_bytes -= len(oldest.pickled)
        self.counts.waiting = len(self._waiting)
        self._suspects = max(0, self._suspects - 1)
        if not self._waiting:
            self._idle.set()
        oldest.answered.set_result(None)

    def _suspect(self) -> None:
        """Finds out, over several writers, which exchange crashes them, if one does."""
        self._suspects = max(self._suspects, self._sent)
        if self._sent == 1:
            oldest = self._waiting[0]
            oldest.crashes += 1
            if oldest.crashes == _MAX_CRASHES:
                self.counts.lost += 1
                log.error("turn=%s is lost: %d writers crashed on it", oldest.turn_id, _MAX_CRASHES)
                self._forget_oldest()

    def _full(self) -> bool:
        most_bytes = self._queue_size * _BYTES_PER_TURN
        return len(self._waiting) >= self._queue_size or self._waiting_bytes >= most_bytes
