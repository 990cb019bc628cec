"""How often the proxy looks for changes, and how long it waits. Only tests change these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Intervals:
    """All in seconds."""

    store_poll_s: float = 0.05
    """Between looks at the serving versions in the store."""
    told_poll_s: float = 3.0
    """The same, beside what a database on a server tells of changes."""
    health_poll_s: float = 1.0
    """Between looks at an engine that serves."""
    down_poll_s: float = 0.2
    """Between looks at an engine that does not answer."""
    slowest_poll_s: float = 5.0
    """The pause doubles up to this for an engine that answers and cannot serve."""
    quiet_start_s: float = 5.0
    """After the start an engine that does not answer is not logged for this long."""
    look_again_s: float = 300.0
    """Between looks for what an engine lacked: behind a gateway it may be restarted unseen. Each
    look generates a token or two, which somebody may pay for."""
    flip_s: float = 5.0
    """How long a new version waits for those of several engines that have not loaded it."""
    unload_again_s: float = 10.0
    """Before an adapter that could not be unloaded is unloaded again."""
    writer_s: float = 10.0
    """How long the start waits for the writer, which takes half a second, longer under load."""
    keep_alive_s: float = 5.0
    """Between SSE comments while a streamed request waits for the engine."""
    drain_s: float = 10.0
    """How long the end waits for replies that are not recorded yet."""
    beat_s: float = 1.0
    """Between the signs of life of one worker to the others."""
    told_beat_s: float = 4.0
    """The same, where each is a question to a server."""
    keys_s: float = 0.5
    """Between looks at the keys in the store: a revoked one stops within two seconds."""
    told_keys_s: float = 1.5
    """The same, where each is a question to a server."""
    checkpoint_s: float = 0.5
    """Between checkpoints of the store."""
    head_s: float = 20.0
    """A request's head must be whole this long after its first byte. A connection's first head must
    be whole this long after the connection was made."""
    first_request_s: float = 1.0
    """A new connection is not idle for this long."""
    body_s: float = 30.0
    """How long a body may take, however slowly it comes."""
    look_s: float = 1.0
    """Between looks at a head or body that is not whole."""


INTERVALS = Intervals()
