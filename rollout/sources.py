"""Where the tasks of an endless run come from: a source as of `--tasks`, or the environment itself.

Task number N is always the same. So the number of a group says its task and its seed, and a run
that was killed goes on with the next number: no seed is used twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from nextstate.episodes import Split
from nextstate.errors import ConfigError
from nextstate.hooks import EnvironmentKind, GeneratesTasks
from rollout.reading import read_source
from rollout.tasks import MOST_TASKS, Task, task_of

_EVAL_OF = 4
"""One generated task is held out for so many that train."""


class Source(Protocol):
    """Tasks by number."""

    def training(self, number: int) -> Task:
        """A task that trains; any number from 0 on has one."""
        ...

    def held_out(self, count: int) -> list[Task]:
        """The first held-out tasks, always the same ones; fewer if there are no more."""
        ...


class TaskFile:
    """The tasks of a file, again and again, each time in another order."""

    def __init__(self, file: str, tasks: Sequence[Task]) -> None:
        """Raises ConfigError without a task that trains."""
        self._training = [task for task in tasks if task.split is Split.TRAIN]
        self._held_out = [task for task in tasks if task.split is Split.EVAL]
        if not self._training:
            raise ConfigError(
                f"[rollout] tasks = {file!r}: none of its {len(tasks)} tasks is for train; give "
                'some "split": "train"'
            )
        random.Random(0).shuffle(self._held_out)  # families may stand in blocks
        self._epoch = -1
        self._order: list[Task] = []

    def training(self, number: int) -> Task:
        """The next task of the order of its epoch."""
        epoch, place = divmod(number, len(self._training))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(self._training)
            random.Random(epoch).shuffle(self._order)
        return self._order[place]

    def held_out(self, count: int) -> list[Task]:
        """Of the file."""
        return self._held_out[:count]


class Generated:
    """Tasks that the environment makes, without end."""

    def __init__(self, environment: str, kind: GeneratesTasks) -> None:
        self._environment = environment
        self._kind = kind

    def training(self, number: int) -> Task:
        """Of the split `train`."""
        return task_of(self._kind.generate(Split.TRAIN, number), self._environment)

    def held_out(self, count: int) -> list[Task]:
        """Of the split `eval`."""
        made = (self._kind.generate(Split.EVAL, number) for number in range(count))
        return [task_of(fields, self._environment) for fields in made]


def tasks_of(source: str, environment: str, kind: EnvironmentKind) -> list[Task]:
    """The tasks of `--tasks`: those of a source, or as many as it says, which are generated.

    One more is held out for each four that train. Raises ConfigError.
    """
    if not source.isdecimal():
        return read_source(source, environment, kind.check_task)
    if not isinstance(kind, GeneratesTasks):
        raise ConfigError(
            f"--tasks {source:.20}: the environment {environment!r} generates no tasks: name a "
            f"file with one task a line, or a file of this name as ./{source:.20}"
        )
    if len(source) > len(str(MOST_TASKS)) or not 1 <= int(source) <= MOST_TASKS:
        raise ConfigError(f"--tasks {source:.20}: expected 1 to {MOST_TASKS} generated tasks")
    many = {Split.TRAIN: int(source), Split.EVAL: -(-int(source) // _EVAL_OF)}
    return [
        task_of(kind.generate(split, number), environment)
        for split, count in many.items()
        for number in range(count)
    ]


def source_of(file: str, environment: str, kind: EnvironmentKind) -> Source:
    """The configured tasks. Raises ConfigError."""
    if file:
        return TaskFile(file, read_source(file, environment, kind.check_task))
    if isinstance(kind, GeneratesTasks):
        return Generated(environment, kind)
    raise ConfigError(
        f"[rollout] tasks is empty, and the environment {environment!r} generates none: name a "
        "file with one task a line"
    )
