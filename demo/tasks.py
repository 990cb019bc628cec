"""The demo's world: word problems and pupils' sums, with the facts that decide what is right.

A task belongs to a domain (who asks) and a family (which operation). Its facts, not its wording,
decide on which side of the split it falls, so no rephrasing of a held-out question is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from random import Random

HELD_OUT_PERCENT = 15


class Domain(StrEnum):
    """Who asks."""

    STUDENT = "student"
    TEACHER = "teacher"


class Family(StrEnum):
    """The one operation a task needs."""

    ADD = "add"
    TAKE = "take"
    GROUPS = "groups"


NAMES = (
    "Mia", "Tom", "Ana", "Ben", "Lea", "Sam", "Eva", "Max", "Ida", "Leo", "Zoe", "Jon",
)  # fmt: skip
THINGS = (
    "apples", "pens", "books", "coins", "cards", "stickers",
    "eggs", "cookies", "marbles", "stamps", "shells", "keys",
)  # fmt: skip
SIGNS = {Family.ADD: "+", Family.TAKE: "-", Family.GROUPS: "x"}

_STUDENT_OPENERS = (
    "", "", "", "", "Can you help me? ", "I need help with this one: ", "Please help: ", "Hi! ",
    "My homework says: ", "I am stuck here: ", "A question: ",
)  # fmt: skip
_STUDENT_QUESTIONS = {
    Family.ADD: (
        "{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?",
        "Yesterday {n} found {a} {t}, and today {b} more. How many {t} does {n} have?",
        "{n} buys {a} {t} and then {b} more. How many {t} is that?",
        "{n} had {a} {t} and was given {b} more. What is the total?",
        "If {n} owns {a} {t} and wins {b} more, how many {t} does {n} have in all?",
        "Grandma gives {n} {a} {t}, and grandpa gives {n} {b} {t}. How many are there together?",
    ),
    Family.TAKE: (
        "{n} has {a} {t} and gives {b} away. How many {t} are left?",
        "{n} had {a} {t} but lost {b} of them. How many {t} does {n} still have?",
        "{n} owns {a} {t} and sells {b}. How many {t} remain?",
        "Out of {a} {t}, {n} gives {b} to a friend. How many does {n} keep?",
        "If {n} starts with {a} {t} and drops {b}, how many {t} are left?",
        "There were {a} {t} in the bag of {n}, but {b} are gone. How many are still there?",
    ),
    Family.GROUPS: (
        "{n} has {a} bags with {b} {t} in each. How many {t} is that?",
        "{n} fills {a} boxes and puts {b} {t} into each box. How many {t} are there in all?",
        "{a} friends bring {b} {t} each to {n}. How many {t} does {n} get?",
        "For {a} days {n} finds {b} {t} a day. How many {t} does {n} have then?",
        "If {n} buys {a} packs of {b} {t}, how many {t} does {n} have?",
        "{n} lays {a} rows with {b} {t} in each row. What is the total?",
    ),
}
_TEACHER_QUESTIONS = (
    "{n} wrote {s} = {c}. {m} What comment should I give?",
    "{n} wrote {s} = {c}. {m} Please suggest a comment.",
    "My pupil {n} worked out {s} and got {c}. {m} Can you write a comment?",
    "Please write a comment for {n}: {s} = {c}. {m}",
    "Homework of {n}: {s} = {c}. {m} How should I comment on it?",
    "This is what {n} handed in: {s} = {c}. {m} I need a short comment.",
    "In the test {n} answered {s} with {c}. {m} What do I write next to it?",
    "For the task {s}, {n} gave the answer {c}. {m} Your comment?",
    "I am marking the work of {n}. It says {s} = {c}. {m} Give me a comment for it.",
    "{n} says that {s} is {c}. {m} What should I tell {n}?",
)
_MARKED_RIGHT = ("I marked it as right.", "It is right.", "That is right.", "Marked: right.")
_MARKED_WRONG = (
    "I marked it as wrong, it is {r}.", "It is wrong, it should be {r}.",
    "That is wrong, it makes {r}.", "Marked: wrong, it is {r}.",
)  # fmt: skip
"""The teacher has marked the work: the comment must agree with the mark."""


@dataclass(frozen=True, slots=True)
class Task:
    """One question with the facts that a right reply must agree with."""

    domain: Domain
    family: Family
    name: str
    """Who the word problem is about, or the pupil."""
    thing: str
    """What is counted, in the plural; empty in the teacher domain."""
    a: int
    b: int
    claimed: int | None
    """What the pupil wrote; None in the student domain."""
    question: str
    """The message text that asks."""

    @property
    def result(self) -> int:
        """The right result."""
        return compute(self.family, self.a, self.b)

    @property
    def pupil_right(self) -> bool:
        """True if the pupil's answer is right; False in the student domain, which has none."""
        return self.claimed == self.result

    @property
    def term(self) -> str:
        """The operation as written on paper, for example `3 + 4`."""
        return f"{self.a} {SIGNS[self.family]} {self.b}"

    @property
    def key(self) -> str:
        """The facts without the wording."""
        facts = (self.domain, self.family, self.name, self.thing, self.a, self.b, self.claimed)
        return "|".join(str(fact) for fact in facts)

    @property
    def held_out(self) -> bool:
        """True if this task is kept for measuring: about 15 % of all, by a hash of the facts."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def compute(family: Family, a: int, b: int) -> int:
    """The result of a family's operation."""
    match family:
        case Family.ADD:
            return a + b
        case Family.TAKE:
            return a - b
        case Family.GROUPS:
            return a * b


def draw_task(domain: Domain, rng: Random, *, held_out: bool) -> Task:
    """A random task of one domain from one side of the split."""
    while True:
        task = _any_task(domain, rng)
        if task.held_out == held_out:
            return task


def task_stream(domain: Domain, seed: int, *, held_out: bool) -> Iterator[Task]:
    """An endless deterministic stream of tasks from one side of the split."""
    rng = Random(f"{domain}/{seed}/{held_out}")
    while True:
        yield draw_task(domain, rng, held_out=held_out)


def held_out_tasks(domain: Domain, count: int, seed: int = 0) -> list[Task]:
    """A fixed list of held-out tasks with different facts.

    Raises ValueError if the world has fewer than `count`.
    """
    found: dict[str, Task] = {}
    for task in islice(task_stream(domain, seed, held_out=True), 100 * count):
        found.setdefault(task.key, task)
        if len(found) >= count:
            return list(found.values())
    raise ValueError(f"the {domain} domain has {len(found)} held-out tasks, {count} were asked for")


def _operands(family: Family, rng: Random) -> tuple[int, int]:
    match family:
        case Family.ADD:
            return rng.randint(2, 6), rng.randint(2, 6)
        case Family.TAKE:
            b = rng.randint(2, 6)
            return b + rng.randint(2, 6), b
        case Family.GROUPS:
            return rng.randint(2, 5), rng.randint(2, 4)


def _any_task(domain: Domain, rng: Random) -> Task:
    family = rng.choice(tuple(Family))
    name = rng.choice(NAMES)
    a, b = _operands(family, rng)
    if domain is Domain.STUDENT:
        thing = rng.choice(THINGS)
        text = rng.choice(_STUDENT_OPENERS) + rng.choice(_STUDENT_QUESTIONS[family])
        question = text.format(n=name, t=thing, a=a, b=b)
        return Task(domain, family, name, thing, a, b, None, question)
    result = compute(family, a, b)
    claimed = result
    if rng.random() < 0.5:
        claimed = result + rng.choice((-1, 1))
    term = f"{a} {SIGNS[family]} {b}"
    mark = rng.choice(_MARKED_RIGHT if claimed == result else _MARKED_WRONG).format(r=result)
    question = rng.choice(_TEACHER_QUESTIONS).format(n=name, s=term, c=claimed, m=mark)
    return Task(domain, family, name, "", a, b, claimed, question)
