"""Refuses requests that could end the engine for everyone or name an adapter directly."""

from __future__ import annotations

import hashlib
from collections.abc import Sized
from typing import Any, cast

from nextstate.engine.process import VOTE_PRIORITY
from nextstate.records import Json
from nextstate.wire import integer, obj
from proxy.answers import Refused
from proxy.dialects.chat import is_off
from proxy.schemas import excess

_ADMIN = frozenset(
    ("load_lora_adapter", "unload_lora_adapter", "reset_prefix_cache", "sleep", "wake_up")
)
_DOTS = frozenset((".", ".."))
_LONGEST = {
    **{"logit_bias": 1024, "allowed_token_ids": 1024, "stop_token_ids": 128, "bad_words": 128},
    **{"logprob_token_ids": 128, "stop": 1024},
}
"""Entries that vLLM's GPU worker has room for. It checks too late, and the engine ends."""
_LOGPROBS = frozenset(("logprobs", "top_logprobs"))
_MOST_CHOICES = 1024
"""`n` for each prompt: each choice is a sequence in the engine."""
_MOST_LOGPROBS = 1024
"""Log-probs of other tokens for each token. vLLM's own default limit is 20."""
_LONGEST_REPETITION = 1024
"""Tokens of a repeated pattern. The engine searches for it after each token, while others wait."""
_LONGEST_SALT = 128
_NOT_IN_SALT = frozenset("@/\\\x00")


def administers(path: str) -> bool:
    """Whether a decoded path leads to a route that administers the engine."""
    return not _ADMIN.isdisjoint(path.split("/"))


def leads_out(path: str) -> bool:
    """Whether a decoded path has segments that a server or client may resolve: `.` or `..`."""
    return not _DOTS.isdisjoint(path.split("/"))


def refusal(body: Json, *, names_adapter: bool) -> Refused | None:
    """Why a request under /v1/ must not reach the engine, or None.

    Prompt log-probs end the whole engine on a CPU while an adapter is loaded, and cost gigabytes on
    a GPU (vLLM issues 5907 and 14239). `echo` asks for them too, in the engine's own words.
    """
    if names_adapter:
        name = body.get("model")
        return Refused(404, f"The model `{name}` does not exist.")
    if body.get("prompt_logprobs") is not None:
        return Refused(400, "prompt_logprobs is not available while adapters are served.")
    if not is_off(body.get("echo")) and (body.get("logprobs") is not None or "messages" in body):
        return Refused(400, "echo with log-probs is not available while adapters are served.")
    message = _too_many(body) or excess(body)
    return None if message is None else Refused(400, message)


def tame(body: Json, lineage: str, *, salted: bool) -> None:
    """Changes, in place, the fields with which one client could harm others.

    A priority is kept between that of agents that name none and that of the judge's votes. If
    `salted`, each lineage gets a prefix cache of its own, so that no lineage can tell from the
    speed what another has asked: the salt is made of the lineage and the client's own salt.
    """
    if (priority := integer(body.get("priority"))) is not None:
        body["priority"] = min(max(priority, 0), VOTE_PRIORITY - 1)
    salt = body.get("cache_salt")
    if salted and (salt is None or _is_salt(salt)):  # the engine refuses any other
        both = repr((lineage, salt)).encode(errors="surrogatepass")
        body["cache_salt"] = hashlib.blake2b(both, digest_size=16).hexdigest()


def _is_salt(value: object) -> bool:
    """Whether the engine accepts it as a salt."""
    return (
        isinstance(value, str) and 0 < len(value) <= _LONGEST_SALT and not _NOT_IN_SALT & {*value}
    )


def _too_many(body: Json) -> str | None:
    """What a request asks for too much of, or None."""
    name, choices = "n", 1
    for asked in ("n", "best_of"):
        if asked in body and (number := integer(body[asked]) or 1) > choices:
            name, choices = asked, number
    prompts = prompts_of(body)
    if max(choices, 1) * prompts > _MOST_CHOICES:
        asked = f"{name} = {choices}" + ("" if prompts == 1 else f" for {prompts} prompts")
        return f"{asked}: at most {_MOST_CHOICES} choices."
    for name in sorted(_LONGEST.keys() & body.keys()):
        entries, longest = body[name], _LONGEST[name]
        if isinstance(entries, (list, dict)) and len(cast(Sized, entries)) > longest:
            return f"{name} has {len(cast(Sized, entries))} entries: at most {longest}."
    for name in sorted(_LOGPROBS & body.keys()):
        if (integer(body.get(name)) or 0) > _MOST_LOGPROBS:
            return f"{name} = {body[name]!s:.40}: at most {_MOST_LOGPROBS}."
    if "repetition_detection" not in body:
        return None
    detection = obj(body["repetition_detection"])
    if (integer(detection.get("max_pattern_size")) or 0) > _LONGEST_REPETITION:
        size = detection["max_pattern_size"]
        return (
            f"repetition_detection.max_pattern_size = {size!s:.40}: at most {_LONGEST_REPETITION}."
        )
    return None


def prompts_of(body: Json) -> int:
    """How many prompts a request holds. Each gets its own choices."""
    several = 0
    for name, one in (("prompt", (int, float)), ("prompt_embeds", int), ("messages", dict)):
        found = body.get(name)
        entries = cast("list[Any]", found) if isinstance(found, list) else []
        if entries and not isinstance(entries[0], one):
            several += len(entries)
    return max(several, 1)
