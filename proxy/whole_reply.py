"""A whole reply's token ids and log-probs cut out of its bytes: they are nine tenths of it.

What is left is small, so it is parsed: it has to be a reply with null where something was cut. Any
other shape (several choices, no log-probs, another order of the fields) is left to the parser. As
in `proxy/splice.py` the search is safe, because within a JSON string every quote is escaped.
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
    """A chat reply in parts; None if it has to be parsed as a whole."""
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
    if not named or before.count(b"{") != 1:  # one that is not the reply's own
        return None
    told = (
        b"".join((_LOGPROBS, logprobs, b"]}")) if asked.logprobs else _NO_LOGPROBS,
        b"".join((_IDS, ids, b"]")) if asked.token_ids else _NO_IDS,
        b"".join((_PROMPT, prompt_ids, b"]")) if asked.token_ids else _NO_PROMPT,
    )
    sent = b"".join((before, ours, after, told[0], reason, told[1], middle, told[2], tail))
    return Whole(sent, rest, logprobs, ids, prompt_ids)


def _is_bare(rest: Json) -> bool:
    """Whether null stands where something was cut, and nowhere else is anything to cut."""
    choices = objects(rest.get("choices"))
    if len(choices) != 1 or rest.get("prompt_token_ids", 0) is not None:
        return False
    choice = choices[0]
    if choice.get("index") != 0 or not isinstance(rest.get("model"), str):
        return False
    return choice.get("logprobs", 0) is None and choice.get("token_ids", 0) is None
