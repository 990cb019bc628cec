"""Cuts token ids and log-probs, nine tenths of the bytes, out of a whole reply.

What is left is small and is parsed: it must be a reply with null in the places that were cut. Any
other shape (several choices, no log-probs, another order of the fields) is left to the parser. As
in `proxy/splice.py` the search is safe, because every quote within a JSON string is escaped.
"""

from __future__ import annotations

from typing import NamedTuple

import orjson

from nextstate.records import Json
from nextstate.wire import json_object, objects
from proxy.dialects.chat import Asked

_LOGPROBS, _END = b',"logprobs":{"content":[', b']},"finish_reason":'
_IDS, _PROMPT = b',"token_ids":[', b',"prompt_token_ids":['
_NO_LOGPROBS, _NO_IDS = b',"logprobs":null', b',"token_ids":null'
_NO_PROMPT = b',"prompt_token_ids":null'


class Whole(NamedTuple):
    """One reply, taken apart."""

    sent: bytes
    """What the client gets."""
    rest: Json
    """The engine's reply without what was cut: null stands there."""
    logprobs: bytes
    ids: bytes
    prompt_ids: bytes
    """What was cut, without its brackets."""


def take_apart(data: bytes, asked: Asked) -> Whole | None:
    """A chat reply in parts; None if it must be parsed as a whole."""
    head, found, tail = data.partition(_LOGPROBS)
    logprobs, ended, tail = tail.partition(_END)
    reason, has_ids, tail = tail.partition(_IDS)
    ids, _, tail = tail.partition(b"]")
    middle, has_prompt, tail = tail.partition(_PROMPT)
    prompt_ids, closed, tail = tail.partition(b"]")
    if not (found and ended and has_ids and has_prompt and closed):
        return None
    nulls = (_NO_LOGPROBS, _NO_IDS, _NO_PROMPT)
    reason = b',"finish_reason":' + reason
    rest = json_object(b"".join((head, nulls[0], reason, nulls[1], middle, nulls[2], tail)))
    if rest is None or not _is_bare(rest):
        return None
    theirs, ours = (b'"model":' + orjson.dumps(name) for name in (rest["model"], asked.model))
    before, named, after = head.partition(theirs)
    if not named or before.count(b"{") != 1:  # not the reply's own model field
        return None
    filled = (
        b"".join((_LOGPROBS, logprobs, b"]}")) if asked.logprobs else _NO_LOGPROBS,
        b"".join((_IDS, ids, b"]")) if asked.token_ids else _NO_IDS,
        b"".join((_PROMPT, prompt_ids, b"]")) if asked.token_ids else _NO_PROMPT,
    )
    sent = b"".join((before, ours, after, filled[0], reason, filled[1], middle, filled[2], tail))
    return Whole(sent, rest, logprobs, ids, prompt_ids)


def _is_bare(rest: Json) -> bool:
    """Whether the reply has null in the places that were cut, and nothing else to cut."""
    choices = objects(rest.get("choices"))
    if len(choices) != 1 or rest.get("prompt_token_ids", 0) is not None:
        return False
    choice = choices[0]
    if choice.get("index") != 0 or not isinstance(rest.get("model"), str):
        return False
    return choice.get("logprobs", 0) is None and choice.get("token_ids", 0) is None
