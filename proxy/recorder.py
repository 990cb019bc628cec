"""From finished exchanges to recorded turns: a bounded queue before a group commit.

Reading, linking, hashing and writing happen in one thread, in one transaction for all exchanges
that wait. A store that is slow, full or gone never fails a reply: what cannot be kept is counted
and logged.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from nextstate.errors import NextStateError
from nextstate.hooks import AgentProfile
from nextstate.recording import Link, Recording
from nextstate.records import Json, Timings, Turn, TurnKind, new_id
from nextstate.store import Store
from nextstate.wire import objects
from proxy.capture import Capture, sampling_settings
from proxy.linking import following, message_hashes, next_states, place_of, reply_keys

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One finished request and reply, before it is linked."""

    turn_id: str
    lineage: str
    explicit_session: str | None
    request: Json
    capture: Capture
    policy_version: int | None
    """The version that the engine's answer names."""
    timings: Timings
    cut: bool = False
    """Whether the client did not see the reply's end."""
    untrainable: str | None = None
    """Why the turn cannot train, where that is known without looking at its tokens."""


@dataclass(slots=True)
class RecorderCounts:
    """What became of the exchanges; shown under /metrics."""

    recorded: int = 0
    late: int = 0
    """Recorded, but after the client had seen the end of the reply."""
    lost: int = 0


class _Waiting:
    """One exchange on its way into the store, and whoever waits for it."""

    __slots__ = ("done", "exchange")

    def __init__(self, exchange: Exchange, loop: asyncio.AbstractEventLoop) -> None:
        self.exchange = exchange
        self.done: asyncio.Future[bool] = loop.create_future()
        """True: settled, as a turn or as a loss. False: it takes too long to wait for."""

    def settle(self, in_time: bool) -> None:
        if not self.done.done():
            self.done.set_result(in_time)


class Recorder:
    """Records exchanges; `run` must be running."""

    def __init__(
        self,
        store: Store,
        profile: AgentProfile,
        queue_size: int,
        timeout_s: float,
        *,
        enabled: bool = True,
    ) -> None:
        self.counts = RecorderCounts()
        self._store = store
        self._enabled = enabled
        self._profile = profile
        self._timeout_s = timeout_s
        self._queue_size = queue_size
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._waiting = 0
        """How many exchanges are queued or being written."""
        self._idle = asyncio.Event()
        self._idle.set()

    async def record(self, exchange: Exchange) -> None:
        """Returns once the turn is recorded, or after the timeout; never raises for the store."""
        waiting = self.submit(exchange)
        if waiting is None:
            return
        loop = asyncio.get_running_loop()
        patience = loop.call_later(self._timeout_s, waiting.settle, False)
        try:
            if not await waiting.done:
                self.counts.late += 1
        finally:
            patience.cancel()

    def submit(self, exchange: Exchange) -> _Waiting | None:
        """Queues without waiting; None when the queue is full (a loss) or recording is off."""
        if not self._enabled:
            return None
        if self._waiting >= self._queue_size:
            self.counts.lost += 1
            log.error(
                "turn=%s is lost: %d turns wait for the store", exchange.turn_id, self._waiting
            )
            return None
        waiting = _Waiting(exchange, asyncio.get_running_loop())
        self._waiting += 1
        self._idle.clear()
        self._queue.put(waiting)
        return waiting

    async def run(self) -> None:
        """Commits what is queued, all that waits at once, until cancelled."""
        loop = asyncio.get_running_loop()
        writer = threading.Thread(
            target=self._write_all, args=(loop,), name="recorder", daemon=True
        )
        writer.start()
        try:
            await asyncio.Event().wait()
        finally:
            self._queue.put(None)

    async def drain(self, timeout_s: float) -> None:
        """Waits until everything queued is settled, at most `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            log.error("%d turns are lost: the store did not take them in time", self._waiting)

    def _write_all(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread: takes what waits, writes it, and tells the event loop."""
        while (first := self._queue.get()) is not None:
            batch = [first]
            while len(batch) < self._queue_size:
                try:
                    following_one = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following_one is None:
                    self._queue.put(None)
                    break
                batch.append(following_one)
            kept = self._commit(batch)
            try:
                loop.call_soon_threadsafe(self._settle, batch, kept)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more

    def _commit(self, batch: Sequence[_Waiting]) -> int:
        """Writes a batch; returns how many of its turns are kept."""
        try:
            with self._store.recording() as recording:
                for waiting in batch:
                    record_exchange(recording, waiting.exchange, self._profile)
        except Exception:
            if len(batch) > 1:  # one bad turn must not take the others with it
                return sum(self._commit([waiting]) for waiting in batch)
            log.exception("turn=%s could not be recorded", batch[0].exchange.turn_id)
            return 0
        return len(batch)

    def _settle(self, batch: Sequence[_Waiting], kept: int) -> None:
        self.counts.recorded += kept
        self.counts.lost += len(batch) - kept
        self._waiting -= len(batch)
        if not self._waiting:
            self._idle.set()
        for waiting in batch:
            waiting.settle(True)


def record_exchange(recording: Recording, exchange: Exchange, profile: AgentProfile) -> Turn:
    """Links one exchange, adds its turn and the next state of the turn that it continues."""
    exchange.capture.read()
    messages = objects(exchange.request.get("messages"))
    hashes = message_hashes(messages)
    kind = profile.kind(exchange.request)
    named = (
        None if exchange.explicit_session is None else profile.session(exchange.explicit_session)
    )
    history = reply_keys(messages, None)
    link = None if history is None else Link(*history, hashes)
    parent = None if link is None else recording.parent(exchange.lineage, link, named)
    if parent is not None and kind is TurnKind.MAIN:
        # A heartbeat may come between a reply and what the person says to it.
        parent = recording.main_ancestor(parent)
    texts = [text for message in messages if (text := profile.next_state_text(message))]
    place = place_of(exchange.lineage, named, kind, parent and parent.id, texts)
    tried = None if place is None else recording.cut_session(place)
    if parent is not None:
        session = parent.session
    elif tried is not None:
        session = tried
    elif named is not None:
        session = recording.session(exchange.lineage, named, fresh=link is None)
    else:
        session = new_id("session")
    # What was just named has no turn yet.
    index = recording.next_index(session) if parent or tried or named else 0
    turn = _turn(exchange, kind, session, index, parent and parent.id)
    keys = reply_keys(messages, turn.reply)
    if keys is None:
        raise NextStateError(f"turn {turn.id} has no assistant message")
    recording.add_turn(
        turn,
        *keys,
        client_session=named,
        place=place if exchange.cut else None,
        message_hashes=hashes,
    )
    if tried is not None and place is not None:
        recording.replace_cut(place, turn.id)
    # A side turn replays the history of the main one: it is nobody's answer to it.
    if parent is not None and not parent.continued and kind is TurnKind.MAIN:
        states = next_states(parent.id, following(messages), profile)
        recording.add_next_states(parent.id, parent.kind is TurnKind.MAIN, states)
    return turn


def _turn(exchange: Exchange, kind: TurnKind, session: str, index: int, parent: str | None) -> Turn:
    capture, request = exchange.capture, exchange.request
    return Turn(
        id=exchange.turn_id,
        session=session,
        index=index,
        kind=kind,
        lineage=exchange.lineage,
        policy_version=exchange.policy_version,
        client_model=str(request.get("model") or ""),
        request=request,
        reply=capture.message(),
        finish_reason=capture.finish_reason,
        prompt_ids=None if capture.prompt_ids is None else tuple(capture.prompt_ids),
        completion_ids=tuple(capture.completion_ids) or None,
        behaviour_logprobs=capture.behaviour_logprobs(),
        sampling=sampling_settings(request),
        timings=exchange.timings,
        untrainable=exchange.untrainable or capture.untrainable(request),
        parent=parent,
    )
