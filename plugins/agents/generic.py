"""An agent that nobody asks about: what any known agent writes unmistakably is still no person's."""

from __future__ import annotations

from nextstate.hooks import AgentProfile
from plugins.agents.profile import GENERIC, Profile


def create(settings: object) -> AgentProfile:
    """Takes no settings."""
    return Profile(GENERIC)
