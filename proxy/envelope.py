"""What NextState adds to a chat request upstream, and takes back out of the reply.

upstream                          taken out of the reply, unless the client asked itself
model = the serving adapter       model = what the client sent
logprobs = true, unless the       choices[].logprobs → null
  client asks for top_logprobs
return_token_ids = true           prompt_token_ids → null, choices[].token_ids → null,
                                  chunks that carry nothing else → dropped
stream_options.include_usage      the usage chunk → dropped; its system_fingerprint stands
                                  on the chunk before it, where vLLM puts it unasked
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nextstate.records import Json
from nextstate.wire import obj, objects


@dataclass(frozen=True, slots=True)
class Asked:
    """What the client asked for itself."""

    model: str
    logprobs: bool
    token_ids: bool
    usage: bool

    @staticmethod
    def of(request: Json) -> Asked:
        """Reads a client's chat request."""
        return Asked(
            model=str(request.get("model") or ""),
            logprobs=bool(request.get("logprobs")),
            token_ids=bool(request.get("return_token_ids")),
            usage=bool(obj(request.get("stream_options")).get("include_usage")),
        )


def upstream_request(request: Json, model: str) -> Json:
    """The client's request with our additions; the client's own object is left as it is."""
    sent = {**request, "model": model, "return_token_ids": True}
    if not request.get("top_logprobs"):
        # With them and without `logprobs` the engine refuses: that answer is the client's to get.
        sent["logprobs"] = True
    if request.get("stream"):
        sent["stream_options"] = {**obj(request.get("stream_options")), "include_usage": True}
    return sent


def client_chunk(chunk: Json, asked: Asked) -> Json | None:
    """A streamed chunk as the client would have seen it; None if it would not have. In place."""
    if "model" in chunk:
        chunk["model"] = asked.model
    choices = objects(chunk.get("choices"))
    if not asked.usage:
        if "usage" in chunk and not choices:
            return None
        chunk.pop("usage", None)
    if not asked.token_ids and "prompt_token_ids" in chunk:
        chunk["prompt_token_ids"] = None
    carries = not choices or "prompt_token_ids" in chunk or asked.logprobs or asked.token_ids
    for choice in choices:
        _strip_choice(choice, asked)
        carries = carries or bool(choice.get("delta")) or choice.get("finish_reason") is not None
    return chunk if carries else None


def client_reply(reply: Json, asked: Asked) -> Json:
    """A plain reply as the client would have seen it, in place."""
    if "model" in reply:
        reply["model"] = asked.model
    if not asked.token_ids and "prompt_token_ids" in reply:
        reply["prompt_token_ids"] = None
    for choice in objects(reply.get("choices")):
        _strip_choice(choice, asked)
    return reply


def _strip_choice(choice: dict[str, Any], asked: Asked) -> None:
    if not asked.logprobs and "logprobs" in choice:
        choice["logprobs"] = None
    if not asked.token_ids and "token_ids" in choice:
        choice["token_ids"] = None
