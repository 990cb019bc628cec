"""The default profile: it finds out which agent sent a request and reads it as that agent's."""

from __future__ import annotations

from nextstate.hooks import AgentProfile
from nextstate.records import Json
from plugins.agents.envelopes.known import AGENTS
from plugins.agents.envelopes.openclaw import session_of
from plugins.agents.profile import GENERIC, Profile, detected

_PROFILES = {agent.name: Profile(agent) for agent in (GENERIC, *AGENTS)}


class Auto(Profile):
    """The generic profile, until a request shows which agent sent it."""

    def __init__(self) -> None:
        super().__init__(GENERIC)
        self.name = "auto"

    def for_request(self, request: Json) -> AgentProfile:
        """The profile of the agent that sent the request."""
        return _PROFILES[detected(request).name]

    def session(self, name: str) -> str:
        """OpenClaw's short name of a session; other agents' names do not change."""
        return session_of(name)


def create(settings: object) -> AgentProfile:
    """Takes no settings."""
    return Auto()
