"""What a call in an episode follows, and which of its messages are new.

The episode says what belongs together, not the history: agents drop malformed replies from it.
What follows a reply is the environment's word, whatever role it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from nextstate.hooks import attached, text_of
from nextstate.records import TRUST, Json, NextState, Source
from nextstate.store.sessions import Candidate, Sessions
from proxy.linking.history import Link, Message, Scope
from proxy.linking.parents import find_parent


class Step(NamedTuple):
    """Where a call stands in its episode."""

    parent: Candidate | None
    """The turn that it follows; None for the first of a conversation."""
    start: int
    """The first message that is new after that turn's reply."""


def find_step(
    sessions: Sessions, link: Link | None, scope: Scope, messages: Sequence[Message]
) -> Step:
    """What a call follows: the turn that its history ends with, else the episode's last one.

    The history does not end with that turn if another call has followed it before. Of a call that
    does not continue the last turn, what stands after all that was in that turn's request is new.
    """
    assert scope.episode is not None
    if link is not None:
        found = find_parent(sessions, link, scope)
        if found.parent is not None and not found.parent.continued and found.start is not None:
            return Step(found.parent, found.start + 1)
    last = sessions.last_step(scope.episode, scope.client_session)
    if last is None:
        return Step(None, len(messages))
    known, start = Counter(last.message_hashes), 0
    for position, message in enumerate(messages):
        if known[message.hash]:
            known[message.hash] -= 1
            start = position + 1
    if not start:  # the history was written anew: what stands after its last reply is new
        replies = [at for at, message in enumerate(messages) if message.meaning is not None]
        start = replies[-1] + 1 if replies else 0
    return Step(last, start)


def new_messages(
    sessions: Sessions, step: Step, parent: Candidate, messages: Sequence[Json]
) -> Sequence[Json]:
    """The messages of a call that are new after its parent's reply.

    An agent may send all in one text that grows: a prompt of `/v1/completions`, or a transcript as
    the last message. If such a text goes on with the reply, what follows that is new.
    """
    new = messages[step.start :]
    if len(new) != 1 or len(messages) != len(parent.message_hashes):
        return new
    before, reply = (message.get("content") for message in sessions.said(parent))
    now = new[0].get("content")
    if not (isinstance(before, str) and isinstance(reply, str) and isinstance(now, str)):
        return new
    before, reply = before.rstrip(), reply.strip()
    rest = now.removeprefix(before).lstrip()
    if not (reply and now.startswith(before) and rest.startswith(reply)):
        return new
    return [{**new[0], "content": rest.removeprefix(reply).strip()}]


def environment_states(turn: str, messages: Sequence[Json]) -> list[NextState]:
    """What an environment says in messages after the reply of `turn`."""
    states: list[NextState] = []
    for message in messages:
        if message.get("role") == "assistant":
            continue
        content = message.get("content")
        text = text_of(content)
        if not text.strip() and (shown := attached(content, Source.ENVIRONMENT)) is not None:
            text = shown.text
        if text:
            states.append(NextState(turn, Source.ENVIRONMENT, text, TRUST[Source.ENVIRONMENT]))
    return states
