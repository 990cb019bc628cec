"""Who talks to a policy, and how its replies to held-out questions are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Protocol

from demo import checks, person
from demo.personas import Conversation, Kind
from demo.questions import asked, questions
from demo.tasks import Domain, held_out_tasks, task_stream
from demo.wishes import Wish

_EXCHANGES = 4
_TASKS = 256


class Message(Protocol):
    """A user message."""

    @property
    def text(self) -> str:
        """What is sent."""
        ...

    @property
    def kind(self) -> Kind | None:
        """What it says about the reply before it; None for the first of a conversation."""
        ...


class Dialogue(Protocol):
    """One side of a conversation: give it replies, it gives the next message."""

    def open(self) -> Message:
        """The first message."""
        ...

    def answer(self, reply: str) -> Message | None:
        """The next message after a reply; None after the last exchange."""
        ...

    @property
    def is_over(self) -> bool:
        """True if nobody reads the reply to the latest message."""
        ...


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A question that nobody trains on, with the checks of a reply's text."""

    question: str
    is_right: Callable[[str], bool]
    satisfies: Callable[[str], bool]
    """Whether the reply is as the user wants it, right or wrong."""


@dataclass(frozen=True, slots=True)
class World:
    """The users of one run."""

    title: str
    """For "replies to the …"."""
    held_out: Sequence[HeldOut]
    conversations: Callable[[int], Iterator[Dialogue]]
    """The conversations of the user with this number, without end."""


def persona_world(domain: Domain, seed: int) -> World:
    """The student or the teacher of the small world of sums."""

    def conversations(number: int) -> Iterator[Dialogue]:
        rng = Random(f"{domain}/{seed}/{number}")
        tasks = task_stream(domain, seed * 1000 + number, held_out=False)
        while True:
            yield Conversation(tasks, rng, max_exchanges=_EXCHANGES)

    tasks = held_out_tasks(domain, _TASKS)
    found = [
        HeldOut(t.question, partial(checks.is_right, t), partial(checks.satisfies, t))
        for t in tasks
    ]
    return World(f"{domain} persona", found, conversations)


def person_world(wish: Wish, seed: int) -> World:
    """A person with one wish, who asks simple questions: one in a conversation."""

    def conversations(number: int) -> Iterator[Dialogue]:
        rng = Random(f"person/{seed}/{number}")
        practice = asked(f"{seed}/{number}")
        while True:
            yield person.Conversation(wish, practice, rng, exchanges=1)

    found = [HeldOut(q.question, q.is_right, wish.satisfied) for q in questions("held_out")]
    return World(f"person who wants: {wish.instruction}", found, conversations)
