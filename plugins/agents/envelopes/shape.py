"""What is known of one agent: marks in the texts that it sends, and functions where marks fail.

A mark is the beginning of a text, or a tag whose block stands on lines of its own. A mark that no
person would write holds in every profile: agents change their system prompts and run inside each
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agent:
    """How to recognise one agent, or one family of them, and what it writes itself."""

    name: str
    signs: Sequence[str] = ()
    """Stand anywhere in its system prompt and in nobody else's."""
    first_words: Sequence[str] = ()
    """Beginnings of messages in the user role that only this agent sends."""
    side_system: Sequence[str] = ()
    """Beginnings of a part of the system prompt of its side turns."""
    side_asked: Sequence[str] = ()
    """Beginnings of the last message of its side turns."""
    carriers: Sequence[str] = ()
    """Beginnings of what it puts behind the last message of every request."""
    notes: Sequence[str] = ()
    """Tags around its notes for the model."""
    words: Sequence[str] = ()
    """Tags around a person's words."""
    housekeeping: Sequence[str] = ()
    """Beginnings of messages in the user role that it writes itself."""
    observations: Sequence[str] = ()
    """Beginnings of messages that tell the model what became of its reply."""
    prefixes: Sequence[str] = ()
    """What it puts before a person's words; alone it is a note."""
    is_side: Callable[[str], bool] | None = None
    """Whether the last message belongs to a side turn, where its beginning does not tell."""
    read_shared: Callable[[str], str | None] | None = None
    """A person's words out of an envelope that only this agent writes, for every profile; None
    where a text is not in that envelope."""
    read_own: Callable[[str], str | None] | None = None
    """What is left of a text without the envelope, for this agent's profile alone; None where the
    agent wrote it."""
    session_name: Callable[[str], str] | None = None
    """The client's name of a session without what changes while the conversation goes on."""
