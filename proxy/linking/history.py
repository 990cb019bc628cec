"""The messages of a request, read once, and the keys by which its turn and its parent are found.

A turn is found by what its replies mean (`proxy/linking/meaning.py`): agents stamp, join and drop
what users wrote, but send the model's replies back. What users and tools said tells conversations
with the same replies apart.
"""

from __future__ import annotations

import hashlib
import string
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson

from nextstate.hooks import AgentProfile, Utterance, attached, text_of
from nextstate.records import TRUST, Json, NextState, Source
from nextstate.redaction import NOTHING, Redactor
from nextstate.redaction.repeated import (
    MOST_SEARCHED,
    TOO_LONG,
    Known,
    Values,
    repeatable,
    size_of,
    without,
)
from nextstate.store.texts import content_hash
from nextstate.wire import objects, write_json
from proxy.linking.meaning import Meaning, as_ended, digest_of_texts, key_of, meaning_of

KEY_BYTES, SYSTEM_BYTES, LETTERS_BYTES = 16, 8, 8
"""A context key is a key of the words, then one of the system's messages, then one of the exact
messages."""
_SYSTEM = ("system", "developer")
_TOOLS = ("tool", "function")
_SHOWING = {"user": Source.USER, **dict.fromkeys(_TOOLS, Source.TOOL)}
"""Roles that may show something without words."""
_WHITE_SPACE = string.whitespace.encode()
CLOCK = f"{string.whitespace}{string.digits}:.,/-+".encode()
"""The characters in which two times differ; a customer's number may look like one."""
RARE_BYTES = 180
"""From this size on hardly any two conversations get the same reply by chance. Most canned
greetings, refusals and first tool calls are shorter."""
_LONG_MESSAGE = 1 << 16
"""Bytes of a message whose characters are counted before it is searched."""
_MOST_PARTS = 32
"""One reply is looked for in this many messages at most."""
_LONG_PROMPT, _PROGRAM_REPEATS = 80, 3
"""A user's text of this many characters comes from a program if a history repeats it this often."""
_MOST_STOPS = 32
_MOST_REMEMBERED_BYTES, _MESSAGE_BYTES = 16 << 20, 600
"""Of memory for all remembered messages, and for one besides its texts."""


class Message(NamedTuple):
    """What linking needs of one message. It depends on the message and the profile alone."""

    hash: bytes
    """The name under which the message is stored."""
    role: str
    utterance: Utterance | None
    """What the agent's profile reads in it."""
    shown: Utterance | None
    """What it says about a reply before it; for a user's attachments, their kinds."""
    meaning: Meaning | None
    """None unless it is an assistant message."""
    text: bytes
    """What counts of its text for a context key."""
    counts: bool
    """False for a text in which the profile reads nothing: the agent may not send it again."""
    shows: bool
    """True if it holds a picture or another attachment."""
    words: str
    """What it says, the system's text included; tells a retry from another first request."""
    redacted: Json | None = None
    """The message as it is stored, if a secret in it was replaced; all else is of this one."""
    secrets: Values = {}  # noqa: RUF012
    """What was replaced and may be said again, without the name that gave it away."""
    searched: bool = True
    """False if it was too long to be searched for secrets."""


class RememberedMessages:
    """What messages were read as, at most `most_bytes` of it.

    An agent sends its whole history with each request, so most messages were read before. They are
    known by their JSON itself, so that only a new one is hashed with blake2b.
    """

    def __init__(
        self, most_bytes: int = _MOST_REMEMBERED_BYTES, redactor: Redactor = NOTHING
    ) -> None:
        self.redactor = redactor
        """What replaces secrets before a message is read: a history sent again costs nothing."""
        self.stops: dict[bytes, None] = {}
        """Stop sequences that were met; a request that has none may continue one that had."""
        self._most_bytes = most_bytes
        self._bytes = 0
        self._found = OrderedDict[tuple[str, bytes], tuple[Message, int]]()
        """(message, its size) by profile and JSON; those at the end were used last."""

    def add_stops(self, stops: Sequence[bytes]) -> None:
        """Notes the stop sequences of a request, and forgets the oldest."""
        for stop in stops:
            self.stops.pop(stop, None)
            self.stops[stop] = None
        while len(self.stops) > _MOST_STOPS:
            del self.stops[next(iter(self.stops))]

    def read(self, messages: Sequence[Json], profile: AgentProfile) -> list[Message]:
        """Each message as `profile` reads it, without what earlier ones told to be secrets."""
        found: list[Message] = []
        known = Known()
        searched = 0
        for message in messages:
            written = write_json(message)
            key = profile.name, written
            remembered = self._found.get(key)
            if remembered is None:
                if self.redactor:
                    long = len(written) > _LONG_MESSAGE
                    searched += size_of(message) if long else len(written)
                read = self._new(message, written, profile, whole=searched <= MOST_SEARCHED)
                size = _MESSAGE_BYTES + len(written) + len(read.text) + 2 * len(read.words)
                size += len(read.meaning.text) if read.meaning else 0
                size += len(written) if read.redacted else 0
                self._found[key] = read, size
                self._bytes += size
            else:
                read = remembered[0]
                self._found.move_to_end(key)
            if known.stands_in(written):
                kept = without(read.redacted or message, known.values)
                if kept is not (read.redacted or message):
                    again = _read(kept, content_hash(write_json(kept)), profile)
                    read = again._replace(redacted=kept, secrets=read.secrets)
            known.add(read.secrets)
            found.append(read)
        while self._bytes > self._most_bytes:
            _, (_, size) = self._found.popitem(last=False)
            self._bytes -= size
        return found

    def _new(self, message: Json, written: bytes, profile: AgentProfile, *, whole: bool) -> Message:
        """A message that is read for the first time; not `whole`: as one that is not searched."""
        if not whole:
            kept: Json = {"role": str(message.get("role"))[:20], "content": TOO_LONG}
            read = _read(kept, content_hash(write_json(kept)), profile)
            return read._replace(redacted=kept, searched=False)
        kept = self.redactor.value(message)
        if kept is message:
            return _read(message, content_hash(written), profile)
        secrets = repeatable(self.redactor, message, kept)
        kept = without(kept, secrets)
        read = _read(kept, content_hash(write_json(kept)), profile)
        return read._replace(redacted=kept, secrets=secrets)


class Context(NamedTuple):
    """Digests of what users, tools and the system said before a reply."""

    words: bytes
    """Of the texts that the profile reads, so that an agent's rewriting leaves no trace; of the
    exact messages where there is no text."""
    system: bytes
    """Of the system's texts without what a clock changes."""
    letters: bytes
    """Of the exact messages, the system's included; without the agent's own notes."""
    hashes: tuple[bytes, ...]
    """The messages' hashes, without the system's."""

    def key(self, chain_key: bytes, exact: bytes) -> bytes | None:
        """32 bytes, the last 16 of them `system` and `letters`; None if nothing was said.

        `exact` is what replies say beyond what they mean: it counts as letters.
        """
        if not self.hashes:
            return None
        words = hashlib.blake2b(chain_key + self.words, digest_size=KEY_BYTES).digest()
        letters = self.letters
        if exact:
            letters = hashlib.blake2b(letters + exact, digest_size=LETTERS_BYTES).digest()
        return words + self.system + letters


class Scope(NamedTuple):
    """Where a request looks for its turn: keys of other lineages or names are different."""

    lineage: str
    client_session: str | None
    """The session that the client names."""
    is_shared_name: bool = False
    """True if the name is a person's or an app's: many conversations may have it."""
    episode: str | None = None
    """The episode that the request is a call of."""

    @property
    def prefix(self) -> bytes:
        """What goes into each key."""
        name = [self.lineage, self.client_session]
        return orjson.dumps(name if self.episode is None else [*name, self.episode])


class History(NamedTuple):
    """The messages of one request."""

    messages: list[Message]
    replies: list[Meaning]
    starts: list[int]
    """The messages with which the last reply may begin, the likeliest first."""
    contexts: list[Context]
    """What was said before each of `starts`."""
    context: Context
    """What was said in all messages."""


class Keys(NamedTuple):
    """The keys by which a stored turn is found."""

    chain: bytes
    """Of all replies up to the turn's own."""
    reply: bytes
    """Of the turn's own reply."""
    context: bytes | None
    """Of the chain and what was said before the turn's reply; None if nothing was said."""


class Reply(NamedTuple):
    """The last reply of a history, if it begins with the message `start`."""

    start: int
    key: bytes | None
    """None if it is empty, as many are."""
    chain_key: bytes
    """Of all assistant messages in the request."""
    context_key: bytes | None
    """Of all replies and of what was said before this one; None if nothing was said."""
    hashes: tuple[bytes, ...]
    """Of the messages that users and tools sent before it."""
    size: int
    """How many bytes tell it from others."""


class Link(NamedTuple):
    """How a request finds the turn that it continues."""

    replies: tuple[Reply, ...]
    """The likeliest first: an agent may have split the reply into several messages."""
    rare: bool
    """True if the last message is so long that hardly any other conversation got the same."""
    messages: Sequence[Message]
    """Of the request."""
    ended: tuple[tuple[Link, set[bytes]], ...] = ()
    """The same for the last message up to one of these stop sequences: what follows it is not the
    model's, if the turn's own request had that sequence."""


def read_history(
    messages: Sequence[Json], profile: AgentProfile, remembered: RememberedMessages | None = None
) -> History:
    """Reads the messages of a request, each one that is not remembered."""
    read = (remembered or RememberedMessages()).read(messages, profile)
    starts = _reply_starts(read)
    *before, in_all = _contexts(read, starts)
    replies = [one.meaning for one in read if one.meaning is not None]
    return History(read, replies, starts, before, in_all)


def keys_of(history: History, reply: Meaning, scope: Scope) -> Keys:
    """The keys of the turn that answers `history` with `reply`."""
    prefix = scope.prefix
    own = key_of([reply], prefix, 1)
    chain = key_of([*history.replies, reply], prefix, 1) if history.replies else own
    exact = b"".join([one.exact for one in (*history.replies, reply)])
    return Keys(chain, own, history.context.key(chain, exact))


def link_of(
    history: History, scope: Scope, stops: Sequence[bytes] = (), met: Iterable[bytes] = ()
) -> Link | None:
    """How to find the turn that a request continues; None if its history holds no reply.

    `stops`, and `met` of other requests, may have ended the last reply.
    """
    chain = history.replies
    if not chain:
        return None
    ends = as_ended(chain[-1], stops, met)
    ended = [(_link(history, [*chain[:-1], last], scope), at) for last, at in ends]
    return _link(history, chain, scope)._replace(ended=tuple(ended))


def _link(history: History, chain: Sequence[Meaning], scope: Scope) -> Link:
    prefix, texts = scope.prefix, digest_of_texts(chain)
    exact = b"".join([one.exact for one in chain])
    replies: list[Reply] = []
    for parts, (start, before) in enumerate(zip(history.starts, history.contexts, strict=True), 1):
        parts_of_reply = chain[-parts:]
        size = sum(part.size for part in parts_of_reply)
        key = key_of(parts_of_reply, prefix, parts) if size else None
        chain_key = key_of(chain, prefix, parts, texts)
        replies.append(
            Reply(start, key, chain_key, before.key(chain_key, exact), before.hashes, size)
        )
    return Link(tuple(replies), chain[-1].size >= RARE_BYTES, history.messages)


def place_of(scope: Scope, kind: str, parent: str | None, history: History) -> bytes | None:
    """A 16-byte digest of the place of a request in its conversation; a retry has the same place.

    After a reply the place is the turn that the request continues, because agents rewrite what they
    send again. At the start of a conversation it is what was said. None if nothing was said there.
    """
    said: list[str] = []
    if parent is None:
        said = [one.words for one in history.messages if one.words]
        if not said:
            return None
    place = scope.prefix + orjson.dumps([kind, parent, said])
    return hashlib.blake2b(place, digest_size=16).digest()


def next_states(
    turn: str, history: History, start: int | None = None, sent: Sequence[Json] = ()
) -> list[NextState]:
    """What was said about `turn` after its reply, which begins with the message `start`.

    By default that is the last reply. If `sent` has the messages themselves, results are in the
    order of their calls, as judges expect them.
    """
    messages = history.messages
    if start is None:
        start = history.starts[0] if history.starts else len(messages)
    following = _in_order_of_calls(sent, start) if sent else range(start + 1, len(messages))
    after = [shown for at in following if (shown := messages[at].shown) is not None]
    repeats: Counter[Utterance] = Counter()
    if any(map(_is_long_prompt, after)):
        repeats.update(
            one.utterance for one in messages if one.utterance and _is_long_prompt(one.utterance)
        )
    return [
        NextState(turn, one.source, one.text, TRUST[one.source])
        for one in after
        if repeats[one] < _PROGRAM_REPEATS
    ]


def _in_order_of_calls(sent: Sequence[Json], start: int) -> list[int]:
    """The messages after `start`, results in the places of results and the order of their calls."""
    after = range(start + 1, len(sent))
    results = {at: named for at in after if isinstance(named := sent[at].get("tool_call_id"), str)}
    if len(results) < 2:
        return [*after]
    calls = [call for one in sent[start:] for call in objects(one.get("tool_calls"))]
    place = {str(call.get("id")): number for number, call in enumerate(calls)}
    known = [at for at, named in results.items() if named in place]
    moved = dict(zip(known, sorted(known, key=lambda at: place[results[at]]), strict=True))
    return [moved.get(at, at) for at in after]


def _is_long_prompt(utterance: Utterance) -> bool:
    return utterance.source is Source.USER and len(utterance.text) >= _LONG_PROMPT


def _read(message: Json, content: bytes, profile: AgentProfile) -> Message:
    role, utterance = str(message.get("role")), profile.utterance(message)
    sent = message.get("content")
    plain, words = text_of(sent), utterance.text if utterance else ""
    if role == "assistant":
        meaning = meaning_of(message)
        return Message(content, role, utterance, None, meaning, b"", False, False, words)
    if role in _SYSTEM:
        text, words = plain.encode().translate(None, CLOCK), words if utterance else plain
        return Message(content, role, utterance, utterance, None, text, True, False, words)
    shown = utterance
    if utterance is None and role in _SHOWING:
        shown = attached(sent, _SHOWING[role])
    # Without white space, because an agent may join messages.
    text = words.encode().translate(None, _WHITE_SPACE)
    counts = utterance is not None or not plain  # a picture has no text
    shows = any("text" not in part for part in objects(sent))
    return Message(content, role, utterance, shown, None, text, counts, shows, words)


def _reply_starts(messages: Sequence[Message]) -> list[int]:
    """The messages with which the last reply of a history may begin, the likeliest first.

    Agents split one reply into several messages, such as one for each call. So the reply begins
    with the last assistant message, or with one before it if only results of tools, pictures and
    messages without anything heard are between them.
    """
    starts: list[int] = []
    for position in range(len(messages) - 1, -1, -1):
        message = messages[position]
        if message.role == "assistant":
            starts.append(position)
        elif starts and not (message.role in _TOOLS or message.shows or not message.utterance):
            break
        if len(starts) == _MOST_PARTS:
            break
    return starts


class _Digest:
    """A digest of bytes that come one after the other. It is begun when it is asked for."""

    def __init__(self, size: int) -> None:
        self.new: list[bytes] = []
        """What came since the last `digest`."""
        self._size = size
        self._begun: Any = None

    def digest(self) -> bytes:
        """The digest of all that came so far."""
        new = b"".join(self.new)
        self.new.clear()
        if self._begun is None:
            self._begun = hashlib.blake2b(new, digest_size=self._size)
        else:
            self._begun.update(new)
        return self._begun.digest()


class _Gathered:
    """Gathers a context, message by message."""

    def __init__(self, system: Sequence[Message] = ()) -> None:
        self._words = _Digest(KEY_BYTES)
        self._any_words = False
        self._system = _Digest(SYSTEM_BYTES)
        self._letters = _Digest(LETTERS_BYTES)
        self.hashes: list[bytes] = []
        for message in system:
            self.add_system(message)

    def add_system(self, message: Message) -> None:
        self._letters.new.append(message.hash)
        self._system.new.append(message.text)

    def add(self, message: Message) -> None:
        self._letters.new.append(message.hash)
        self.hashes.append(message.hash)
        if message.utterance is not None:
            self._any_words = True
            self._words.new.append(message.text)

    def context(self) -> Context:
        letters = self._letters.digest()
        words = self._words.digest() if self._any_words else letters
        return Context(words, self._system.digest(), letters, tuple(self.hashes))


def _contexts(messages: Sequence[Message], starts: Sequence[int]) -> list[Context]:
    """What was said before each of `starts`, then what was said in all messages.

    Messages that do not count are left out. Where no message counts yet, all of them do: otherwise
    a profile that takes every text for the agent's own would leave nothing to compare.
    """
    gathered, any_counts = _Gathered(), False
    system: list[Message] = []
    found: dict[int, Context] = {}
    for position, message in enumerate(messages):
        if message.meaning is not None:
            if position in starts:
                found[position] = gathered.context()
        elif message.role in _SYSTEM:
            system.append(message)
            gathered.add_system(message)
        elif message.counts or not any_counts:
            if message.counts and not any_counts:
                any_counts = True
                if gathered.hashes:
                    gathered = _Gathered(system)
            gathered.add(message)
    return [*(found[start] for start in starts), gathered.context()]
