"""What every dialect makes of a client's request."""

from __future__ import annotations

from dataclasses import dataclass

from nextstate.records import Json


@dataclass(frozen=True, slots=True)
class Translation:
    """A request of another dialect, in chat form."""

    chat: Json
    """The request as a chat completion, without our envelope's additions: what is recorded, linked
    and judged, and what is sent when `native` is None. Best effort when `native` is set."""
    native: str | None
    """Why the request must be relayed as it is ("… so its tokens are not known"), or None when the
    chat route serves it exactly."""
