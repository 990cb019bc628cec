"""What a dialect says about one request that another route may serve."""

from __future__ import annotations

from dataclasses import dataclass

from nextstate.records import Json


@dataclass(frozen=True, slots=True)
class Translation:
    """A request in chat form, and whether the chat route serves it exactly."""

    chat: Json
    """What is recorded, linked and judged; and what the engine gets when `native` is None."""
    native: str | None
    """Why the request must be relayed as it is, so that its tokens are not known; or None."""
