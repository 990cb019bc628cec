"""From a finished exchange to a recorded turn: read, linked to what it continues, and added."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from nextstate.hooks import AgentProfile, Utterance, text_of
from nextstate.records import Json, Timings, Turn, TurnKind, new_id
from nextstate.store.recording import Link, Recording
from nextstate.wire import objects
from proxy.capture import Capture, sampling_settings
from proxy.linking.continuation import (
    SYSTEM,
    link_of,
    message_hashes,
    next_states,
    place_of,
    reply_starts,
    said,
)
from proxy.linking.meaning import key_of, meant, meant_in


class Exchange(NamedTuple):
    """One finished request and reply, before it is linked; a tuple, for it is pickled and read."""

    turn_id: str
    lineage: str
    explicit_session: str | None
    """The session that the client names."""
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
    vague_name: bool = False
    """Whether the client's name for its session is a person's or an app's: many have the same."""
    kind: TurnKind | None = None
    """What the client says that the turn is; None where the agent's profile tells."""


class Read(NamedTuple):
    """An exchange with all that is known of it without looking into the store."""

    exchange: Exchange
    turn: Turn
    """Without its place in a session."""
    messages: list[Json]
    hashes: tuple[bytes, ...]
    utterances: list[Utterance | None]
    """What the profile reads in each of the messages."""
    named: str | None
    """The session that the client names."""
    link: Link | None
    keys: tuple[bytes, bytes]
    """The turn's own: of the chain of replies and of its reply."""
    said_key: bytes | None

    @property
    def told(self) -> list[str]:
        """What the request says, the system's part with it: so a retry is known at the start."""
        texts = [
            one.text if one else text_of(m.get("content")) if m.get("role") in SYSTEM else ""
            for m, one in zip(self.messages, self.utterances, strict=True)
        ]
        return [text for text in texts if text]


def read_exchange(exchange: Exchange, profile: AgentProfile) -> Read:
    """Reads one exchange: done before the store is locked, for it takes as long as it is large."""
    exchange.capture.read()
    messages = objects(exchange.request.get("messages"))
    hashes = message_hashes(messages)
    profile = profile.for_request(exchange.request)
    utterances = [profile.utterance(message) for message in messages]
    starts = reply_starts(messages, utterances)
    *before, in_all = said(messages, hashes, [one and one.text for one in utterances], starts)
    history = meant_in(messages)
    turn = _turn(exchange, exchange.kind or profile.kind(exchange.request))
    reply = meant(turn.reply)
    chain_key = key_of([*history, reply])
    return Read(
        exchange=exchange,
        turn=turn,
        messages=messages,
        hashes=hashes,
        utterances=utterances,
        named=_named(exchange, profile),
        link=link_of(history, hashes, starts, before),
        keys=(chain_key, key_of([reply])),
        said_key=in_all.key(chain_key),
    )


def record_exchange(
    recording: Recording, exchange: Exchange, profile: AgentProfile, read: Read | None = None
) -> Turn:
    """Links one exchange, adds its turn and the next state of the turn that it continues.

    `read` is what `read_exchange` made of it, where that was done before.
    """
    read = read or read_exchange(exchange, profile)
    lineage, named, link, kind = exchange.lineage, read.named, read.link, read.turn.kind
    parent = None
    if link is not None:
        parent = recording.parent(lineage, link, named, own_name=not exchange.vague_name)
    answered = parent and parent.at
    if parent is not None and kind is TurnKind.MAIN:
        # A heartbeat may come between a reply and what the person says to it.
        parent = recording.main_ancestor(parent)
    place = place_of(lineage, named, kind, parent and parent.id, read.told)
    tried = None if place is None else recording.cut_session(place)
    if parent is not None:
        session = parent.session
    elif tried is not None:
        session = tried
    elif named is not None:
        fresh = link is None or recording.unsure or exchange.vague_name
        session = recording.session(lineage, named, fresh=fresh)
    else:
        session = new_id("session")
    # What was just named has no turn yet.
    index = recording.next_index(session) if parent or tried or named else 0
    turn = replace(read.turn, session=session, index=index, parent=parent and parent.id)
    recording.add_turn(
        turn,
        *read.keys,
        said_key=read.said_key,
        client_session=named,
        place=place if exchange.cut else None,
        message_hashes=read.hashes,
    )
    if tried is not None and place is not None:
        recording.replace_cut(place, turn.id)
    # A side turn replays the history of the main one: it is nobody's answer to it.
    if parent is not None and not parent.continued and kind is TurnKind.MAIN:
        states = next_states(parent.id, read.messages, read.utterances, answered)
        recording.add_next_states(parent.id, parent.kind is TurnKind.MAIN, states)
    return turn


def amend_exchange(recording: Recording, read: Read) -> None:
    """Lets a retry take the place of a turn that is stored: its client did not see the end."""
    turn = read.turn
    parent = recording.parent_of(turn.id)
    place = place_of(turn.lineage, read.named, turn.kind, parent, read.told)
    if place is not None:
        recording.set_place(turn.id, place)


def _named(exchange: Exchange, profile: AgentProfile) -> str | None:
    """The session that the client names."""
    given = exchange.explicit_session
    return None if given is None else profile.session(given)


def _turn(exchange: Exchange, kind: TurnKind) -> Turn:
    capture, request = exchange.capture, exchange.request
    return Turn(
        id=exchange.turn_id,
        session="",
        index=0,
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
    )
