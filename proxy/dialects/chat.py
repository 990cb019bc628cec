"""`/v1/chat/completions`: what NextState adds to a request upstream, and takes out of the reply.

upstream                          taken out of the reply, unless the client asked itself
model = the serving adapter       model = what the client sent
logprobs = true, unless the       choices[].logprobs → null
  client asks for top_logprobs
return_token_ids = true           prompt_token_ids → null, choices[].token_ids → null,
                                  chunks that carry nothing else → dropped
stream_options.include_usage      the usage chunk → dropped; the engine's fingerprint, which it
                                  carries, stands where it stands unasked: on the last chunk of
                                  every choice
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nextstate.records import Json
from nextstate.wire import integer, obj, objects

_OFF = frozenset(("0", "f", "false", "n", "no", "off"))
"""Texts that the engine's parser reads as false."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the client asked for itself."""

    model: str
    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False

    @staticmethod
    def of(request: Json, model: str) -> Asked:
        """Reads a client's request, which named `model`."""
        return Asked(
            model=model,
            logprobs=not is_off(request.get("logprobs")),
            token_ids=not is_off(request.get("return_token_ids")),
            usage=not is_off(obj(request.get("stream_options")).get("include_usage")),
        )


def upstream_request(request: Json, model: str) -> Json:
    """A copy of the client's request with our additions."""
    sent = with_token_ids({**request, "model": model})
    alternatives = request.get("top_logprobs") or request.get("logprob_token_ids")
    if is_off(request.get("logprobs")) and not alternatives:
        # With alternatives and without `logprobs` the engine refuses, and the client gets that.
        sent["logprobs"] = True
    return with_usage(sent)


def with_token_ids(sent: Json) -> Json:
    """Asks for token ids, in place."""
    if is_off(sent.get("return_token_ids")):
        sent["return_token_ids"] = True
    return sent


def is_off(value: object) -> bool:
    """Whether the engine reads a switch as off. Values that it would refuse are passed on."""
    return value in (None, 0) or (isinstance(value, str) and value.lower() in _OFF)


def with_usage(sent: Json) -> Json:
    """Asks for the usage chunk of a stream, in place. Other stream options have no effect."""
    found = sent.get("stream_options")
    options = obj(found)
    readable = found is None or isinstance(found, dict)
    if not is_off(sent.get("stream")) and readable and is_off(options.get("include_usage")):
        sent["stream_options"] = {**options, "include_usage": True, "continuous_usage_stats": False}
    return sent


def client_chunk(chunk: Json, asked: Asked, fingerprint: str | None) -> Json | None:
    """A streamed chunk as the client would get it from the engine; None if it would not."""
    sent = without_usage(chunk, asked, fingerprint)
    if sent is None:
        return None
    if not asked.token_ids and "prompt_token_ids" in sent:
        sent["prompt_token_ids"] = None
    choices = objects(sent.get("choices"))
    carries = not choices or "prompt_token_ids" in sent or asked.logprobs or asked.token_ids
    for choice in choices:
        strip_choice(choice, asked)
        carries = carries or bool(choice.get("delta")) or choice.get("finish_reason") is not None
    return sent if carries else None


def without_usage(chunk: Json, asked: Asked, fingerprint: str | None) -> Json | None:
    """A copy of the chunk with the client's model and without unasked usage; None if that is all.

    Its choices are copies too.
    """
    sent = {**chunk}
    if "model" in sent:
        sent["model"] = asked.model
    if "choices" in sent:
        sent["choices"] = [{**choice} for choice in objects(sent["choices"])]
    if asked.usage:
        return sent
    if "usage" in sent and not sent.get("choices"):
        return None
    sent.pop("usage", None)
    ended = any(choice.get("finish_reason") is not None for choice in sent.get("choices", ()))
    if fingerprint is not None and ended:
        sent["system_fingerprint"] = fingerprint
    return sent


def count(request: Json) -> int:
    """How many choices a request asks for."""
    return max(integer(request.get("n")) or 1, 1)


def client_reply(reply: Json, asked: Asked) -> Json:
    """Changes a plain reply, in place, to what the client would get from the engine."""
    if "model" in reply:
        reply["model"] = asked.model
    if not asked.token_ids and "prompt_token_ids" in reply:
        reply["prompt_token_ids"] = None
    for choice in objects(reply.get("choices")):
        strip_choice(choice, asked)
    return reply


def strip_choice(choice: dict[str, Any], asked: Asked) -> None:
    """Removes unasked log-probs and token ids from a choice, in place."""
    if not asked.logprobs and "logprobs" in choice:
        choice["logprobs"] = None
    for name in ("token_ids", "prompt_token_ids"):  # each choice of a completion has the latter
        if not asked.token_ids and name in choice:
            choice[name] = None
