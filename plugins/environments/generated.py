"""Generated tasks as a file: what `python -m plugins.environments.NAME_tasks COUNT` prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

_EVAL_OF = 4
"""One held-out task for so many that train."""
WORDS = {
    "train": (
        *("amber", "birch", "cedar", "delta", "ember", "fjord"),
        *("grove", "heron", "inlet", "jetty", "kelp", "lunar"),
    ),
    "eval": (
        *("maple", "nylon", "ocean", "pearl", "quilt", "raven"),
        *("slate", "tulip", "umber", "velvet", "willow", "zinc"),
    ),
}
"""What the tasks of a split are made of."""


def print_tasks(numbered: Callable[[str, int], dict[str, Any]], count: int) -> None:
    """Prints `count` tasks that train, and a quarter as many held-out ones, one JSON object a line.

    `numbered` makes task number N of the split `train` or `eval`.
    """
    for split, many in (("train", count), ("eval", -(-count // _EVAL_OF))):
        for number in range(many):
            print(json.dumps(numbered(split, number)))


def asked_count() -> int:
    """How many tasks the command line asks for."""
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        sys.exit(
            f"expected a number of tasks: python -m {__spec__.parent}.NAME_tasks 240 > tasks.jsonl"
        )
    return int(sys.argv[1])
