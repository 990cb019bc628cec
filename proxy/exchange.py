"""From a finished exchange to a recorded turn: read, linked to what it continues, and added."""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple

from nextstate.hooks import AgentProfile
from nextstate.records import Json, Timings, Turn, TurnKind, new_id
from nextstate.store import Store
from nextstate.store.recording import Parts, Recording, parts_of
from nextstate.wire import objects
from proxy.capture import Capture, sampling_settings
from proxy.linking.history import (
    History,
    Keys,
    Link,
    RememberedMessages,
    Scope,
    keys_of,
    link_of,
    next_states,
    place_of,
    read_history,
)
from proxy.linking.meaning import meaning_of, stops_of
from proxy.linking.parents import Found, find_parent, main_turn, session_of
from proxy.linking.steps import environment_states, find_step, new_messages
from proxy.redacting import (
    UNSEARCHED,
    Kept,
    Known,
    is_searched,
    kept_reply,
    kept_tokens,
    without_secrets,
)

_LATE = "its episode was closed before the turn was recorded"
_HELD_OUT = "its episode's split is eval: its turns never train"


_fields_of = attrgetter(*(field.name for field in fields(Capture)))


def _pickled(capture: Capture) -> tuple[type[Capture], tuple[Any, ...]]:
    """A capture without the names of its fields, which take longer than most values."""
    return Capture, _fields_of(capture)


copyreg.pickle(Capture, _pickled)


class Exchange(NamedTuple):
    """One finished request and reply, before it is linked. A tuple, because it is pickled."""

    turn_id: str
    lineage: str
    explicit_session: str | None
    """The session that the client names."""
    request: Json
    capture: Capture
    policy_version: int | None
    """The version that the engine says it served."""
    timings: Timings
    cut: bool = False
    """True if the client did not see the end of the reply."""
    untrainable: str | None = None
    """Why the turn must not train, if that is known without its tokens."""
    amends: bool = False
    """True if it was sent before, and only now it is known that the client did not see the end."""
    vague_name: bool = False
    """True if the client's name for its session is a person's or an app's."""
    kind: TurnKind | None = None
    """The kind that the client gives; None if the agent's profile decides."""
    defaults: Json = {}  # noqa: RUF012
    """The sampling settings that the engine uses for what the request leaves out."""
    episode: str | None = None
    """The episode that it is a call of."""
    held_out: bool = False
    """True if the episode's turns never train."""
    client: str = ""
    """The key that sent it; empty: one that may do everything, or none was needed."""
    engine: str | None = None
    """The engine that answered."""


class Said(NamedTuple):
    """What of a turn does not depend on its place in the store."""

    request: Json
    reply: Json
    prompt_ids: tuple[int, ...] | None
    """These three as far as they tell no secret."""
    completion_ids: tuple[int, ...] | None
    behaviour_logprobs: tuple[float, ...] | None
    sampling: Json


class Read(NamedTuple):
    """An exchange with all that can be known of it without the store."""

    exchange: Exchange
    kind: TurnKind
    untrainable: str | None
    """Why the turn must not train; None if it may."""
    history: History
    scope: Scope
    link: Link | None
    keys: Keys
    content: Said
    parts: Parts | None = None
    """What of its turn is stored, if that was made before the store's lock."""

    @property
    def message_hashes(self) -> list[bytes]:
        """Of the request's messages."""
        return [message.hash for message in self.history.messages]


def read_exchange(
    exchange: Exchange,
    profile: AgentProfile,
    remembered: RememberedMessages | None = None,
    known: Known | None = None,
) -> Read:
    """Reads one exchange; needs no store, so that no lock is held meanwhile.

    Secrets are replaced first, in the request and in the reply. So a history is linked by what is
    kept of it, and whoever sends a secret again finds the turn that held it.
    """
    remembered = remembered or RememberedMessages()
    known = known or Known(remembered.redactor)
    capture, redactor = exchange.capture, remembered.redactor
    said = capture.message()
    profile = profile.for_request(exchange.request)
    history = read_history(objects(exchange.request.get("messages")), profile, remembered)
    request, in_prompt = without_secrets(exchange.request, known)
    if any(message.redacted for message in history.messages):
        in_prompt = True
        sent = objects(exchange.request.get("messages"))
        request["messages"] = [
            read.redacted or message for read, message in zip(history.messages, sent, strict=True)
        ]
    reply = kept_reply(said, history.messages, redactor)
    if redactor and not (is_searched(said) and all(one.searched for one in history.messages)):
        kept = Kept(None, None, None, UNSEARCHED)
    else:
        kept = kept_tokens(capture, in_prompt, said, reply, redactor)
    name = exchange.explicit_session and known.hide(exchange.explicit_session)
    scope = Scope(
        exchange.lineage,
        None if name is None else profile.session(name),
        exchange.vague_name,
        exchange.episode,
    )
    stops = stops_of(request)
    return Read(
        exchange=exchange,
        kind=exchange.kind or profile.kind(request),
        untrainable=exchange.untrainable
        or capture.untrainable(request)
        or (_HELD_OUT if exchange.held_out else kept.why),
        history=history,
        scope=scope,
        link=link_of(history, scope, stops),
        keys=keys_of(history, meaning_of(reply), scope, stops),
        content=Said(
            request=request,
            reply=reply,
            prompt_ids=kept.prompt_ids,
            completion_ids=kept.completion_ids,
            behaviour_logprobs=kept.logprobs,
            sampling=sampling_settings(request, exchange.defaults),
        ),
    )


def record_exchange(recording: Recording, exchange: Exchange, profile: AgentProfile) -> Turn:
    """Reads and records one exchange."""
    return record(recording, read_exchange(exchange, profile))


def prepared(store: Store, batch: Sequence[Read]) -> list[Read]:
    """Exchanges with the parts of their turns, for the next recording."""
    parts = store.prepare((one.content, one.message_hashes) for one in batch)
    return [one._replace(parts=own) for one, own in zip(batch, parts, strict=True)]


def look_ahead(recording: Recording, batch: Sequence[Read]) -> None:
    """Asks in few statements for most of what `record` needs of the store for each exchange."""
    sessions = recording.sessions
    if not sessions.looks_ahead:
        return
    keys = [one.link.replies[0].context_key for one in batch if one.link is not None]
    sessions.look_ahead([key for key in keys if key])
    places: list[bytes] = []
    for one in batch:
        link, parent = one.link, None
        if link is not None:
            key = link.replies[0].context_key
            if key is None or not sessions.with_context_key(key):
                continue  # its parent is not found so quickly
            parent = find_parent(sessions, link, one.scope).parent
        place = place_of(one.scope, one.kind, parent and parent.id, one.history)
        places += [] if place is None else [place]
    sessions.look_further([one.exchange.turn_id for one in batch], places)


def record(recording: Recording, read: Read) -> Turn:
    """Links an exchange, adds its turn and the next state of the turn that it continues."""
    exchange, scope, link, kind = read.exchange, read.scope, read.link, read.kind
    if scope.episode is not None:
        return _record_step(recording, read, scope.episode)
    sessions, name = recording.sessions, scope.client_session
    found = Found() if link is None else find_parent(sessions, link, scope)
    parent = found.parent
    if parent is not None and kind is TurnKind.MAIN:
        # A heartbeat may come between a reply and what the person says to it.
        parent = main_turn(sessions, parent)
    place = place_of(scope, kind, parent and parent.id, read.history)
    cut = None if place is None else sessions.cut_session(place)
    if parent is not None:
        session = parent.session
    elif cut is not None:
        session = cut
    elif name is not None:
        fresh = link is None or found.unsure or scope.is_shared_name
        session = session_of(sessions, scope, name, fresh=fresh)
    else:
        session = new_id("session")
    is_new = parent is None and cut is None and name is None
    index = 0 if is_new else sessions.next_index(session)
    turn = _turn(read, session, index, parent and parent.id)
    _add(recording, read, turn, place if exchange.cut else None)
    if cut is not None and place is not None:
        recording.replace_cut(place, turn.id)
    # A side turn repeats the history of the main turn, so it is no answer to its reply.
    if parent is not None and not parent.continued and kind is TurnKind.MAIN:
        sent = objects(read.content.request.get("messages"))
        states = next_states(parent.id, read.history, found.start, sent)
        recording.add_next_states(parent.id, parent.kind == TurnKind.MAIN, states)
    return turn


def _record_step(recording: Recording, read: Read, episode: str) -> Turn:
    """Adds a turn of an episode, and the next state of the turn that it follows."""
    exchange, scope, sessions = read.exchange, read.scope, recording.sessions
    step = find_step(sessions, read.link, scope, read.history.messages)
    parent = step.parent
    if parent is not None and read.kind is TurnKind.MAIN:
        parent = main_turn(sessions, parent)
    place = place_of(scope, read.kind, parent and parent.id, read.history)
    if read.untrainable is None and not sessions.takes_steps(episode):
        read = read._replace(untrainable=_LATE)
    cut = place is not None and sessions.cut_session(place) is not None
    turn = _turn(read, episode, sessions.next_index(episode), parent and parent.id)
    _add(recording, read, turn, place if exchange.cut else None)
    if cut and place is not None:
        recording.replace_cut(place, turn.id)
    if parent is not None and not parent.continued and read.kind is TurnKind.MAIN:
        messages = objects(read.content.request.get("messages"))
        states = environment_states(parent.id, new_messages(sessions, step, parent, messages))
        recording.add_next_states(parent.id, not exchange.held_out, states)
    return turn


def _add(recording: Recording, read: Read, turn: Turn, place: bytes | None) -> None:
    recording.add_turn(
        turn,
        read.keys.chain,
        read.keys.reply,
        context_key=read.keys.context,
        client_session=read.scope.client_session,
        place=place,
        parts=read.parts or parts_of(turn, recording.known, read.message_hashes),
        tokens=read.exchange.capture.tokens,
    )


def amend_exchange(recording: Recording, read: Read) -> None:
    """Lets a retry replace a stored turn, because its client did not see the end of the reply."""
    turn, sessions = read.exchange.turn_id, recording.sessions
    parent = sessions.parent_of(turn)
    place = place_of(read.scope, read.kind, parent and parent.id, read.history)
    if place is not None:
        sessions.set_place(turn, place)


def _turn(read: Read, session: str, index: int, parent: str | None) -> Turn:
    exchange, content = read.exchange, read.content
    return Turn(
        id=exchange.turn_id,
        session=session,
        index=index,
        kind=read.kind,
        lineage=exchange.lineage,
        policy_version=exchange.policy_version,
        client_model=str(content.request.get("model") or ""),
        request=content.request,
        reply=content.reply,
        finish_reason=exchange.capture.finish_reason,
        prompt_ids=content.prompt_ids,
        completion_ids=content.completion_ids,
        behaviour_logprobs=content.behaviour_logprobs,
        sampling=content.sampling,
        timings=exchange.timings,
        untrainable=read.untrainable,
        parent=parent,
        episode=exchange.episode,
        step=None if exchange.episode is None else index,
        client=exchange.client,
        engine=exchange.engine,
    )
