"""What an agent sees of a text that is too long for it."""

from __future__ import annotations

MOST_SHOWN = 16_000
"""Characters of an observation."""


def beginning_of(text: str) -> str:
    """A text of up to `MOST_SHOWN` characters, or the beginning of a longer one."""
    if len(text) <= MOST_SHOWN:
        return text
    return f"{text[:MOST_SHOWN]}\n{_left_out(len(text) - MOST_SHOWN)}"


def both_ends_of(text: str, most: int) -> str:
    """A text of up to `most` characters, or the beginning and the end of a longer one."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n{_left_out(len(text) - 2 * half)}\n{text[-half:]}"


def _left_out(characters: int) -> str:
    return f"[{characters} characters are left out]"
