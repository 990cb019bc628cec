"""Any client: what some known agent writes unmistakably is no person's here, either."""

from __future__ import annotations

from nextstate.hooks import AgentProfile
from plugins.agents.profile import GENERIC, Profile


def create(settings: object) -> AgentProfile:
    """Takes no settings."""
    return Profile(GENERIC)
