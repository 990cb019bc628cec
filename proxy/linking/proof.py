"""Whether a stored turn is surely the one that a request continues, if what was said differs.

Strangers get the same replies. An agent adds notes to what a person says and drops them again, at
the beginning or at the end. So the words of one are the other's without what stands before or
after, or around a whole sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nextstate.hooks import text_of
from nextstate.store.sessions import Candidate, Sessions
from nextstate.wire import read_json
from proxy.linking.history import CLOCK, RARE_BYTES, Message, Reply
from proxy.linking.meaning import without_space

_MOST_READ = 16
"""Stored messages that are read to compare their words with those of one candidate."""
_MOST_READ_BYTES = 16 << 20
"""Of all that one decision compares, because the store is locked meanwhile; what does not fit is no
proof. A message counts once. Texts count more than pictures, for the time that each takes."""
_MESSAGE_BYTES, _UNREAD_BYTES, _TEXT_BYTES = 1 << 12, 1 << 20, 8
"""What counts for a message besides its size, for one that did not fit, and for a text's byte."""
_SENTENCE_BYTES = 16
"""Words of this size, without white space, are not within another's words by chance."""
_MOST_NOTES = 2
"""Messages that an agent may have dropped between two others."""


class Compared:
    """The messages that one decision compares: what was read once is known."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._left = _MOST_READ_BYTES
        self._stored: dict[bytes, tuple[object, bytes] | None] = {}
        self._own: dict[bytes, bytes | None] = {}

    def stored(self, key: bytes) -> tuple[object, bytes] | None:
        """(role, text without white space) of a stored message; None if it is too much."""
        if key not in self._stored:
            self._stored[key] = self._read(key) if self._spent(_MESSAGE_BYTES) else None
        return self._stored[key]

    def own(self, message: Message) -> bytes | None:
        """The text of a request's message in the same form; None if it is too much."""
        if message.hash not in self._own:
            self._own[message.hash] = self._text(message.text.decode(errors="replace"))
        return self._own[message.hash]

    def texts(self, hashes: Sequence[bytes]) -> Iterator[bytes]:
        """The texts of the last of these stored messages, as far as they can be read."""
        found = map(self.stored, hashes[-_MOST_READ:])
        return (one[1] for one in found if one is not None)

    def _read(self, key: bytes) -> tuple[object, bytes] | None:
        written = self._sessions.written(key, self._left)
        if not self._spent(_UNREAD_BYTES if written is None else len(written)) or written is None:
            return None
        message = read_json(written)
        text = self._text(text_of(message.get("content")))
        return None if text is None else (message.get("role"), text)

    def _text(self, text: str) -> bytes | None:
        return without_space(text) if self._spent(_TEXT_BYTES * len(text)) else None

    def _spent(self, size: int) -> bool:
        """Counts so many bytes; False if they are too many."""
        self._left = max(self._left - size, 0)
        return self._left > 0


def before(messages: Sequence[Message], reply: Reply) -> list[Message]:
    """What stands before a reply: other replies, and what counts of users' and tools' messages."""
    said = frozenset(reply.hashes)
    return [one for one in messages[: reply.start] if one.meaning is not None or one.hash in said]


def size_of(messages: Sequence[Message]) -> int:
    """How many bytes of these messages tell them from others."""
    return sum(one.meaning.size if one.meaning else len(one.text) for one in messages)


def is_answer_to(compared: Compared, row: Candidate, messages: Sequence[Message]) -> bool:
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
    kept = compared.texts([one for one in row.message_hashes if one not in shared])
    needed = [one for one in changed if one is asked[-1] or one.role == "user"]
    words = [(compared.own(one), one is asked[-1]) for one in needed]
    # Each search goes on where the one before it ended: both are in order, and read once.
    return all(
        own is not None
        and any(
            _one_in_other(own, text) or (not is_last and _but_for_clock(own, text)) for text in kept
        )
        for own, is_last in words
    )


def is_rest_of(compared: Compared, row: Candidate, messages: Sequence[Message], size: int) -> bool:
    """Whether a turn with the same last reply was asked what is left of a history before it.

    The messages right before the reply, which has `size` bytes, must be the last ones that the turn
    was asked. Two of three must hold: they are all that is left, there are several, and they are
    long with the reply. Or people said the same to both: then only an agent's own work was dropped
    or joined.
    """
    if _all_people_said(compared, row, messages):
        return True
    rest, same = row.message_hashes, 0
    for message in reversed(messages):
        near = rest[-1 - _MOST_NOTES :]
        if message.hash in near:
            at = len(near) - 1 - near[::-1].index(message.hash)
        elif not same and any(
            own is not None and _one_in_other(own, one)
            for one in compared.texts(rest[-1:])
            for own in (compared.own(message),)
        ):
            at = len(near) - 1
        else:
            break
        rest = rest[: len(rest) - len(near) + at]
        same += 1
        size += size_of([message])
    return bool(same) and (same == len(messages)) + (same > 1) + (size >= RARE_BYTES) >= 2


def _all_people_said(compared: Compared, row: Candidate, messages: Sequence[Message]) -> bool:
    """Whether these messages hold all of people's words that a turn was asked, and no others."""
    people = [one.hash for one in messages if one.role == "user"]
    stored = row.message_hashes
    if not people or not frozenset(people).issubset(stored):
        return False
    known = frozenset(one.hash for one in messages)
    others = [one for one in stored if one not in known]
    return len(others) <= _MOST_READ and all(
        read is not None and read[0] != "user" for read in map(compared.stored, others)
    )


def _one_in_other(one: bytes, other: bytes) -> bool:
    shorter, longer = sorted((one, other), key=len)
    if longer.startswith(shorter) or longer.endswith(shorter):
        return bool(shorter)
    return len(shorter) >= _SENTENCE_BYTES and shorter in longer


def _but_for_clock(one: bytes, other: bytes) -> bool:
    words = one.translate(None, CLOCK)
    return bool(words) and words == other.translate(None, CLOCK)
