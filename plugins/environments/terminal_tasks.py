"""Generated tasks for the environment `terminal`, held out by seed and by range.

`python -m plugins.environments.terminal_tasks 200 > tasks.jsonl` writes 200 tasks that train and 50
held-out ones. Held-out tasks have words, numbers of files and numbers of lines that no other task
has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from plugins.environments.generated import WORDS, asked_count, print_tasks

_FOLDERS = ("a", "b", "c", "d/e", "d/f", "g")


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the tasks of a split are, and their words."""

    words: Sequence[str]
    files: tuple[int, int]
    lines: tuple[int, int]


SCALES = {
    "train": Scale(WORDS["train"], (3, 6), (4, 12)),
    "eval": Scale(WORDS["eval"], (7, 10), (13, 24)),
}
Made = tuple[dict[str, Any], str]
"""The fields of a task, and a command that solves it."""


def find(draw: random.Random, scale: Scale) -> Made:
    """Which file has the word?"""
    paths = _paths(draw, scale, "txt")
    word, *others = draw.sample(scale.words, len(scale.words))
    files = {path: _prose(draw, others, scale) for path in paths}
    right = draw.choice(paths)
    lines = files[right].splitlines()
    lines.insert(draw.randrange(len(lines)), f"{draw.choice(others)} {word}")
    files[right] = "\n".join(lines) + "\n"
    return {
        "instruction": f"One file contains the word {word}. Write its path, such as a/x.txt, "
        "to answer.txt.",
        "files": files,
        "check": f"test \"$(sed 's|^[.]/||' answer.txt)\" = {right}",
    }, f"grep -rl {word} . > answer.txt"


def add_up(draw: random.Random, scale: Scale) -> Made:
    """What is the sum of a column?"""
    columns = draw.sample(scale.words, 3)
    rows = [[draw.randrange(100) for _ in columns] for _ in range(draw.randint(*scale.lines))]
    place = draw.randrange(3)
    table = "\n".join(",".join(map(str, row)) for row in [columns, *rows]) + "\n"
    return {
        "instruction": f"Add up the column {columns[place]} of table.csv. Write the sum to "
        "answer.txt.",
        "files": {"table.csv": table},
        "check": f'test "$(cat answer.txt)" = {sum(row[place] for row in rows)}',
    }, f"awk -F, 'NR > 1 {{ n += ${place + 1} }} END {{ print n }}' table.csv > answer.txt"


def rename(draw: random.Random, scale: Scale) -> Made:
    """Give files another ending."""
    paths, kept = _paths(draw, scale, "txt"), _paths(draw, scale, "csv")
    ending = draw.choice(scale.words)
    right = sorted([f"./{path[:-3]}{ending}" for path in paths] + [f"./{path}" for path in kept])
    listed = " ".join(right)
    return {
        "instruction": f"Rename every file that ends in .txt, in all folders, so that it ends in "
        f".{ending} instead. Leave the other files.",
        "files": {path: _prose(draw, scale.words, scale) for path in [*paths, *kept]},
        "check": f'test "$(find . -type f | LC_ALL=C sort | xargs)" = "{listed}"',
    }, f'find . -name "*.txt" | while read f; do mv $f ${{f%txt}}{ending}; done'


def count_errors(draw: random.Random, scale: Scale) -> Made:
    """How many errors did a service log?"""
    services = draw.sample(scale.words, 3)
    levels = ("INFO", "ERROR", "WARNING")
    lines = [
        (draw.choice(levels), draw.choice(services)) for _ in range(2 * draw.randint(*scale.lines))
    ]
    lines += [("ERROR", services[0])] * 3  # few lines could be guessed
    log = "".join(f"{level} {name}: request {n}\n" for n, (level, name) in enumerate(lines))
    return {
        "instruction": f"How many lines of service.log are errors (ERROR) of {services[0]}? Write "
        "the number to answer.txt.",
        "files": {"service.log": log},
        "check": f'test "$(cat answer.txt)" = {lines.count(("ERROR", services[0]))}',
    }, f'grep -c "ERROR {services[0]}:" service.log > answer.txt'


def make_executable(draw: random.Random, scale: Scale) -> Made:
    """Repair the permissions of scripts."""
    scripts, others = _paths(draw, scale, "sh"), _paths(draw, scale, "txt")
    word = draw.choice(scale.words)
    right = " ".join(sorted(f"./{path}" for path in scripts))
    return {
        "instruction": "Make every file that ends in .sh, in all folders, executable, and no "
        "other file.",
        "files": dict.fromkeys([*scripts, *others], f"echo {word}\n"),
        "check": f'test "$(find . -type f -perm -100 | LC_ALL=C sort | xargs)" = "{right}"',
    }, 'find . -name "*.sh" -exec chmod +x {} +'


FAMILIES: dict[str, Callable[[random.Random, Scale], Made]] = {
    "find": find,
    "add-up": add_up,
    "rename": rename,
    "count-errors": count_errors,
    "make-executable": make_executable,
}


def task(family: str, split: str, seed: int | str) -> Made:
    """One task with its id and split, and its solution: always the same for these three."""
    fields, solution = FAMILIES[family](random.Random(f"{family} {split} {seed}"), SCALES[split])
    return {"id": f"{family}-{split}-{seed}", "split": split, **fields}, solution


def numbered(split: str, number: int) -> dict[str, Any]:
    """Task number N of a split; the families take turns."""
    seed, place = divmod(number, len(FAMILIES))
    return task([*FAMILIES][place], split, seed)[0]


def _paths(draw: random.Random, scale: Scale, ending: str) -> list[str]:
    names = draw.sample(scale.words, draw.randint(*scale.files))
    return [f"{draw.choice(_FOLDERS)}/{name}.{ending}" for name in names]


def _prose(draw: random.Random, words: Sequence[str], scale: Scale) -> str:
    lines = range(draw.randint(*scale.lines))
    return "".join(" ".join(draw.choices(words, k=4)) + "\n" for _ in lines)


if __name__ == "__main__":
    print_tasks(numbered, asked_count())
