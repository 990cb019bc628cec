"""From finished exchanges to recorded turns: a bounded queue before a group commit.

Linking, hashing and writing happen in a worker thread, one transaction for all exchanges that wait.
A store that is slow, full or gone never fails a reply: what cannot be kept is counted and logged.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass, field

from nextstate.errors import NextStateError
from nextstate.hooks import AgentProfile
from nextstate.recording import Recording
from nextstate.records import Json, Timings, Turn, TurnKind
from nextstate.store import Store
from proxy.capture import Capture, sampling_settings
from proxy.linking import following, link_of, next_states, place_of, reply_keys

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
    cut: str | None = None
    """Why the reply did not reach its end, if it did not."""


@dataclass(slots=True)
class RecorderCounts:
    """What became of the exchanges; shown under /metrics."""

    recorded: int = 0
    late: int = 0
    """Recorded, but after the client had seen the end of the reply."""
    lost: int = 0


@dataclass(slots=True)
class _Waiting:
    exchange: Exchange
    done: asyncio.Future[bool] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


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
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(queue_size)

    async def record(self, exchange: Exchange) -> None:
        """Returns once the turn is recorded, or after the timeout; never raises for the store."""
        waiting = self.submit(exchange)
        if waiting is None:
            return
        done, _ = await asyncio.wait({waiting.done}, timeout=self._timeout_s)
        if not done:
            self.counts.late += 1

    def submit(self, exchange: Exchange) -> _Waiting | None:
        """Queues without waiting; None when the queue is full (a loss) or recording is off."""
        if not self._enabled:
            return None
        waiting = _Waiting(exchange)
        try:
            self._queue.put_nowait(waiting)
        except asyncio.QueueFull:
            self.counts.lost += 1
            log.error(
                "turn=%s is lost: %d turns wait for the store",
                exchange.turn_id,
                self._queue.qsize(),
            )
            return None
        return waiting

    async def run(self) -> None:
        """Commits what is queued, all that waits at once, until cancelled."""
        while True:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._commit(batch)
            for _ in batch:
                self._queue.task_done()

    async def drain(self, timeout_s: float) -> None:
        """Waits until everything queued is settled, at most `timeout_s`."""
        waiting = asyncio.ensure_future(self._queue.join())
        await asyncio.wait({waiting}, timeout=timeout_s)
        waiting.cancel()

    async def _commit(self, batch: list[_Waiting]) -> None:
        try:
            await asyncio.to_thread(self._write, [waiting.exchange for waiting in batch])
        except Exception:
            if len(batch) > 1:  # one bad turn must not take the others with it
                for waiting in batch:
                    await self._commit([waiting])
                return
            self.counts.lost += 1
            log.exception("turn=%s could not be recorded", batch[0].exchange.turn_id)
            self._settle(batch[0], False)
            return
        self.counts.recorded += len(batch)
        for waiting in batch:
            self._settle(waiting, True)

    def _settle(self, waiting: _Waiting, kept: bool) -> None:
        if not waiting.done.done():
            waiting.done.set_result(kept)

    def _write(self, exchanges: list[Exchange]) -> None:
        with self._store.recording() as recording:
            for exchange in exchanges:
                record_exchange(recording, exchange, self._profile)


def record_exchange(recording: Recording, exchange: Exchange, profile: AgentProfile) -> Turn:
    """Links one exchange, adds its turn and the next state of the turn that it continues."""
    messages: list[Json] = exchange.request.get("messages") or []
    kind = profile.kind(exchange.request)
    named = (
        None if exchange.explicit_session is None else profile.session(exchange.explicit_session)
    )
    link = link_of(messages)
    parent = None if link is None else recording.parent(exchange.lineage, link, named)
    if parent is not None and kind is TurnKind.MAIN:
        # A heartbeat may come between a reply and what the person says to it.
        parent = recording.main_ancestor(parent)
    texts = [text for message in messages if (text := profile.next_state_text(message))]
    place = place_of(exchange.lineage, named, kind, parent and parent.id, texts)
    if parent is not None:
        session = parent.session
    elif place is not None and (tried := recording.cut_session(place)) is not None:
        session = tried
    elif named is not None:
        session = recording.session(named, fresh=link is None)
    else:
        session = f"session_{uuid.uuid4().hex[:20]}"
    turn = _turn(exchange, kind, session, recording.next_index(session), parent and parent.id)
    keys = reply_keys(messages, turn.reply)
    if keys is None:
        raise NextStateError(f"turn {turn.id} has no assistant message")
    recording.add_turn(turn, *keys, client_session=named, place=place)
    if place is not None:
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
        untrainable=exchange.cut or capture.untrainable(request),
        parent=parent,
    )
