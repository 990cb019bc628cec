"""Whether a stored turn is surely the one that a request continues, if what was said differs.

Strangers get the same replies. An agent adds notes to what a person says and drops them again, at
the beginning or at the end. So the words of one are the other's without what stands before or
after, or around a whole sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nextstate.hooks import text_of
from nextstate.store.sessions import Candidate, Sessions
from proxy.linking.history import CLOCK, RARE_BYTES, Message, Reply
from proxy.linking.meaning import without_space

_MOST_READ = 16
"""Stored messages that are read to compare their words."""
_SENTENCE_BYTES = 16
"""Words of this size, without white space, are not within another's words by chance."""
_MOST_NOTES = 2
"""Messages that an agent may have dropped between two others."""


def before(messages: Sequence[Message], reply: Reply) -> list[Message]:
    """What stands before a reply: other replies, and what counts of users' and tools' messages."""
    said = frozenset(reply.hashes)
    return [one for one in messages[: reply.start] if one.meaning is not None or one.hash in said]


def size_of(messages: Sequence[Message]) -> int:
    """How many bytes of these messages tell them from others."""
    return sum(one.meaning.size if one.meaning else len(one.text) for one in messages)


def is_answer_to(sessions: Sessions, row: Candidate, messages: Sequence[Message]) -> bool:
    """Whether a turn with the same replies was asked what a request says before its last reply.

    The message that the reply answers and all of a person's must be the same, or one's words be the
    other's without a note. In earlier ones a clock may have gone on, and results of tools may have
    been cut.
    """
    asked = [one for one in messages if one.meaning is None]
    if not asked:
        return False
    stored = frozenset(row.message_hashes)
    changed = [one for one in asked if one.hash not in stored]
    if not changed:
        return True
    shared = frozenset(one.hash for one in asked)
    kept = _texts(sessions, [one for one in row.message_hashes if one not in shared])
    needed = [one for one in changed if one is asked[-1] or one.role == "user"]
    words = [(_text(one), one is asked[-1]) for one in needed]
    # Each search goes on where the one before it ended: both are in order, and read once.
    return all(
        any(
            _one_in_other(own, text) or (not is_last and _but_for_clock(own, text)) for text in kept
        )
        for own, is_last in words
    )


def is_rest_of(sessions: Sessions, row: Candidate, messages: Sequence[Message], size: int) -> bool:
    """Whether a turn with the same last reply was asked what is left of a history before it.

    The messages right before the reply, which has `size` bytes, must be the last ones that the turn
    was asked. Two of three must hold: they are all that is left, there are several, and they are
    long with the reply. Or people said the same to both: then only an agent's own work was dropped
    or joined.
    """
    if _all_people_said(sessions, row, messages):
        return True
    rest, same = row.message_hashes, 0
    for message in reversed(messages):
        near = rest[-1 - _MOST_NOTES :]
        if message.hash in near:
            at = len(near) - 1 - near[::-1].index(message.hash)
        elif not same and any(
            _one_in_other(_text(message), one) for one in _texts(sessions, rest[-1:])
        ):
            at = len(near) - 1
        else:
            break
        rest = rest[: len(rest) - len(near) + at]
        same += 1
        size += size_of([message])
    return bool(same) and (same == len(messages)) + (same > 1) + (size >= RARE_BYTES) >= 2


def _all_people_said(sessions: Sessions, row: Candidate, messages: Sequence[Message]) -> bool:
    """Whether these messages hold all of people's words that a turn was asked, and no others."""
    people = [one.hash for one in messages if one.role == "user"]
    stored = row.message_hashes
    if not people or not frozenset(people).issubset(stored):
        return False
    known = frozenset(one.hash for one in messages)
    others = [one for one in stored if one not in known]
    return len(others) <= _MOST_READ and not any(
        sessions.message(one).get("role") == "user" for one in others
    )


def _text(message: Message) -> bytes:
    """A request's text in the form of the stored ones."""
    return without_space(message.text.decode(errors="replace"))


def _texts(sessions: Sessions, hashes: Sequence[bytes]) -> Iterator[bytes]:
    """The texts of the last of these stored messages, without white space."""
    for one in hashes[-_MOST_READ:]:
        yield without_space(text_of(sessions.message(one).get("content")))


def _one_in_other(one: bytes, other: bytes) -> bool:
    shorter, longer = sorted((one, other), key=len)
    if longer.startswith(shorter) or longer.endswith(shorter):
        return bool(shorter)
    return len(shorter) >= _SENTENCE_BYTES and shorter in longer


def _but_for_clock(one: bytes, other: bytes) -> bool:
    words = one.translate(None, CLOCK)
    return bool(words) and words == other.translate(None, CLOCK)
