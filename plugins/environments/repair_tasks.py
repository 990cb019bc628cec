"""Generated tasks for the environment `repair`, held out by seed and by range.

`python -m plugins.environments.repair_tasks 240 > tasks.jsonl` writes 240 tasks that train and 60
held-out ones: small packages with one bug each. Held-out packages have names, numbers and sizes
that no other has, and more modules.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from string import Template
from typing import Any, cast

from plugins.environments.generated import WORDS, asked_count, print_tasks
from plugins.environments.repair_programs import KINDS, PROGRAMS, Bug, Numbers, Program

_VISIBLE, _HIDDEN, _OTHERS = 4, 10, 2
"""Cases of the module with the bug, and in either set of each other module."""
_ROUNDS = 40
"""How often calls are drawn at most."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the packages of a split are, and their words."""

    words: Sequence[str]
    modules: tuple[int, int]
    values: tuple[int, int]
    length: tuple[int, int]
    numbers: tuple[int, int]
    """From which the two numbers of a program are drawn."""


SCALES = {
    "train": Scale(WORDS["train"], (1, 2), (0, 20), (3, 6), (2, 5)),
    "eval": Scale(WORDS["eval"], (3, 4), (21, 60), (7, 10), (6, 10)),
}
Made = tuple[dict[str, Any], list[str]]
"""The fields of a task, and the answers that solve it."""


@dataclass(frozen=True, slots=True)
class Module:
    """A program with its holes filled."""

    name: str
    """With its package."""
    program: Program
    names: dict[str, str]
    numbers: Numbers

    @property
    def path(self) -> str:
        return self.name.replace(".", "/") + ".py"

    def text(self, bug: Bug | None = None) -> str:
        """Its source, with a bug or without."""
        right = self.program.text
        if bug is not None:
            assert right.count(bug.right) == 1, bug
            right = right.replace(bug.right, bug.wrong)
        return Template(right).substitute(self.names)

    def calls(self, draw: random.Random) -> list[tuple[str, list[Any]]]:
        """Some calls of its functions: (name, arguments)."""
        found = self.program.calls(draw, self.numbers)
        return [(f"{self.name}.{self.names[hole]}", args) for hole, args in found]


def task(kind: str, split: str, seed: int | str) -> Made:
    """One task with its id and split, and its solution: always the same for these three."""
    draw, scale = random.Random(f"{kind} {split} {seed}"), SCALES[split]
    package, *words = draw.sample(scale.words, 6)
    shapes = draw.sample([*PROGRAMS.values()], draw.randint(*scale.modules))
    if not any(bugs_of(shape, kind) for shape in shapes):
        shapes[0] = draw.choice([one for one in PROGRAMS.values() if bugs_of(one, kind)])
    modules = [
        fill(draw, scale, f"{package}.{word}", shape)
        for word, shape in zip(words, shapes, strict=False)
    ]
    broken = draw.choice([one for one in modules if bugs_of(one.program, kind)])
    bug = draw.choice(bugs_of(broken.program, kind))
    visible, hidden = _cases(draw, broken, bug)
    for other in modules:
        if other is not broken:
            more = [one for one, _ in islice(judged(draw, other, None), 2 * _OTHERS)]
            visible += more[:_OTHERS]
            hidden += more[_OTHERS : 2 * _OTHERS]
    files = {one.path: one.text(bug if one is broken else None) for one in modules}
    return {
        "id": f"{kind}-{split}-{seed}",
        "split": split,
        "instruction": f"The package {package} has one bug: its tests fail. Repair it.",
        "files": {f"{package}/__init__.py": "", **files},
        "visible": visible,
        "hidden": hidden,
    }, [f"show {broken.path}", _repair(broken, bug), "test", "submit"]


def numbered(split: str, number: int) -> dict[str, Any]:
    """Task number N of a split; the kinds of bugs take turns."""
    seed, place = divmod(number, len(KINDS))
    return task(KINDS[place], split, seed)[0]


class Running:
    """A generated program that can be called; its text is ours."""

    def __init__(self, text: str) -> None:
        self._space: dict[str, Any] = {}
        exec(text, self._space)

    def call(self, function: str, args: Sequence[Any]) -> dict[str, Any]:
        """What the call gives, as a case says it."""
        called = cast(Callable[..., Any], self._space[function])
        try:
            return {"gives": called(*deepcopy(args))}
        except Exception as error:
            return {"raises": type(error).__name__}


def bugs_of(program: Program, kind: str) -> list[Bug]:
    """The bugs of one kind that a program may get."""
    return [bug for bug in program.bugs if bug.kind == kind]


def fill(draw: random.Random, scale: Scale, name: str, program: Program) -> Module:
    """A module of this name, `package.module`, with drawn names and numbers."""
    words = draw.sample(scale.words, 4)
    n, m = sorted(draw.sample(range(scale.numbers[0], scale.numbers[1] + 1), 2))
    names = dict(zip("fgab", (f"get_{words[0]}", f"find_{words[1]}", *words[2:]), strict=True))
    numbers = Numbers(scale.values, scale.length, n, m)
    return Module(name, program, {**names, "n": str(n), "m": str(m)}, numbers)


def judged(
    draw: random.Random, module: Module, bug: Bug | None
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Different cases of a module, and whether each holds with the bug."""
    right, wrong, seen = Running(module.text()), Running(module.text(bug)), set[str]()
    for _ in range(_ROUNDS):
        for call, args in module.calls(draw):
            key = json.dumps([call, args])
            if key in seen:
                continue
            seen.add(key)
            function = call.rpartition(".")[2]
            expected = right.call(function, args)
            holds = wrong.call(function, args) == expected
            yield {"call": call, "args": args, **expected}, holds


def _cases(
    draw: random.Random, module: Module, bug: Bug
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(visible, hidden): some of both fail with the bug, unless only one call shows it."""
    failing: list[dict[str, Any]] = []
    holding: list[dict[str, Any]] = []
    for case, holds in judged(draw, module, bug):
        (holding if holds else failing).append(case)
        if min(len(failing), len(holding)) == _HIDDEN:
            break
    assert failing, f"{bug} of {module.name} changes nothing"
    shown, kept = failing[:2], failing[2:8] or failing
    visible = shown + holding[: _VISIBLE - len(shown)]
    hidden = kept + holding[_VISIBLE:][: _HIDDEN - len(kept)]
    return _shuffled(draw, visible), _shuffled(draw, hidden)


def _shuffled(draw: random.Random, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return draw.sample(cases, len(cases))


def _repair(module: Module, bug: Bug) -> str:
    """The answer that makes the right text of the wrong one."""
    wrong, right = module.text(bug).split("\n"), module.text().split("\n")
    start = next(at for at, (old, new) in enumerate(zip(wrong, right, strict=False)) if old != new)
    tail = 0
    while wrong[-1 - tail] == right[-1 - tail] and len(wrong) - tail > start + 1:
        tail += 1
    first, last = start + 1, len(wrong) - tail
    lines = str(first) if first == last else f"{first}-{last}"
    return "\n".join([f"replace {module.path} {lines}", *right[start : len(right) - tail]])


if __name__ == "__main__":
    print_tasks(numbered, asked_count())
