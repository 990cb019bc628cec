"""Which turn a request continues, and what it says about that turn.

Assistant messages are compared: agents stamp, merge and drop what users wrote, but send the model's
replies back (FACTS: OpenClaw strips `<think>` and rewrites tool-call ids, so both are left out of
the comparison). What users and tools said tells conversations with the same replies apart.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import orjson

from nextstate.hooks import AgentProfile, Heard, attached, text_of
from nextstate.recording import Link
from nextstate.records import TRUST, Json, NextState, Source, TurnKind
from nextstate.rows import content_hash
from nextstate.wire import obj, objects

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
TURN_TYPE = "x-turn-type"
_SESSION_HEADERS = ("x-session-id", "x-session-affinity")
_SESSION_FIELDS = ("prompt_cache_key", "session_id")
_LONGEST_NAME = 200
SYSTEM = ("system", "developer")
_WHITE_SPACE = string.whitespace.encode()
_TELLING = 200
"""Bytes from which on nobody else gets the same reply; canned greetings and refusals, and a first
tool call, are shorter."""
_LONG_PROMPT, _SAID_TOO_OFTEN = 80, 3
"""Who says a text of so many characters so often, to the letter, is a program."""


def explicit_session(headers: Mapping[str, str], request: Json) -> str | None:
    """The session id that the client names, by header or by field, or None."""
    named: list[object] = [headers.get(name) for name in _SESSION_HEADERS]
    named += [request.get(name) for name in _SESSION_FIELDS]
    named += [obj(request.get("metadata")).get("session_id"), request.get("user")]
    named.append(obj(request.get("metadata")).get("user_id"))
    found = next((value for value in named if isinstance(value, str) and value), None)
    return None if found is None else _kept_name(found)


def named_kind(headers: Mapping[str, str]) -> TurnKind | None:
    """What the client says that the turn is, in `X-Turn-Type`; None where it says nothing known."""
    named = headers.get(TURN_TYPE, "").strip().lower()
    return TurnKind(named) if named in set(TurnKind) else None


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


def canonical_reply(message: Json) -> bytes:
    """The parts of an assistant message that survive an agent's history, as bytes."""
    # Without white space: what comes in one text may go back in several parts.
    text = "".join(_THINK.sub("", text_of(message.get("content"))).split())
    functions = [obj(call.get("function")) for call in objects(message.get("tool_calls"))]
    calls = [(f.get("name"), _canonical_arguments(f.get("arguments"))) for f in functions]
    return orjson.dumps([text, calls])


def reply_keys(history: Sequence[Json], reply: Json | None) -> tuple[bytes, bytes] | None:
    """(chain key, reply key) of the assistant messages in `history`, with `reply` after them.

    None if there is no assistant message at all.
    """
    chain = [m for m in history if m.get("role") == "assistant"]
    if reply is not None:
        chain.append(reply)
    if not chain:
        return None
    digest = hashlib.blake2b(digest_size=16)
    last = b""
    for message in chain:
        last = hashlib.blake2b(canonical_reply(message), digest_size=16).digest()
        digest.update(last)
    return digest.digest(), last


class Said(NamedTuple):
    """What people and tools said before a reply; digests, for the key of the turn."""

    words: bytes
    """Of their texts as the profile reads them, in which an agent's rewriting leaves no trace; of
    the messages where there is no text."""
    exact: bytes
    """8 bytes, of the messages to the letter, the system's too; without those of the agent's own,
    which it may not send again."""
    told: tuple[bytes, ...]
    """The messages' hashes, without the system's."""

    def key(self, chain_key: bytes) -> bytes | None:
        """24 bytes, the last 8 of them `exact`; None if nothing was said."""
        if not self.told:
            return None
        return hashlib.blake2b(chain_key + self.words, digest_size=16).digest() + self.exact


def said(
    messages: Sequence[Json], hashes: Sequence[bytes], texts: Sequence[str | None]
) -> tuple[Said, Said]:
    """What was said before the last assistant message, and in all messages.

    `texts` are what the profile reads in the messages, None where there is nothing.
    """
    last = _last_reply(messages)
    exact, words = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=16)
    told: list[bytes] = []
    any_words = False

    def so_far() -> Said:
        return Said((words if any_words else exact).digest(), exact.digest(), tuple(told))

    before = so_far()
    for position, (message, key, text) in enumerate(zip(messages, hashes, texts, strict=True)):
        role = message.get("role")
        if role == "assistant":
            if position == last:
                before = so_far()
        elif role in SYSTEM:
            exact.update(key)
        elif text is not None or not text_of(message.get("content")):  # a picture has no text
            exact.update(key)
            told.append(key)
            if text is not None:
                any_words = True
                # Without white space: messages may be merged.
                words.update(text.encode().translate(None, _WHITE_SPACE))
    return before, so_far()


def link_of(messages: Sequence[Json], hashes: Sequence[bytes], before: Said) -> Link | None:
    """How the turn that a request continues is found; None if it continues none.

    `before` is what was said before its last assistant message.
    """
    keys = reply_keys(messages, None)
    if keys is None:
        return None
    chain_key, reply_key = keys
    last = _last_reply(messages)
    reply = canonical_reply(messages[last])
    return Link(
        chain_key,
        reply_key if reply != canonical_reply({}) else None,
        tuple(hashes[:last]),
        said_key=before.key(chain_key),
        told=before.told,
        telling=len(reply) >= _TELLING,
    )


def message_hashes(messages: Sequence[Json]) -> tuple[bytes, ...]:
    """The name under which each message is stored."""
    return tuple(content_hash(orjson.dumps(message)) for message in messages)


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


def following(messages: Sequence[Json]) -> list[Json]:
    """The messages after the last assistant message; none if there is no such message."""
    last = _last_reply(messages)
    return [] if last < 0 else list(messages[last + 1 :])


def next_states(
    turn: str, messages: Sequence[Json], heard: Sequence[Heard | None]
) -> list[NextState]:
    """What the messages after the last reply say about `turn`, without the agent's own notes.

    `heard` is what the agent's profile reads in each of the messages.
    """
    states: list[NextState] = []
    after = following(messages)
    times = Counter(one for one in heard if one and len(one.text) >= _LONG_PROMPT)
    for message, one in zip(after, heard[len(heard) - len(after) :], strict=True):
        if one is None and message.get("role") == "user":
            one = attached(message.get("content"))
        if one is None or (one.source is Source.USER and times[one] >= _SAID_TOO_OFTEN):
            continue
        states.append(NextState(turn, one.source, one.text, TRUST[one.source]))
    return states


def _last_reply(messages: Sequence[Json]) -> int:
    """The position of the last assistant message, -1 if there is none."""
    for position in range(len(messages) - 1, -1, -1):
        if messages[position].get("role") == "assistant":
            return position
    return -1


def _canonical_arguments(arguments: object) -> str:
    if not isinstance(arguments, str):
        return orjson.dumps(arguments, option=orjson.OPT_SORT_KEYS).decode()
    try:
        parsed = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments.strip()
    return orjson.dumps(parsed, option=orjson.OPT_SORT_KEYS).decode()
