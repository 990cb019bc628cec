"""The default: each request is read as the agent writes it that sent it."""

from __future__ import annotations

from nextstate.hooks import AgentProfile
from nextstate.records import Json
from plugins.agents.envelopes.openclaw import session_of
from plugins.agents.profile import AGENTS, GENERIC, Profile, detected

_PROFILES = {agent.name: Profile(agent) for agent in (GENERIC, *AGENTS)}


class Auto(Profile):
    """Of a request it does not know it is the generic profile."""

    def __init__(self) -> None:
        super().__init__(GENERIC)
        self.name = "auto"

    def of(self, request: Json) -> AgentProfile:
        """The profile of the agent that sent the request."""
        return _PROFILES[detected(request).name]

    def session(self, name: str) -> str:
        """The other name that a session may have, where no request tells whose it is."""
        return session_of(name)


def create(settings: object) -> AgentProfile:
    """Takes no settings."""
    return Auto()
