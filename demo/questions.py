"""Simple questions with the words that a right answer contains.

`practice` is what a person asks in conversations, `held_out` what versions are measured on, and
`retention` other questions and instructions, which nobody ever trains on. No question is in two of
them. They are questions that SmolLM2-135M-Instruct mostly answers right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

FOLDER = Path(__file__).parent / "questions"
Part = Literal["practice", "held_out", "retention"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question."""

    question: str
    """The message text that asks."""
    keywords: tuple[str, ...]
    """Any of them, as whole words in any case, makes a reply right."""

    def is_right(self, reply: str) -> bool:
        """Whether a reply contains a keyword; its style does not count."""
        return any(
            re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reply, re.IGNORECASE)
            for word in self.keywords
        )


@cache
def questions(part: Part) -> tuple[Question, ...]:
    """All questions of a part, in a fixed order."""
    found: list[Question] = []
    for line in (FOLDER / f"{part}.txt").read_text("utf-8").splitlines():
        question, _, keywords = line.partition("|")
        found.append(Question(question, tuple(word.strip() for word in keywords.split(","))))
    return tuple(found)


def asked(seed: str) -> Iterator[Question]:
    """Practice questions without end, each as often as any other, in an order by the seed."""
    rng = Random(seed)
    while True:
        yield from rng.sample(questions("practice"), len(questions("practice")))
