"""Generated tasks for the environment `gui`, held out by seed, by words and by a whole page.

`python -m plugins.environments.gui_tasks 240 > tasks.jsonl` writes 240 tasks that train and 60
held-out ones. Held-out tasks have other seeds, and other names and words than any other task. The
page UNSEEN is only in held-out ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from plugins.environments.generated import asked_count, print_tasks

WORDS = ("train", "eval")
"""The parts into which the lists of names and words are divided."""
UNSEEN = "click-option"
"""The page of which no task trains."""
_EVAL_SEEDS = 1 << 30
"""Held-out tasks have seeds from this one on."""
_LINE = re.compile(r'([0-9]{1,6}) (\w{1,40})(?: "([^"]{0,200})")?')
Solver = Callable[[Mapping[tuple[str, str], int], str], list[str]]
"""The actions that solve a task: by the numbers of (kind, name), and by what is asked for."""


def _press(numbers: Mapping[tuple[str, str], int], name: str) -> str:
    return f"click {numbers['button', name]}"


def _click(kind: str, submits: bool) -> Solver:
    def solve(numbers: Mapping[tuple[str, str], int], asked: str) -> list[str]:
        names = [] if asked == "nothing" else asked.split(", ")
        ends = [_press(numbers, "Submit")] if submits else []
        return [f"click {numbers[kind, name]}" for name in names] + ends

    return solve


def _enter(numbers: Mapping[tuple[str, str], int], asked: str) -> list[str]:
    return [f"type {numbers['input', '']} {asked}", _press(numbers, "Submit")]


def _log_in(numbers: Mapping[tuple[str, str], int], asked: str) -> list[str]:
    name, password = asked.split('" and the password "')
    return [
        f"type {numbers['input', '']} {name}",
        f"type {numbers['password', '']} {password}",
        _press(numbers, "Login"),
    ]


def _choose(numbers: Mapping[tuple[str, str], int], asked: str) -> list[str]:
    return [f"select {numbers['list', '']} {asked}", _press(numbers, "Submit")]


_SUBMITTED = r"Select (.*) and click Submit\."
PAGES: Mapping[str, tuple[str, Solver]] = {
    "click-button": (r'Click on the "(.*)" button\.', _click("button", False)),
    "click-link": (r'Click on the link "(.*)"\.', _click("item", False)),
    "enter-text": (r'Enter "(.*)" into the text field and press Submit\.', _enter),
    "click-checkboxes": (_SUBMITTED, _click("checkbox", True)),
    "login-user": (r'Enter the username "(.*)" into the text fields and press login\.', _log_in),
    "choose-list": (r"Select (.*) from the list and click Submit\.", _choose),
    UNSEEN: (_SUBMITTED, _click("radio", True)),
}
"""How each page asks, and how it is solved."""


def task(page: str, split: str, number: int) -> dict[str, Any]:
    """One task with its id and split: always the same for these three."""
    seed = random.Random(f"{page} {split} {number}").randrange(_EVAL_SEEDS)
    return {
        "id": f"{page}-{split}-{number}",
        "split": split,
        "page": page,
        "seed": seed + _EVAL_SEEDS * (split == "eval"),
        "words": split,
    }


def numbered(split: str, number: int) -> dict[str, Any]:
    """Task number N of a split; the pages take turns."""
    at, place = divmod(number, len(pages(split)))
    return task(pages(split)[place], split, at)


def solution(page: str, first: str) -> list[str]:
    """The actions that solve a task, by its first observation."""
    pattern, solver = PAGES[page]
    asked, *lines = first.splitlines()
    found = re.fullmatch(pattern, asked)
    assert found is not None, asked
    numbers: dict[tuple[str, str], int] = {}
    for line in filter(None, map(_LINE.match, lines)):
        numbers.setdefault((line[2], line[3] or ""), int(line[1]))
    return solver(numbers, found[1])


def pages(split: str) -> list[str]:
    """The pages of the tasks of a split."""
    return [page for page in PAGES if split == "eval" or page != UNSEEN]


if __name__ == "__main__":
    print_tasks(numbered, asked_count())
