"""`[proxy]` and `[agents]`: where agents connect, and what is known about them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from nextstate.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ProxyRecipe:
    """What nobody needs to choose. No file sets it; tests may, in code."""

    hold_s: float = 120.0
    """How long requests wait for an engine that is down or restarting. vLLM is ready again after 32
    to 60 s on two cores, and OpenClaw waits 300 s for a first event."""
    max_body_mb: int = 64
    """The largest body of a request, in MB: the longest contexts with pictures are far below it."""
    record_timeout_s: float = 0.25
    """How long the end of a reply waits for its record; later records are still kept. The wait was
    41 ms at the 95th percentile with a load of 18 on two cores (benchmarks/results/proxy.md)."""


@dataclass(frozen=True, slots=True)
class ProxyConfig(ProxyRecipe):
    """`[proxy]`"""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key_env: str = ""
    """Environment variable with a key that may do everything; needed beyond loopback."""
    tls_certificate: str = ""
    """A PEM file with the certificate, and those between it and its issuer; empty: plain HTTP."""
    tls_key: str = ""
    """The PEM file of its private key."""
    workers: Annotated[int, Ge(1)] = 1
    """Processes that serve on the one port."""

    def __post_init__(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            given, missing = (
                ("certificate", "key") if self.tls_certificate else ("key", "certificate")
            )
            raise ConfigError(f"[proxy] tls_{given} is set without tls_{missing}: set both or none")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"[proxy] port = {self.port}: expected 0 to 65535")
        if self.workers > 1 and self.port == 0:
            raise ConfigError(
                f"[proxy] workers = {self.workers} share one port, and [proxy] port = 0 gives each "
                "its own: name a port"
            )

    @property
    def url(self) -> str:
        """Where it is reached from this machine, without /v1."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_certificate else 'http'}://{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether `host` is reachable from this machine only."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, slots=True)
class AgentsConfig:
    """`[agents]`"""

    profile: str = "auto"
    """The plugin in plugins/agents/ that knows your agent's envelope; `auto` finds it out of each
    request."""


@dataclass(frozen=True, slots=True)
class LineageConfig:
    """`[lineages.NAME]`: who trains the lineage NAME instead of `main`."""

    model: str = ""
    """The model name that reaches it; replies carry this name."""
    api_key_env: str = ""
    """Environment variable with the key that reaches it, under any of its names."""
