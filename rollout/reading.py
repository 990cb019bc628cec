"""Where tasks come from: a file, an OpenEnv server or a folder of Harbor tasks.

    tasks.jsonl                          one JSON object a line (rollout/tasks.py)
    http://127.0.0.1:8000                what OpenEnv's Task API lists, for the environment openenv
    tasks/                               a Harbor task, or a folder of them, for terminal

What follows a `?` are fields that every task gets, such as `?action=message&show=text`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast
from urllib.error import HTTPError
from urllib.parse import parse_qsl, quote
from urllib.request import Request, urlopen

from nextstate.episodes import Split, is_label
from nextstate.errors import ConfigError
from nextstate.records import Json
from rollout.harbor import harbor_tasks
from rollout.tasks import MOST_TASKS, Task, read_tasks, split_of

_MOST_ANSWER_BYTES = 64 << 20
_TIMEOUT_S = 60.0
"""Until a server says something more."""
_WHOLE_S = 600.0
"""Until a server has said everything."""
_MOST_ENVIRONMENTS = 1000
_AT_ONCE = 500
"""Tasks in one request."""
_NAMES = ("id", "task_id", "task_name", "name")
_HELD_OUT = ("validation", "test", "eval")


def read_source(source: str, environment: str, check: Callable[[Json], None]) -> list[Task]:
    """All tasks of a source, each checked by its environment. Raises ConfigError."""
    place, _, query = source.partition("?")
    place = str(Path(place).expanduser()) if place.startswith("~") else place
    more: Json = dict(parse_qsl(query, keep_blank_values=True))
    is_server = place.startswith(("http://", "https://"))
    if not is_server and not Path(place).is_dir():
        return read_tasks(Path(place), environment, check, more)
    if is_server:
        found = _served(_Server(place.rstrip("/"), time.monotonic() + _WHOLE_S), environment)
    else:
        found = harbor_tasks(Path(place), environment, more.get("sandbox"))
    tasks: dict[str, Task] = {}
    for task in found:
        fields = {**task.fields, **more}
        try:
            check(fields)
        except ConfigError as error:
            raise ConfigError(f"--tasks {place}, task {task.id}: {error}") from error
        if task.id in tasks:
            raise ConfigError(f"--tasks {place}: the task {task.id!r} is there twice")
        tasks[task.id] = Task(task.id, task.split, fields)
        if len(tasks) > MOST_TASKS:
            raise ConfigError(f"--tasks {place}: expected at most {MOST_TASKS} tasks")
    return list(tasks.values())


class _Answer(Protocol):
    def read1(self, n: int = -1, /) -> bytes: ...


class _Server(NamedTuple):
    """An OpenEnv server."""

    url: str
    give_up_at: float
    """By the monotonic clock."""

    def ask(self, path: str, body: Json | None = None) -> object:
        """What the server answers to a GET, or to a POST of a body. Raises ConfigError."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        try:
            self._check_time()
            with urlopen(request, timeout=_TIMEOUT_S) as answer:
                return json.loads(self._read(answer))
        except HTTPError as error:
            told = error.read(300).decode(errors="replace")
            hint = "; it has no Task API: give --tasks a file" if error.code == 501 else ""
            raise ConfigError(f"--tasks {self.url}/{path}: {error.code} {told!r}{hint}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"--tasks {self.url}/{path}: {error}") from error

    def _read(self, answer: _Answer) -> bytes:
        """A whole answer. Raises OSError if it is too late or too long."""
        read = bytearray()
        while data := answer.read1(1 << 16):  # not `read`: bytes may come one by one
            read += data
            if len(read) > _MOST_ANSWER_BYTES:
                raise OSError(f"it sends more than {_MOST_ANSWER_BYTES} bytes")
            self._check_time()
        return bytes(read)

    def _check_time(self) -> None:
        if time.monotonic() > self.give_up_at:
            raise OSError(f"it has not listed its tasks within {_WHOLE_S:g} s")


def _served(server: _Server, environment: str) -> Iterator[Task]:
    """The tasks that an OpenEnv server lists, in all its splits."""
    names = _strings(server, "list_environments")
    if len(names) > _MOST_ENVIRONMENTS:
        raise ConfigError(
            f"--tasks {server.url} lists {len(names)} environments: expected at most "
            f"{_MOST_ENVIRONMENTS}"
        )
    for name in names:
        path = quote(name, safe="")
        for split in _objects(server, server.ask(f"{path}/splits")):
            called, kind = str(split.get("name")), str(split.get("type"))
            counted = server.ask(f"{path}/num_tasks", {"split": called})
            total: object = cast(Json, counted).get("num_tasks") if _is_object(counted) else None
            if type(total) is not int or not 0 <= total <= MOST_TASKS:
                raise ConfigError(f"--tasks {server.url}: {counted!r:.80}: expected num_tasks")
            for start in range(0, total, _AT_ONCE):
                stop = min(total, start + _AT_ONCE)
                body = {"split": called, "start": start, "stop": stop}
                answer = server.ask(f"{path}/task_range", body)
                listed: object = cast(Json, answer).get("tasks") if _is_object(answer) else None
                for index, one in enumerate(_objects(server, listed), start):
                    yield _task(server, environment, called, kind, index, one)


def _task(server: _Server, environment: str, split: str, kind: str, index: int, one: Json) -> Task:
    plain = "".join(letter if letter.isalnum() else "-" for letter in split.lower())
    names = [one[key] for key in _NAMES if isinstance(one.get(key), str)]
    name = next((found for found in names if is_label(found)), f"{plain}-{index}")
    fields: Json = {"url": server.url, "reset": {"split": split, "index": index}}
    if isinstance(one.get("instruction"), str):
        fields["instruction"] = one["instruction"]
    if kind == "train":
        return Task(name, Split.TRAIN, fields)
    held_out = kind in _HELD_OUT
    return Task(name, Split.EVAL if held_out else split_of(environment, name), fields)


def _strings(server: _Server, path: str) -> list[str]:
    found = server.ask(path)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in cast(Any, found)):
        raise ConfigError(f"--tasks {server.url}/{path}: {found!r:.80}: expected a list of names")
    return cast("list[str]", found)


def _objects(server: _Server, found: object) -> list[Json]:
    if not isinstance(found, list) or not all(map(_is_object, cast("list[object]", found))):
        raise ConfigError(f"--tasks {server.url}: {found!r:.80}: expected a list of objects")
    return cast("list[Json]", found)


def _is_object(found: object) -> bool:
    return isinstance(found, dict)
