"""A person in natural language: asks a question, reads the reply, says what was wrong with it.

Right and as the person wishes: thanks. Right, but not so: a complaint that says what is wished.
Wrong: a correction. Then comes the next question. The person has one wish and says it only as a
reaction, never in a question.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from demo.personas import Kind
from demo.questions import Question
from demo.wishes import Wish

_THANKS = (
    "Thank you, that is just right.", "Perfect, thanks!", "Great answer, thank you.",
    "Thanks, exactly what I wanted.", "Very good, thank you.", "Lovely, thanks.",
    "Yes, just like that. Thanks!", "Nice, that is how I like it.",
)  # fmt: skip
_WRONG = (
    "That is wrong.", "No, that is not correct.", "That is not right.", "This is wrong.",
    "You made a mistake.",
)  # fmt: skip
_RIGHT_IS = ("The right answer is {}.", "It is {}.", "The correct answer is {}.")
_NEXT = ("Next question: ", "Another question: ", "Now this one: ", "One more: ", "Next one: ")


@dataclass(frozen=True, slots=True)
class Said:
    """A message of the person."""

    text: str
    kind: Kind | None
    """What it says about the reply before it; None for the first message."""


def react(wish: Wish, question: Question, reply: str, rng: Random) -> Said:
    """What the person says about a reply, without the next question."""
    pleased = wish.satisfied(reply)
    if question.is_right(reply):
        if pleased:
            return Said(rng.choice(_THANKS), Kind.THANKS)
        return Said(_complaint(wish, rng), Kind.STYLE)
    if not reply.strip():
        return Said("Your answer is empty. Please try again.", Kind.BROKEN)
    parts = [rng.choice(_WRONG), rng.choice(_RIGHT_IS).format(question.keywords[0])]
    if not pleased:
        parts.append(rng.choice(wish.orders))
    return Said(" ".join(parts), Kind.CORRECTION)


def _complaint(wish: Wish, rng: Random) -> str:
    order = rng.choice(wish.orders)
    return order if rng.random() < 0.25 else f"{rng.choice(wish.dislikes)} {order}"


class Conversation:
    """One conversation of `exchanges` questions; the last message is only a reaction."""

    def __init__(
        self, wish: Wish, questions: Iterator[Question], rng: Random, exchanges: int
    ) -> None:
        self._wish = wish
        self._questions = questions
        self._rng = rng
        self._left = exchanges
        self._question = next(questions)

    def open(self) -> Said:
        """The first message."""
        return Said(self._question.question, None)

    def answer(self, reply: str) -> Said:
        """The next message after a reply."""
        said = react(self._wish, self._question, reply, self._rng)
        self._left -= 1
        if self.is_over:
            return said
        self._question = next(self._questions)
        lead = self._rng.choice(_NEXT)
        return Said(f"{said.text} {lead}{self._question.question}", said.kind)

    @property
    def is_over(self) -> bool:
        """True after the last reaction: the person does not wait for another reply."""
        return self._left <= 0
