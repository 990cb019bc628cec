"""OpenClaw, for every request."""

from __future__ import annotations

from nextstate.hooks import AgentProfile
from plugins.agents.envelopes.openclaw import AGENT
from plugins.agents.profile import Profile


def create(settings: object) -> AgentProfile:
    """Takes no settings."""
    return Profile(AGENT)
