"""The proxy's end of recording: a bounded queue before the writer process and its group commit.

Reading, linking, hashing and writing happen in the writer (`proxy/writer.py`), in one transaction
for all exchanges that wait. A store that is slow, full or gone never fails a reply, nor does a
writer that ends: what cannot be kept is counted and logged, what was not answered for is sent to
the next writer.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import cast

from nextstate.config import StoreConfig
from proxy.exchange import Exchange
from proxy.writer import FRAME, KEPT, LOST, READY, WAITING, Feed
from proxy.writer_process import WriterProcess

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
"""Before the next writer, when the last one ended without having kept anything."""
_BYTES_A_TURN = 1 << 16
"""What an exchange that waits may take, on the average over a full queue."""
_MOST_IN_HAND_BYTES = 4 << 20
"""Sent and not answered for; one more may go beyond it. The rest would only lie in the transport a
second time."""
_DEADLY = 3
"""An exchange is lost that so many writers ended over, each with nothing else in hand."""


@dataclass(slots=True)
class RecorderCounts:
    """What became of the exchanges; shown under /metrics."""

    recorded: int = 0
    late: int = 0
    """Recorded, but after the client had seen the end of the reply."""
    lost: int = 0
    waiting: int = 0
    """Not settled yet."""
    store_waits: int = 0
    """How often the store did not take what had come: it was locked, or its disk was full."""


class _Waiting:
    """One exchange on its way into the store, and whoever waits for it."""

    __slots__ = ("done", "ended", "pickled", "sent", "turn_id")

    def __init__(self, turn_id: str, pickled: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self.turn_id = turn_id
        self.pickled = pickled
        self.sent = False
        """Whether a writer had it already, and may have kept it before it ended."""
        self.ended = 0
        """How many writers ended over it."""
        self.done: asyncio.Future[bool] = loop.create_future()
        """True: settled, as a turn or as a loss. False: it takes too long to wait for."""

    def settle(self, in_time: bool) -> None:
        if not self.done.done():
            self.done.set_result(in_time)


class Recorder:
    """Records exchanges; `run` must be running."""

    def __init__(
        self,
        writer: WriterProcess,
        store: StoreConfig,
        profile: str,
        queue_size: int,
        timeout_s: float,
        *,
        enabled: bool = True,
    ) -> None:
        self.counts = RecorderCounts()
        self._writer = writer
        self._feed = Feed(store, profile)
        self._enabled = enabled
        self._timeout_s = timeout_s
        self._queue_size = queue_size
        self._waiting: deque[_Waiting] = deque()
        """What is not settled, in the order in which it is sent."""
        self._waiting_bytes = 0
        self._channel: _Channel | None = None
        self._suspects = 0
        """How many exchanges from the oldest on are sent one by one: one may end each writer."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._opened = asyncio.Event()

    async def record(self, exchange: Exchange) -> None:
        """Returns once the turn is recorded, or after the timeout; never raises for the store.

        Cancelled, the client has left before its end: a retry will take the turn's place.
        """
        waiting = self.submit(exchange)
        if waiting is None:
            return
        loop = asyncio.get_running_loop()
        patience = loop.call_later(self._timeout_s, waiting.settle, False)
        try:
            if not await waiting.done:
                self.counts.late += 1
                log.warning(
                    "turn=%s is late: not stored in %.2f s", exchange.turn_id, self._timeout_s
                )
        except asyncio.CancelledError:
            if not (exchange.cut or self._full()):
                self.submit(exchange._replace(cut=True, amends=True))
            raise
        finally:
            patience.cancel()

    def submit(self, exchange: Exchange) -> _Waiting | None:
        """Queues without waiting; None when it is lost (the queue is full) or recording is off."""
        if not self._enabled:
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
        except Exception:  # nested too deep, for one
            self.counts.lost += 1
            log.exception("turn=%s could not be recorded", exchange.turn_id)
            return None
        waiting = _Waiting(exchange.turn_id, pickled, asyncio.get_running_loop())
        self._waiting.append(waiting)
        self._waiting_bytes += len(pickled)
        self.counts.waiting += 1
        self._idle.clear()
        self.send()
        return waiting

    async def run(self) -> None:
        """Keeps a writer at work until cancelled."""
        if not self._enabled:
            return
        loop = asyncio.get_running_loop()
        pause_s = _FIRST_PAUSE_S
        while True:
            channel = _Channel(self, loop)
            try:
                ours = self._writer.connect(self._feed)
                await loop.create_unix_connection(lambda c=channel: c, sock=ours)
            except OSError as error:
                log.error("no writer can be started, trying again in %.2f s: %s", pause_s, error)
            else:
                # Before it has opened: a writer that still starts finishes what its socket holds,
                # even if the proxy is killed meanwhile.
                self._channel = channel
                self.send()
                try:
                    await asyncio.shield(channel.ended)
                finally:
                    self._channel = None
                    channel.abort()
                    await channel.ended
                log.warning("the writer has ended; %d turns wait for the next", len(self._waiting))
                self._doubt(channel)
            if channel.settled:
                pause_s = _FIRST_PAUSE_S
                continue
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def wait_open(self, timeout_s: float) -> None:
        """Waits until the first writer takes exchanges, at most `timeout_s`."""
        if not self._enabled:
            return
        try:
            await asyncio.wait_for(self._opened.wait(), timeout_s)
        except TimeoutError:
            log.warning("no writer has opened in %.1f s: turns may be late or lost", timeout_s)

    async def drain(self, timeout_s: float) -> None:
        """Waits until everything queued is settled, at most `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            log.error("%d turns are lost: the store did not take them in time", len(self._waiting))

    def opened(self) -> None:
        """Takes in that a writer has opened."""
        self._opened.set()

    def settle(self, answer: int) -> int:
        """Takes in what became of the oldest exchange; returns how many bytes it had."""
        if answer == KEPT:
            self.counts.recorded += 1
        elif answer == LOST:
            self.counts.lost += 1
        return self._forget_oldest()

    def send(self) -> None:
        """Sends what waits, as far as the writer may have it."""
        channel = self._channel
        if channel is None or channel.closing:
            return
        allowed = 1 if self._suspects else len(self._waiting)
        for waiting in islice(self._waiting, channel.in_hand, allowed):
            if channel.in_hand_bytes >= _MOST_IN_HAND_BYTES:
                break
            channel.send(waiting.pickled, again=waiting.sent)
            waiting.sent = True

    def _full(self) -> bool:
        most_bytes = self._queue_size * _BYTES_A_TURN
        return len(self._waiting) >= self._queue_size or self._waiting_bytes >= most_bytes

    def _forget_oldest(self) -> int:
        oldest = self._waiting.popleft()
        self._waiting_bytes -= len(oldest.pickled)
        self.counts.waiting -= 1
        self._suspects = max(0, self._suspects - 1)
        if not self._waiting:
            self._idle.set()
        oldest.settle(True)
        return len(oldest.pickled)

    def _doubt(self, channel: _Channel) -> None:
        """Finds out, over several writers, whether one of the exchanges that they had ends them."""
        if not channel.opened:
            return  # it never looked at them
        if channel.settled and not self._suspects:
            return  # killed, perhaps: the next writer gets them all, one that ends it comes first
        self._suspects = channel.in_hand
        if channel.in_hand != 1:
            return
        suspect = self._waiting[0]
        suspect.ended += 1
        if suspect.ended == _DEADLY:
            self.counts.lost += 1
            log.error("turn=%s is lost: %d writers ended over it", suspect.turn_id, _DEADLY)
            self._forget_oldest()


class _Channel(asyncio.Protocol):
    """The connection to one writer."""

    def __init__(self, recorder: Recorder, loop: asyncio.AbstractEventLoop) -> None:
        self.opened = False
        """Whether the writer reads what it is sent."""
        self.settled = 0
        """How many exchanges it has answered for."""
        self.in_hand = 0
        """How many it has got and not answered for."""
        self.in_hand_bytes = 0
        self.ended: asyncio.Future[None] = loop.create_future()
        self._recorder = recorder

    @property
    def closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        for answer in data:
            if answer == READY:
                self.opened = True
                self._recorder.opened()
                continue
            if answer == WAITING:
                self._recorder.counts.store_waits += 1
                continue
            self.settled += 1
            self.in_hand -= 1
            self.in_hand_bytes -= self._recorder.settle(answer)
        self._recorder.send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(None)

    def send(self, pickled: bytes, *, again: bool) -> None:
        """Sends one exchange, once what was sent before has gone out."""
        self.in_hand += 1
        self.in_hand_bytes += len(pickled)
        self._transport.write(FRAME.pack(len(pickled), again) + pickled)

    def abort(self) -> None:
        """Ends the connection at once."""
        self._transport.abort()
