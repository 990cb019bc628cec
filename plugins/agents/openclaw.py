"""OpenClaw, for every request."""

from __future__ import annotations

from nextstate.hooks import AgentProfile
from plugins.agents.envelopes.known import OPENCLAW
from plugins.agents.profile import Profile


def create(settings: object) -> AgentProfile:
    """Takes no settings."""
    return Profile(OPENCLAW)
