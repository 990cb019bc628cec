"""What a person may want of every reply, apart from its being right.

A wish has the words that would be put into the prompt, a check that needs no model, and what the
person says about a reply that does not fulfil it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

USER = "Mia"
"""The name of the person."""
MOST_WORDS = 16
"""Of one short sentence."""

_MARKUP = re.compile(r"\*|__|`|#|^[ \t]*(?:\d+[.)]|[-•])\s", re.MULTILINE)
_ABBREVIATION = re.compile(r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|U\.S|U\.K)\.(?=\s)")
_END = re.compile(r"[.!?](?=\s|$)")


@dataclass(frozen=True, slots=True)
class Wish:
    """One lasting wish of a person."""

    name: str
    instruction: str
    """The wish as a sentence that could stand in the prompt."""
    satisfied: Callable[[str], bool]
    """Whether a reply's text fulfils it, right or wrong."""
    dislikes: tuple[str, ...]
    """What the person finds wrong with other replies."""
    orders: tuple[str, ...]
    """What the person asks for instead."""


def sentences(reply: str) -> int:
    """How many sentences a text has; one without an end mark counts."""
    text = _ABBREVIATION.sub("x", reply.strip())
    rest = _END.split(text)
    return sum(bool(part.strip()) for part in rest)


def is_short(reply: str) -> bool:
    """One plain whole sentence of at most `MOST_WORDS` words."""
    text = reply.strip()
    return (
        text.endswith((".", "!"))
        and "\n" not in text
        and not _MARKUP.search(text)
        and sentences(text) == 1
        and 2 <= len(text.split()) <= MOST_WORDS
    )


def is_named(reply: str) -> bool:
    """Calls the person by name and ends with a question."""
    return re.search(rf"\b{USER}\b", reply) is not None and reply.strip().endswith("?")


def is_cheerful(reply: str) -> bool:
    """At most two plain sentences, and the last one ends with an exclamation mark."""
    text = reply.strip()
    return text.endswith("!") and not _MARKUP.search(text) and 1 <= sentences(text) <= 2


WISHES: Mapping[str, Wish] = {
    wish.name: wish
    for wish in (
        Wish(
            "short",
            "Answer in one short sentence.",
            is_short,
            (
                "That is too long.",
                "That is far too long for me.",
                "Too many words.",
                "I don't like long answers.",
                "This is more than I wanted to read.",
            ),
            (
                "Please answer in one short sentence.",
                "Just one short sentence, please.",
                "Please answer with one short, plain sentence.",
                "Please keep it to one short sentence.",
                "Please use only one short sentence.",
            ),
        ),
        Wish(
            "named",
            f"Call me {USER} and end your answer with a question to me.",
            is_named,
            (
                "That is too impersonal.",
                "This sounds like a machine.",
                "That is too cold.",
                "You sound like a book.",
                "I don't like the tone.",
            ),
            (
                f"Your answer should call me {USER} and end with a question to me.",
                f"Please say it again with my name, {USER}, and a question at the end.",
                f"Please use my name, {USER}, in your answer and end it with a question.",
            ),
        ),
        Wish(
            "cheerful",
            "Be cheerful: answer in one sentence that ends with an exclamation mark.",
            is_cheerful,
            (
                "That is so dry.",
                "That is boring.",
                "This sounds tired.",
                "That is too stiff.",
                "I don't like the tone.",
            ),
            (
                "Your answer should be cheerful and end with an exclamation mark.",
                "Please say it in one cheerful sentence that ends with an exclamation mark.",
                "Please write your answer as one cheerful sentence with an exclamation mark.",
            ),
        ),
    )
}
