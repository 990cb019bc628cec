"""What an agent must know of the proxy."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field

PROVIDER = "nextstate"
"""The name under which agents list the proxy among their providers."""


@dataclass(frozen=True, slots=True)
class Target:
    """The proxy, and the model that the agent asks it for."""

    url: str
    """The proxy's address, without /v1."""
    model: str
    key: str | None = None
    """The key that the proxy asks for; None if it asks for none."""
    key_variable: str = ""
    """The environment variable with that key; empty without a key."""
    tls: ssl.SSLContext | bool = field(default=True, repr=False, compare=False)
    """How this machine trusts the proxy, as aiohttp's `ssl`."""
    context: int | None = None
    """Tokens of the model's context; None if nobody said it."""

    @property
    def api(self) -> str:
        """The base URL of an OpenAI client."""
        return f"{self.url}/v1"

    @property
    def written_key(self) -> str:
        """The key as it stands in a settings file. Most clients refuse an empty one."""
        return self.key or "unused"
