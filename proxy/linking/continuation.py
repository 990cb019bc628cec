"""Which turn a request continues, and what it says about that turn.

What the assistant messages mean is compared (`proxy/linking/meaning.py`): agents stamp, merge and
drop what users wrote, but send the model's replies back. What users and tools said tells
conversations with the same replies apart.
"""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import orjson

from nextstate.hooks import AgentProfile, Utterance, attached, text_of
from nextstate.records import TRUST, Json, NextState, Source, TurnKind
from nextstate.store.recording import EXACT_BYTES, SETTING_BYTES, Link
from nextstate.store.rows import HASH_BYTES, content_hash
from nextstate.wire import obj, write_json
from proxy.linking.meaning import Meant, key_of, meant_in
from proxy.linking.meaning import canonical_reply as canonical_reply

TURN_TYPE = "x-turn-type"
_KINDS = {kind.value: kind for kind in TurnKind}
_SESSION_HEADERS = ("x-session-id", "x-session-affinity")
_LONGEST_NAME = 200
SYSTEM = ("system", "developer")
_TOOLS = ("tool", "function")
_WHITE_SPACE = string.whitespace.encode()
_CLOCK = f"{string.whitespace}{string.digits}:.,/-+".encode()
"""What a time is made of."""
_TELLING = 180
"""Bytes from which on hardly anybody else gets the same reply; most canned greetings and refusals,
and a first tool call, are shorter."""
_MOST_PARTS = 32
"""Messages that one reply is looked for in."""
_LONG_PROMPT, _SAID_TOO_OFTEN = 80, 3
"""Who says a text of so many characters so often, to the letter, is a program."""


def explicit_session(headers: Mapping[str, str], request: Json) -> str | None:
    """The session id that the client names, by header or by field, or None."""
    for value, _ in _names(headers, request):
        return _kept_name(value)
    return None


def names_conversation(headers: Mapping[str, str], request: Json) -> bool:
    """Whether that id is a conversation's; False if it is a person's or an app's, or there is none.

    What clients give as `prompt_cache_key`, `user` or `user_id` is often the same for all they do.
    """
    return next((own for _, own in _names(headers, request)), False)


def _names(headers: Mapping[str, str], request: Json) -> Iterator[tuple[str, bool]]:
    """(a name that the client gives, whether it is a conversation's), what counts most first."""
    metadata = obj(request.get("metadata"))
    names = [(headers.get(name), True) for name in _SESSION_HEADERS]
    names += [(request.get("prompt_cache_key"), False), (request.get("session_id"), True)]
    names += [(metadata.get("session_id"), True), (request.get("user"), False)]
    names.append((metadata.get("user_id"), False))
    return ((name, own) for name, own in names if isinstance(name, str) and name)


def named_kind(headers: Mapping[str, str]) -> TurnKind | None:
    """What the client says that the turn is, in `X-Turn-Type`; None where it says nothing known."""
    return _KINDS.get(headers.get(TURN_TYPE, "").strip().lower())


def session_names(name: str, profile: AgentProfile) -> list[str]:
    """The names that the store may have for a session that somebody calls `name`."""
    kept = _kept_name(name)
    return [kept, profile.session(kept)]


def _kept_name(name: str) -> str:
    # A header may hold any bytes; the store holds text, of a bounded length.
    if len(name) > _LONGEST_NAME:
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16).hexdigest()
        name = f"{name[: _LONGEST_NAME - len(digest) - 1]}-{digest}"
    return name.encode(errors="replace").decode()


def reply_keys(history: Sequence[Json], reply: Json | None) -> tuple[bytes, bytes] | None:
    """(chain key, reply key) of the assistant messages in `history`, with `reply` after them.

    The chain key is that of all of them, the reply key that of the last alone. None if there is no
    assistant message at all.
    """
    chain = meant_in([*history, *([] if reply is None else [reply])])
    return (key_of(chain), key_of(chain[-1:])) if chain else None


class Said(NamedTuple):
    """What people and tools said before a reply; digests, for the key of the turn."""

    words: bytes
    """Of their texts as the profile reads them, in which an agent's rewriting leaves no trace; of
    the messages where there is no text."""
    setting: bytes
    """8 bytes, of the system's texts without what a clock changes."""
    exact: bytes
    """8 bytes, of the messages to the letter, the system's too; without those of the agent's own,
    which it may not send again."""
    told: tuple[bytes, ...]
    """The messages' hashes, without the system's."""

    def key(self, chain_key: bytes) -> bytes | None:
        """32 bytes, the last 16 of them `setting` and `exact`; None if nothing was said."""
        if not self.told:
            return None
        words = hashlib.blake2b(chain_key + self.words, digest_size=16).digest()
        return words + self.setting + self.exact


def reply_starts(
    messages: Sequence[Json], utterances: Sequence[Utterance | None] = ()
) -> list[int]:
    """Where the last reply in a history may begin, the likeliest first; nothing without a reply.

    That is the last assistant message, or one before it with nothing but results of tools between,
    and what the agent adds to them, which says nothing in `utterances`: agents cut one reply into
    several messages, such as one for each of its calls.
    """
    starts: list[int] = []
    for position in range(len(messages) - 1, -1, -1):
        role = messages[position].get("role")
        if role == "assistant":
            starts.append(position)
        elif starts and role not in _TOOLS and not (utterances and utterances[position] is None):
            break
        if len(starts) == _MOST_PARTS:
            break
    return starts


class _Told:
    """Gathers what was said, message by message."""

    def __init__(self) -> None:
        self._words = hashlib.blake2b(digest_size=HASH_BYTES)
        self._any_words = False
        self._setting = hashlib.blake2b(digest_size=SETTING_BYTES)
        self._exact = hashlib.blake2b(digest_size=EXACT_BYTES)
        self.told: list[bytes] = []

    def system(self, key: bytes, text: str) -> None:
        self._exact.update(key)
        self._setting.update(text.encode().translate(None, _CLOCK))

    def add(self, key: bytes, text: str | None) -> None:
        self._exact.update(key)
        self.told.append(key)
        if text is not None:
            self._any_words = True
            # Without white space: messages may be merged.
            self._words.update(text.encode().translate(None, _WHITE_SPACE))

    def so_far(self) -> Said:
        words = self._words if self._any_words else self._exact
        exact = self._exact.digest()
        return Said(words.digest(), self._setting.digest(), exact, tuple(self.told))


def said(
    messages: Sequence[Json],
    hashes: Sequence[bytes],
    texts: Sequence[str | None],
    starts: Sequence[int] | None = None,
) -> list[Said]:
    """What was said before each of `starts` (else before the last reply), and in all messages.

    `texts` are what the profile reads in the messages, None where there is nothing. Where it has
    read nothing yet, all messages count: it takes all that the agent says for machine-made.
    """
    wanted = reply_starts(messages)[:1] if starts is None else starts
    read, every = _Told(), _Told()
    found: dict[int, Said] = {}
    for position, (message, key, text) in enumerate(zip(messages, hashes, texts, strict=True)):
        role = message.get("role")
        plain = text_of(message.get("content"))
        if role == "assistant":
            if position in wanted:
                found[position] = (read if read.told else every).so_far()
        elif role in SYSTEM:
            read.system(key, plain)
            every.system(key, plain)
        else:
            every.add(key, text)
            if text is not None or not plain:  # a picture has no text
                read.add(key, text)
    return [*(found[start] for start in wanted), (read if read.told else every).so_far()]


def link_of(
    chain: Sequence[Meant], hashes: Sequence[bytes], starts: Sequence[int], before: Sequence[Said]
) -> Link | None:
    """How the turn that a request continues is found; None if it continues none.

    `chain` is what the assistant messages of the request mean, and `before` is what was said before
    each of `starts`, where the turn's reply may begin.
    """
    if not chain:
        return None
    chain_key = key_of(chain)
    links: list[Link] = []
    for parts, (start, told_before) in enumerate(zip(starts, before, strict=True), 1):
        reply = chain[-parts:]
        size = sum(message.size for message in reply)
        links.append(
            Link(
                chain_key,
                key_of(reply) if size else None,
                tuple(hashes[:start]),
                said_key=told_before.key(chain_key),
                told=told_before.told,
                telling=size >= _TELLING,
            )
        )
    return replace(links[0], longer=tuple(links[1:])) if links[1:] else links[0]


def message_hashes(messages: Sequence[Json]) -> tuple[bytes, ...]:
    """The name under which each message is stored."""
    return tuple(content_hash(write_json(message)) for message in messages)


def place_of(
    lineage: str, client_session: str | None, kind: str, parent: str | None, texts: Sequence[str]
) -> bytes | None:
    """Where in which conversation a request stands, as a 16-byte digest: a retry's is the same.

    After a reply that is the turn it continues, for agents rewrite what they send again; at the
    start of a conversation it is what was said, in `texts`. None if nothing tells it from others.
    """
    said = list(texts) if parent is None else []
    if parent is None and not said:
        return None
    place = orjson.dumps([lineage, client_session, kind, parent, said])
    return hashlib.blake2b(place, digest_size=16).digest()


def next_states(
    turn: str,
    messages: Sequence[Json],
    utterances: Sequence[Utterance | None],
    start: int | None = None,
) -> list[NextState]:
    """What others said after the reply that begins at `start`, or after the last one, about `turn`.

    `utterances` is what the agent's profile reads in each of the messages.
    """
    if start is None:
        start = next(iter(reply_starts(messages)), len(messages))
    states: list[NextState] = []
    times = Counter(one for one in utterances if one and len(one.text) >= _LONG_PROMPT)
    for message, one in zip(messages[start + 1 :], utterances[start + 1 :], strict=True):
        if one is None and message.get("role") == "user":
            one = attached(message.get("content"))
        if one is None or message.get("role") == "assistant":
            continue
        if one.source is not Source.USER or times[one] < _SAID_TOO_OFTEN:
            states.append(NextState(turn, one.source, one.text, TRUST[one.source]))
    return states
