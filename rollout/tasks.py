"""Tasks of an environment, read from a file with one JSON object a line.

Each has an `id`, perhaps a `split`, and the fields of its environment. A task without a split is
held out (`eval`) or trains (`train`) by a hash of its id: always the same, also when other tasks
are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextstate.episodes import Split, is_label
from nextstate.errors import ConfigError
from nextstate.records import Json
from nextstate.wire import json_object

MOST_TASKS, _MOST_LINE_BYTES = 100_000, 16 << 20
_EVAL_OF = 5
"""One task of so many is held out."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task."""

    id: str
    split: Split
    fields: Json
    """What its environment reads."""


def read_tasks(
    file: Path, environment: str, check: Callable[[Json], None], more: Json | None = None
) -> list[Task]:
    """All tasks of a file, each checked by its environment. Raises ConfigError with the line.

    `more` are fields that every task gets.
    """
    tasks: dict[str, Task] = {}
    try:
        with file.open("rb") as lines:
            number = 0
            while line := lines.readline(_MOST_LINE_BYTES + 1):
                number += 1
                if not line.strip():
                    continue
                where = f"{file}, line {number}"
                try:
                    if len(line) > _MOST_LINE_BYTES:
                        raise ConfigError(f"expected at most {_MOST_LINE_BYTES} bytes")
                    task = _task(line, environment, check, more or {})
                except ConfigError as error:
                    raise ConfigError(f"{where}: {error}") from error
                if task.id in tasks:
                    raise ConfigError(f"{where}: id = {task.id!r} is there twice")
                tasks[task.id] = task
                if len(tasks) > MOST_TASKS:
                    raise ConfigError(f"{where}: expected at most {MOST_TASKS} tasks")
    except OSError as error:
        raise ConfigError(f"--tasks {file}: {error.strerror}") from error
    return list(tasks.values())


def split_of(environment: str, name: str) -> Split:
    """The split of a task that names none."""
    digest = hashlib.blake2b(f"{environment}\0{name}".encode(), digest_size=8).digest()
    return Split.TRAIN if int.from_bytes(digest) % _EVAL_OF else Split.EVAL


def _task(line: bytes, environment: str, check: Callable[[Json], None], more: Json) -> Task:
    fields: dict[str, Any] | None = json_object(line)
    if fields is None:
        raise ConfigError('it is no JSON object: expected {"id": "count-1", …}')
    task = task_of(fields, environment)
    task.fields.update(more)
    check(task.fields)
    return task


def task_of(given: Json, environment: str) -> Task:
    """A task of its fields, with id and split among them. Raises ConfigError."""
    fields = dict(given)
    name, split = fields.pop("id", None), fields.pop("split", None)
    if not isinstance(name, str) or not is_label(name):
        raise ConfigError(
            f"id = {name!r:.120}: expected 1 to 100 letters, digits and . _ : ~ + -, "
            "beginning with a letter or digit"
        )
    if split not in (None, *Split):
        raise ConfigError(f"split = {split!r:.80}: expected {' or '.join(Split)}, or none")
    return Task(name, Split(split) if split else split_of(environment, name), fields)
