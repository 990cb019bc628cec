"""A request in another wire format, translated for the chat route."""

from __future__ import annotations

from dataclasses import dataclass

from nextstate.records import Json


@dataclass(frozen=True, slots=True)
class Translation:
    """A request in chat form, and whether the chat route serves it exactly."""

    chat: Json
    """This is recorded, linked and judged. If `native` is None, the engine gets it too."""
    native: str | None
    """Why the request must be relayed unchanged, so that its tokens are not known; or None."""
