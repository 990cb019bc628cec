"""Any client. Marks that only an agent writes hold here too."""

from __future__ import annotations

from nextstate.hooks import AgentProfile
from plugins.agents.profile import GENERIC, Profile


def create(settings: object) -> AgentProfile:
    """Takes no settings."""
    return Profile(GENERIC)
