"""OpenClaw's envelope, as its releases 2026.7 to 2026.9 send it.

Every main request ends with a machine-made carrier message that later requests do not repeat; human
text is stamped with the time, and wrapped anew after a failed request; the first message of a
session ends with a line about the runtime. Titles, `/btw`, compaction, memory flushes and
heartbeats are requests of the agent's own.
"""

from __future__ import annotations

import re

from nextstate.hooks import AgentProfile, text_of
from nextstate.records import Json, TurnKind

_CARRIER = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"
_STAMP = re.compile(r"^\[\w{3} \d{4}-\d\d-\d\d \d\d:\d\d [\w+:/-]+\] ")
_RUNTIME = re.compile(r"\n\nRuntime: agent=[^\n]*\Z")
_SENT_AGAIN = re.compile(
    r"\A\[Queued user message from a previous active turn[^\]\n]*\]\n(.*?)"
    r"(?:\n\nContinue the current task [^\n]*)?",
    re.DOTALL,
)
"""What it makes of a person's message when the request with it has failed."""
_EPOCH = re.compile(r":\d+\Z")
_COMMAND = re.compile(r"/[a-z][a-z_-]*\Z")
_HOUSEKEEPING = (
    "Follow the heartbeat monitor scratch context",
    "Pre-compaction memory flush.",
)
_SIDE_PROMPTS = (
    "You are answering an ephemeral /btw side question",
    "You are a context summarization assistant",
    "Generate a concise session title",
)
_MACHINE_MADE = (
    *_HOUSEKEEPING,
    _CARRIER,
    "[Queued user message from a previous active turn",
    "Continue the current task",
    "A background task completed.",
    "[Subagent Context]",
    "Answer this side question only.",
    "The conversation history before this point was compacted into the following summary:",
    "[OpenClaw heartbeat poll]",
)


class OpenClaw:
    """The profile of OpenClaw on its `openai-completions` provider."""

    name = "openclaw"

    def kind(self, request: Json) -> TurnKind:
        """Side for OpenClaw's own requests, main for the user's and the subagents'."""
        messages: list[Json] = request.get("messages") or []
        first = text_of(messages[0].get("content")) if messages else ""
        asked = [_text(m) for m in messages if m.get("role") == "user"]
        asked = [text for text in asked if not text.startswith(_CARRIER)]
        last = asked[-1] if asked else ""
        side = first.startswith(_SIDE_PROMPTS) or last.startswith(_HOUSEKEEPING)
        return TurnKind.SIDE if side else TurnKind.MAIN

    def session(self, name: str) -> str:
        """`<sessionId>` of `<sessionId>:<epoch>`: compaction raises the epoch, the talk goes on."""
        return _EPOCH.sub("", name)

    def next_state_text(self, message: Json) -> str | None:
        """The person's own words, or a tool's output; None for what OpenClaw wrote itself.

        A typed command such as `/compact` speaks to OpenClaw, not about the reply.
        """
        if message.get("role") == "tool":
            return text_of(message.get("content")) or None
        text = _text(message)
        if text.startswith(_MACHINE_MADE) or _COMMAND.match(text):
            return None
        return text or None


def _text(message: Json) -> str:
    text = _STAMP.sub("", text_of(message.get("content")).strip())
    text = _RUNTIME.sub("", text).strip()
    again = _SENT_AGAIN.fullmatch(text)
    return again[1].strip() if again else text


def create(settings: object) -> AgentProfile:
    """Takes no settings."""
    return OpenClaw()
