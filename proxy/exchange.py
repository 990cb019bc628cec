"""From a finished exchange to a recorded turn: read, linked to what it continues, and added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nextstate.errors import NextStateError
from nextstate.hooks import AgentProfile, Heard, text_of
from nextstate.recording import Recording
from nextstate.records import Json, Timings, Turn, TurnKind, new_id
from nextstate.wire import objects
from proxy.capture import Capture, sampling_settings
from proxy.linking import (
    SYSTEM,
    link_of,
    message_hashes,
    next_states,
    place_of,
    reply_keys,
    said,
)


class Exchange(NamedTuple):
    """One finished request and reply, before it is linked; a tuple, for it is pickled and read."""

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
    amends: bool = False
    """Whether it was sent before, when nobody knew yet that the client would not see the end."""
    kind: TurnKind | None = None
    """What the client says that the turn is; None where the agent's profile tells."""


def record_exchange(recording: Recording, exchange: Exchange, profile: AgentProfile) -> Turn:
    """Links one exchange, adds its turn and the next state of the turn that it continues."""
    exchange.capture.read()
    messages = objects(exchange.request.get("messages"))
    hashes = message_hashes(messages)
    profile = profile.of(exchange.request)
    kind = exchange.kind or profile.kind(exchange.request)
    named = _named(exchange, profile)
    heard = [profile.heard(message) for message in messages]
    read = [one and one.text for one in heard]
    before, in_all = said(messages, hashes, read)
    link = link_of(messages, hashes, before)
    parent = None if link is None else recording.parent(exchange.lineage, link, named)
    if parent is not None and kind is TurnKind.MAIN:
        # A heartbeat may come between a reply and what the person says to it.
        parent = recording.main_ancestor(parent)
    texts = _told(messages, heard)
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
        said_key=in_all.key(keys[0]),
        client_session=named,
        place=place if exchange.cut else None,
        message_hashes=hashes,
    )
    if tried is not None and place is not None:
        recording.replace_cut(place, turn.id)
    # A side turn replays the history of the main one: it is nobody's answer to it.
    if parent is not None and not parent.continued and kind is TurnKind.MAIN:
        states = next_states(parent.id, messages, heard)
        recording.add_next_states(parent.id, parent.kind is TurnKind.MAIN, states)
    return turn


def amend_exchange(recording: Recording, exchange: Exchange, profile: AgentProfile) -> None:
    """Lets a retry take the place of a turn that is stored: its client did not see the end."""
    profile = profile.of(exchange.request)
    kind = exchange.kind or profile.kind(exchange.request)
    parent = recording.parent_of(exchange.turn_id)
    messages = objects(exchange.request.get("messages"))
    texts = _told(messages, [profile.heard(message) for message in messages])
    place = place_of(exchange.lineage, _named(exchange, profile), kind, parent, texts)
    if place is not None:
        recording.set_place(exchange.turn_id, place)


def _told(messages: Sequence[Json], heard: Sequence[Heard | None]) -> list[str]:
    """What a request says, the system's part with it: by this a retry is known at the start."""
    read = [
        one.text
        if one
        else text_of(message.get("content"))
        if message.get("role") in SYSTEM
        else ""
        for message, one in zip(messages, heard, strict=True)
    ]
    return [text for text in read if text]


def _named(exchange: Exchange, profile: AgentProfile) -> str | None:
    """The session that the client names."""
    given = exchange.explicit_session
    return None if given is None else profile.session(given)


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
