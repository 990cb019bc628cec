"""What is kept of an exchange: its texts without secrets, and no token that would tell one.

A policy learns what its tokens say, and the importance ratio of a token is true only under the
context in which it was sampled. So a secret has two consequences:

- in the prompt: the turn does not train. Its prompt's ids are not kept, and under a prompt with
  placeholders in it the ratios would be those of another context;
- in the reply: the tokens before the secret train, because they never saw it. The tokens of the
  secret and all after it are not kept: these were sampled with the secret in their context.

Both turns are judged like any other, by their texts with placeholders.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from nextstate.records import Json
from nextstate.redaction import Redactor
from nextstate.redaction.names import HiddenNames
from nextstate.redaction.repeated import (
    MOST_SEARCHED,
    TOO_LONG,
    repeatable,
    size_of,
    without,
)
from nextstate.redaction.repeated import Known as Named
from nextstate.redaction.tokens import tokens_before
from nextstate.store.texts import content_hash
from nextstate.wire import write_json
from proxy.capture import Capture
from proxy.linking.history import Message

IN_PROMPT = "a secret stood in its prompt, whose tokens are not kept"
AT_START = "a secret stood at the start of its reply"
SOMEWHERE = "a secret stood in its reply, and which tokens hold it is not known"
UNSEARCHED = "its texts are too long to be searched for secrets"
_LONGEST_FIELD = 1000
_OUTSIDE = frozenset(
    (
        *("user", "metadata", "model", "stop", "prompt_cache_key", "safety_identifier"),
        *("session_id", "request_id", "cache_salt", "store", "service_tier"),
    )
)
"""Fields of a request that no prompt is made of."""
_MOST_KNOWN = 256


class Kept(NamedTuple):
    """The tokens that may be kept of an exchange, and why it does not train."""

    prompt_ids: tuple[int, ...] | None
    completion_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    why: str | None
    """None if a secret is no reason against its training."""


_LONGEST_KNOWN = 1 << 18
"""Bytes of a value with secrets that is remembered."""


class Known:
    """The latest lists of tools and other fields, as they came and as they are kept.

    Agents send the same ones with each request. What is known of them stays in memory.
    """

    def __init__(self, redactor: Redactor, hide: HiddenNames | None = None) -> None:
        self.redactor = redactor
        self.hide = hide or HiddenNames()
        """What stands for the name of a session."""
        self._found = OrderedDict[bytes, Any]()
        """By the hash of what came; None: nothing was replaced."""

    def value(self, value: Any, instead: Callable[[Any], Any]) -> Any:
        """`value` without secrets; itself if there are none.

        `instead` makes what is kept of one that is too long to be searched.
        """
        if not self.redactor:
            return value
        written = write_json(value)
        if len(written) > MOST_SEARCHED and size_of(value) > MOST_SEARCHED:
            return instead(value)
        key = content_hash(written)
        if key in self._found:
            self._found.move_to_end(key)
            kept = self._found[key]
            return value if kept is None else kept
        kept = self.redactor.value(value)
        if kept is value or len(written) <= _LONGEST_KNOWN:
            self._found[key] = None if kept is value else kept
        if len(self._found) > _MOST_KNOWN:
            self._found.popitem(last=False)
        return kept


def without_secrets(request: Json, known: Known) -> tuple[Json, bool]:
    """(the request but for its messages, whether a secret stood in what its prompt is made of)."""
    if not known.redactor:
        return request, False
    rest = {name: value for name, value in request.items() if name not in ("messages", "tools")}
    kept_rest = known.value(rest, _short)
    in_prompt = kept_rest is not rest and any(
        kept_rest.get(name) != old for name, old in rest.items() if name not in _OUTSIDE
    )
    messages = {"messages": request["messages"]} if "messages" in request else {}
    kept: Json = {**messages, **kept_rest}
    if "tools" in request:
        kept["tools"] = known.value(request["tools"], lambda _: [{"type": TOO_LONG}])
        in_prompt = in_prompt or kept["tools"] is not request["tools"]
    return kept, in_prompt


def is_searched(said: Json) -> bool:
    """Whether a reply is short enough to be searched for secrets."""
    return size_of(said) <= MOST_SEARCHED


def kept_reply(said: Json, messages: Sequence[Message], redactor: Redactor) -> Json:
    """A reply without its secrets and without those of the messages before it; itself if none."""
    if not redactor:
        return said
    if not is_searched(said):
        return {"role": "assistant", "content": TOO_LONG}
    kept = redactor.value(said)
    known = Named()
    for message in messages:
        known.add(message.secrets)
    known.add(repeatable(redactor, said, kept))
    return without(kept, known.values) if known.values else kept


def _short(request: Json) -> Json:
    """A request's fields, with what takes the place of those that are too long to be searched."""
    return {
        name: TOO_LONG if size_of(value) > _LONGEST_FIELD else value
        for name, value in islice(request.items(), _LONGEST_FIELD)
    }


def kept_tokens(
    capture: Capture, in_prompt: bool, reply: Json, kept_reply: Json, redactor: Redactor
) -> Kept:
    """What may be kept of an exchange's tokens; `reply` is its message with its secrets."""
    prompt = None if capture.prompt_ids is None else tuple(capture.prompt_ids)
    completion = tuple(capture.completion_ids) or None
    logprobs = capture.behaviour_logprobs()
    if not redactor:
        return Kept(prompt, completion, logprobs, None)
    if in_prompt:  # it never trains, and the reply may repeat the secret without its name
        return Kept(None, None, None, IN_PROMPT)
    if completion is None:
        return Kept(prompt, None, logprobs, None)
    secrets = [] if kept_reply is reply else list(redactor.secrets(reply))
    if not secrets and capture.says_its_tokens():
        before = len(completion)
    elif (pieces := capture.pieces()) is None:
        before = None if secrets else len(completion)
    elif sum(map(len, pieces)) > MOST_SEARCHED:
        before = None  # with thoughts that the client did not ask for
    else:
        before = tokens_before(pieces, secrets, redactor)
    if not before:
        return Kept(prompt, None, None, SOMEWHERE if before is None else AT_START)
    return Kept(prompt, completion[:before], logprobs and logprobs[:before], None)
