"""Texts of people and models for a page: what is invisible is shown, what is huge is cut."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from nextstate.hooks import text_of
from nextstate.records import Json
from nextstate.wire import objects, write_json

MOST_SHOWN = 6000
"""Characters of one message; the rest stands behind a link."""
_SHORT = 240
"""Characters of one text in a list."""
_TAGS = range(0xE0000, 0xE0080)
"""Invisible copies of ASCII, which hide instructions in a text."""
_OTHERS = (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180E, 0x2028, 0x2029, 0x3164, 0xFEFF, 0xFFA0)
_KEPT = {"\n", "\t", "\u200c", "\u200d"}
"""A line break, a tab, and the joiners that several scripts and emoji need."""


def _hidden() -> dict[int, str]:
    """Control characters, marks of direction and other invisible ones, each with its code."""
    low = (c for c in range(0x3000) if unicodedata.category(chr(c)) in ("Cc", "Cf"))
    codes = (*low, *_TAGS, *_OTHERS, *range(0xFFF9, 0xFFFC), *range(0xD800, 0xE000))
    return {code: f"⟦U+{code:04X}⟧" for code in codes if chr(code) not in _KEPT}


_HIDDEN = _hidden()


def visible(text: str) -> str:
    """The text with a mark in place of each character that could hide or reorder others.

    >>> visible("a\\u202eb\\x00")
    'a⟦U+202E⟧b⟦U+0000⟧'
    """
    return text.replace("\r\n", "\n").translate(_HIDDEN)


def short(text: str) -> str:
    """The beginning of a text, in one line."""
    # Cut first: nothing is done with the rest of a huge text.
    line = " ".join(text[: 4 * _SHORT].split())
    cut = len(line) > _SHORT or len(text) > 4 * _SHORT
    return visible(line[:_SHORT]) + ("…" if cut else "")


@dataclass(frozen=True, slots=True)
class Said:
    """One message as a page shows it."""

    who: str
    name: str
    """Under which its whole text is found: `m0` for a message, `reply`, `s0` for a next state."""
    text: str

    @property
    def shown(self) -> str:
        return visible(self.text[:MOST_SHOWN])

    @property
    def left(self) -> int:
        """How many characters are cut off."""
        return max(len(self.text) - MOST_SHOWN, 0)


def message_text(message: Json) -> str:
    """A message's words, the kinds of what was attached, and its tool calls."""
    content = message.get("content")
    parts = [text_of(content)]
    for part in objects(content):
        if not isinstance(part.get("text"), str):
            parts.append(f"[{str(part.get('type') or 'part')[:40]}]")
    for name in ("reasoning_content", "reasoning"):
        if isinstance(thought := message.get(name), str) and thought:
            parts.insert(0, f"[thoughts] {thought}")
            break
    for call in objects(message.get("tool_calls")):
        parts.append(f"[tool call] {_json(call.get('function', call))}")
    return "\n".join(part for part in parts if part)


def _json(value: object) -> str:
    return write_json(value).decode(errors="replace")
