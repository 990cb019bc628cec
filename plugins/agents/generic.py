"""An agent without an envelope: every turn is its own work, every message that follows counts."""

from __future__ import annotations

from nextstate.hooks import AgentProfile, text_of
from nextstate.records import Json, TurnKind


class Generic:
    """The profile of any OpenAI client."""

    name = "generic"

    def kind(self, request: Json) -> TurnKind:
        """Always a main turn."""
        return TurnKind.MAIN

    def session(self, name: str) -> str:
        """The name as it is."""
        return name

    def next_state_text(self, message: Json) -> str | None:
        """The message's text; None when it has none."""
        text = text_of(message.get("content"))
        if message.get("role") == "tool":
            return text or None
        return text.strip() or None


def create(settings: object) -> AgentProfile:
    """Takes no settings."""
    return Generic()
