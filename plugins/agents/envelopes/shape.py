"""The one shape of every agent's table of marks.

A mark is a beginning, or a tag whose block stands on lines of its own. What is unmistakable holds
for every profile, detected or not: agents change their system prompts, and run inside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agent:
    """How one agent, or one family of them, is known and what it writes."""

    name: str
    signs: Sequence[str] = ()
    """Stand in its system prompt and in nobody else's."""
    first_words: Sequence[str] = ()
    """Its messages in the user role that give it away begin so."""
    side_system: Sequence[str] = ()
    """A part of the system prompt of its housekeeping requests begins so."""
    side_asked: Sequence[str] = ()
    """The last message of its housekeeping requests begins so."""
    carriers: Sequence[str] = ()
    """What it puts behind the last message of every request begins so."""
    notes: Sequence[str] = ()
    """Tags around its notes for the model."""
    words: Sequence[str] = ()
    """Tags around a person's words."""
    housekeeping: Sequence[str] = ()
    """Messages that it writes itself begin so."""
    observations: Sequence[str] = ()
    """Messages that tell the model what became of its reply begin so."""
    led: Sequence[str] = ()
    """What it puts before a person's words; alone it is a note."""
    side: Callable[[str], bool] | None = None
    """Whether the last message is a housekeeping request, where beginnings do not tell."""
    shared: Callable[[str], str | None] | None = None
    """A person's words in an envelope that is unmistakable and more than marks; None if a text is
    not one."""
    own: Callable[[str], str | None] | None = None
    """What a person or a mark may have in a text, out of an envelope that is this agent's alone;
    None where the agent spoke."""
    session: Callable[[str], str] | None = None
    """The client's name of a session without what changes while the conversation goes on."""
