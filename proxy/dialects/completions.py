"""`/v1/completions`: what NextState adds to a request upstream, and takes out of the reply.

As for chat, with the log-probs' own shape (`logprobs = 0` brings those of the sampled tokens) and
the prompt's ids on each choice. Nothing is added to a request with `echo`, and nothing taken out:
asked for token ids the engine leaves the echoed text out, and asked for log-probs it computes those
of the prompt; its stream holds the prompt's ids unasked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from nextstate.records import Json
from nextstate.wire import obj, objects
from proxy.dialects.chat import (
    Asked,
    count,
    is_off,
    strip_choice,
    with_token_ids,
    with_usage,
    without_usage,
)


def upstream_request(request: Json, model: str) -> Json:
    """The client's request with our additions; the client's own object is left as it is."""
    if not is_off(request.get("echo")):
        return {**request, "model": model}
    sent = with_token_ids({**request, "model": model})
    if request.get("logprobs") is None:
        sent["logprobs"] = 0
    return with_usage(sent)


def asked_for(request: Json, model: str) -> Asked:
    """What the reply to a client's request, which named `model`, has for the client."""
    if not is_off(request.get("echo")):
        return Asked(model, logprobs=True, token_ids=True, usage=True)
    # `logprobs` is a count here: 0 asks for those of the sampled tokens alone.
    return replace(Asked.of(request, model), logprobs=request.get("logprobs") is not None)


def client_chunk(chunk: Json, asked: Asked, fingerprint: str | None) -> Json | None:
    """A streamed chunk as the client would have seen it; None if it would not have."""
    sent = without_usage(chunk, asked, fingerprint)
    if sent is not None:
        _strip(objects(sent.get("choices")), asked)
    return sent


def client_reply(reply: Json, asked: Asked) -> Json:
    """A plain reply as the client would have seen it, in place."""
    if "model" in reply:
        reply["model"] = asked.model
    _strip(objects(reply.get("choices")), asked)
    return reply


def choices_of(request: Json) -> int:
    """How many choices the reply has: `n` for each prompt."""
    found = request.get("prompt")
    prompts = cast("list[object]", found) if isinstance(found, list) else []
    several = bool(prompts) and not isinstance(prompts[0], (int, float))
    return count(request) * (len(prompts) if several else 1)


def to_chat(request: Json) -> Json:
    """The request in chat form, as it is recorded: the prompt is what the user said."""
    prompt = request.get("prompt")
    rest = {key: value for key, value in request.items() if key != "prompt"}
    if not isinstance(prompt, str):
        return {"messages": [], "prompt": prompt, **rest}
    return {"messages": [{"role": "user", "content": prompt}], **rest}


def as_chat(reply: Json) -> Json:
    """A chunk or a whole reply in chat form, as it is captured; the engine's own stays as it is."""
    choices: list[Json] = []
    ids: list[int] | None = None
    for choice in objects(reply.get("choices")):
        ids = choice.get("prompt_token_ids") or ids
        text = {"content": choice.get("text")}
        logprobs: list[float] = obj(choice.get("logprobs")).get("token_logprobs") or []
        content = [{"logprob": value} for value in logprobs]
        choices.append({**choice, "delta": text, "message": text, "logprobs": {"content": content}})
    return {**reply, "choices": choices, "prompt_token_ids": ids}


def _strip(choices: list[Json], asked: Asked) -> None:
    for choice in choices:
        strip_choice(choice, asked)
        if not asked.token_ids and "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = None
