"""Requests that could end the engine for everyone, or reach an adapter by its own name: refused."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import cast

from nextstate.records import Json

_ADMIN = frozenset(
    ("load_lora_adapter", "unload_lora_adapter", "reset_prefix_cache", "sleep", "wake_up")
)
_DOTS = frozenset((".", ".."))
_LONGEST = {"logit_bias": 1024, "allowed_token_ids": 1024, "stop_token_ids": 128, "bad_words": 128}
"""Entries that vLLM's GPU worker has room for; it checks too late, and ends with its engine."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the client is told, in the API's error format."""

    status: int
    kind: str
    message: str


def administers(path: str) -> bool:
    """Whether a path, decoded, leads to the engine's administration, however it is spelt."""
    return not _ADMIN.isdisjoint(path.split("/"))


def leads_out(path: str) -> bool:
    """Whether a path, decoded, has segments that a server or a client may resolve: `.` or `..`."""
    return not _DOTS.isdisjoint(path.split("/"))


def refusal(body: Json, *, max_choices: int, names_adapter: bool) -> Refusal | None:
    """Why a request under /v1/ must not reach the engine, or None.

    Prompt log-probs end the whole engine on a CPU while an adapter is loaded, and cost gigabytes on
    a GPU (vLLM issues 5907 and 14239). `echo` asks for them too, in the engine's own words.
    """
    if names_adapter:
        name = body.get("model")
        return Refusal(404, "NotFoundError", f"The model `{name}` does not exist.")
    if body.get("prompt_logprobs") is not None:
        return _bad("prompt_logprobs is not available while adapters are served.")
    if body.get("echo") and (body.get("logprobs") is not None or "messages" in body):
        return _bad("echo with log-probs is not available while adapters are served.")
    choices = body.get("n")
    if isinstance(choices, str | float):  # the engine reads "5" and 5.0 as 5
        try:
            choices = int(choices)
        except (ValueError, OverflowError):
            choices = None
    if not isinstance(choices, int) or choices < 1:
        choices = 1
    prompts = _prompts(body)
    if choices * prompts > max_choices:
        asked = f"n = {choices}" if prompts == 1 else f"n = {choices} for {prompts} prompts"
        return _bad(f"{asked}: at most {max_choices} choices ([proxy] max_choices).")
    for name, longest in _LONGEST.items():
        entries = body.get(name)
        if isinstance(entries, (list, dict)) and len(cast("Sized", entries)) > longest:
            return _bad(f"{name} has {len(cast('Sized', entries))} entries: at most {longest}.")
    return None


def _prompts(body: Json) -> int:
    """How many prompts a request holds, each of which gets its own choices."""
    several = 0
    for name, one in (("prompt", int), ("prompt_embeds", int), ("messages", dict)):
        found = body.get(name)
        entries = cast("list[object]", found) if isinstance(found, list) else []
        if entries and not isinstance(entries[0], one):
            several += len(entries)
    return max(several, 1)


def _bad(message: str) -> Refusal:
    return Refusal(400, "BadRequestError", message)
