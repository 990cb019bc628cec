"""`/v1/completions`: what NextState adds to a request upstream, and takes out of the reply.

As for chat, but log-probs have their own shape (`logprobs = 0` returns those of the sampled tokens)
and each choice has the prompt's ids. A request with `echo` is relayed unchanged: with token ids the
engine leaves the echoed text out, with log-probs it computes those of the prompt, and its stream
has the prompt's ids without being asked.
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
    """A copy of the client's request with our additions."""
    if not is_off(request.get("echo")):
        return {**request, "model": model}
    sent = with_token_ids({**request, "model": model})
    if request.get("logprobs") is None:
        sent["logprobs"] = 0
    return with_usage(sent)


def asked_for(request: Json, model: str) -> Asked:
    """What a client's request, which named `model`, asks for."""
    if not is_off(request.get("echo")):
        return Asked(model, logprobs=True, token_ids=True, usage=True)
    # `logprobs` is a count here: 0 asks for those of the sampled tokens only.
    return replace(Asked.of(request, model), logprobs=request.get("logprobs") is not None)


def client_chunk(chunk: Json, asked: Asked, fingerprint: str | None) -> Json | None:
    """A streamed chunk as the client would get it from the engine; None if it would not."""
    sent = without_usage(chunk, asked, fingerprint)
    for choice in objects(obj(sent).get("choices")):
        strip_choice(choice, asked)
    return sent


def choices_of(request: Json) -> int:
    """How many choices the reply has: `n` for each prompt."""
    found = request.get("prompt")
    prompts = cast("list[object]", found) if isinstance(found, list) else []
    several = bool(prompts) and not isinstance(prompts[0], (int, float))
    return count(request) * (len(prompts) if several else 1)


def to_chat(request: Json) -> Json:
    """The request in chat form, as it is recorded: the prompt is a user message."""
    prompt = request.get("prompt")
    rest = {key: value for key, value in request.items() if key != "prompt"}
    if not isinstance(prompt, str):
        return {"messages": [], "prompt": prompt, **rest}
    return {"messages": [{"role": "user", "content": prompt}], **rest}


def as_chat(reply: Json) -> Json:
    """A copy of a chunk or whole reply in chat form, as it is captured."""
    choices: list[Json] = []
    ids: list[int] | None = None
    for choice in objects(reply.get("choices")):
        ids = choice.get("prompt_token_ids") or ids
        text = {"content": choice.get("text")}
        logprobs: list[float] = obj(choice.get("logprobs")).get("token_logprobs") or []
        content = [{"logprob": value} for value in logprobs]
        choices.append({**choice, "delta": text, "message": text, "logprobs": {"content": content}})
    return {**reply, "choices": choices, "prompt_token_ids": ids}
