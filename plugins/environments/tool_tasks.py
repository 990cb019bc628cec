"""Generated tasks for the environment `tools`, held out by seed and by range.

`python -m plugins.environments.tool_tasks 240 > tasks.jsonl` writes 240 tasks that train and 60
held-out ones. Held-out tasks have larger numbers, other people, cities and days than any other
task, and more hours that are taken.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from plugins.environments.generated import asked_count, print_tasks
from plugins.environments.tools import OPEN_HOURS, SUBMIT


@dataclass(frozen=True, slots=True)
class Scale:
    """What the tasks of a split are made of."""

    names: Sequence[str]
    cities: Sequence[str]
    days: Sequence[str]
    numbers: tuple[int, int]
    ids: tuple[int, int]
    taken: tuple[int, int]
    """How many hours in a row are taken."""


SCALES = {
    "train": Scale(
        ("Mia", "Tom", "Ana", "Ben", "Lea", "Sam", "Eva", "Max"),
        ("Rome", "Oslo", "Bern", "Lima", "Riga", "Doha"),
        ("Mon", "Tue", "Wed"),
        (10, 29),
        (10, 49),
        (0, 2),
    ),
    "eval": Scale(
        ("Ida", "Leo", "Zoe", "Jon", "Kim", "Uli", "Ron", "Pia"),
        ("Cork", "Nice", "Bonn", "Kyiv", "Pisa", "Graz"),
        ("Thu", "Fri"),
        (30, 49),
        (50, 99),
        (1, 3),
    ),
}
Made = tuple[dict[str, Any], list[str]]
"""The fields of a task, and the replies that solve it."""


def chain(draw: random.Random, scale: Scale) -> Made:
    """A chain of two operations, in which the second needs the result of the first."""
    a, b, c = (draw.randint(*scale.numbers) for _ in range(3))
    plus = draw.random() < 0.5 or c > a + b
    first, goal = a + b, a + b + c if plus else a + b - c
    return {
        "service": "calculator",
        "instruction": f"Work out ({a} + {b}) {'+' if plus else '-'} {c}.",
        "goal": goal,
    }, [
        call("add", a=a, b=b),
        call("add" if plus else "subtract", a=first, b=c),
        call(SUBMIT, value=goal),
    ]


def manager(draw: random.Random, scale: Scale) -> Made:
    """A field of somebody whom only another record names."""
    names, cities = draw.sample(scale.names, 4), draw.sample(scale.cities, 4)
    ids = draw.sample(range(*scale.ids), 4)
    bosses = [draw.choice([other for other in ids if other != own]) for own in ids]
    people = [
        {"id": own, "name": name, "city": city, "manager": boss}
        for own, name, city, boss in zip(ids, names, cities, bosses, strict=True)
    ]
    goal = cities[ids.index(bosses[0])]
    found = {"people": draw.sample(people, 4)}
    return {
        "service": "directory",
        "instruction": f"In which city is the manager of {names[0]}?",
        "goal": goal,
        **found,
    }, [call("find", name=names[0]), call("get", id=bosses[0]), call(SUBMIT, value=goal)]


def book(draw: random.Random, scale: Scale) -> Made:
    """The first free hour, which only conflicts tell."""
    day, taken = draw.choice(scale.days), draw.randint(*scale.taken)
    start = draw.randint(OPEN_HOURS.start, OPEN_HOURS.stop - 1 - taken)
    busy = {other: draw.sample(OPEN_HOURS, 3) for other in scale.days if other != day}
    busy[day] = [*range(start, start + taken)]
    return {
        "service": "calendar",
        "instruction": f"Book the first free hour on {day} from {start} on.",
        "goal": [[day, start + taken]],
        "busy": dict(sorted(busy.items())),
    }, [
        *(call("book", day=day, hour=hour) for hour in range(start, start + taken + 1)),
        call(SUBMIT),
    ]


FAMILIES: dict[str, Callable[[random.Random, Scale], Made]] = {
    "chain": chain,
    "manager": manager,
    "book": book,
}


def call(tool: str, **arguments: int | str) -> str:
    """A reply that calls a tool."""
    return json.dumps({"name": tool, "arguments": arguments})


def task(family: str, split: str, seed: int | str) -> Made:
    """One task with its id and split, and its solution: always the same for these three."""
    fields, solution = FAMILIES[family](random.Random(f"{family} {split} {seed}"), SCALES[split])
    return {"id": f"{family}-{split}-{seed}", "split": split, **fields}, solution


def numbered(split: str, number: int) -> dict[str, Any]:
    """Task number N of a split; the families take turns."""
    seed, place = divmod(number, len(FAMILIES))
    return task([*FAMILIES][place], split, seed)[0]


if __name__ == "__main__":
    print_tasks(numbered, asked_count())
