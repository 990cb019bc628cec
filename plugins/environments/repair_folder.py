"""A task of `repair` in a folder, for an agent program that brings its own tools.

    python -m plugins.environments.repair_folder write TASK FOLDER
    python -m plugins.environments.repair_folder judge TASK FOLDER

TASK is a file with one task as JSON. `write` puts the package and its visible tests into a new
folder. `judge` prints what pytest says of the hidden tests, and ends with 0 if all pass, else with
1. It reads regular files only, follows no link, and runs the agent's code in sandboxes alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from nextstate.errors import ConfigError, NextStateError
from nextstate.hooks import Scored
from nextstate.records import Json
from plugins.environments.repair import VISIBLE_FILE, RepairKind
from plugins.environments.repair_judge import judge, render_tests
from plugins.environments.terminal import archive_of
from plugins.sandboxes.bubblewrap import Bubblewrap

_MOST_FILES, _MOST_BYTES = 2000, 16 << 20
_USAGE = "expected: write TASK FOLDER, or judge TASK FOLDER"


def read_task(file: Path) -> Json:
    """A checked task without its id and split. Raises ConfigError."""
    try:
        found: object = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a JSON object")
    given = cast(Json, found)
    task: Json = {name: value for name, value in given.items() if name not in ("id", "split")}
    RepairKind().check_task(task)
    return task


def write_folder(task: Json, folder: Path) -> None:
    """Writes the package and its visible tests. Raises ConfigError if there is such a folder."""
    try:
        folder.mkdir(parents=True)
        files = {**task["files"], VISIBLE_FILE: render_tests(task["visible"])}
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error


async def judge_folder(task: Json, folder: Path, hidden: Path | None = None) -> Scored:
    """The outcome of what an agent left in a folder, without the file `hidden` in it.

    Raises ConfigError if there is too much in it.
    """
    await RepairKind().check_machine()
    files = archive_of(dict(texts_of(folder, hidden)))
    return await judge(Bubblewrap(), files, task["hidden"])


def main(arguments: list[str]) -> int:
    """Runs one of the two commands; returns the exit code."""
    try:
        match arguments:
            case ["write", file, folder]:
                write_folder(read_task(Path(file)), Path(folder))
                return 0
            case ["judge", file, folder]:
                task = read_task(Path(file))
                scored = asyncio.run(judge_folder(task, Path(folder), Path(file)))
                print(scored.observation)
                return int(scored.outcome < 1)
            case _:
                raise ConfigError(_USAGE)
    except NextStateError as error:
        print(error, file=sys.stderr)
        return 2


def texts_of(folder: Path, hidden: Path | None) -> Iterator[tuple[str, str]]:
    """(path, text) of the regular files below a folder, which is hostile."""
    kept_from = None if hidden is None else os.stat(hidden)
    count = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            try:
                opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:  # a link, or a file that its owner may not read
                continue
            with os.fdopen(opened, "rb") as file:
                of = os.fstat(opened)
                if not stat.S_ISREG(of.st_mode):
                    continue
                if kept_from is not None and os.path.samestat(of, kept_from):
                    continue
                data = file.read(_MOST_BYTES + 1 - size)
            count, size = count + 1, size + len(data)
            if count > _MOST_FILES or size > _MOST_BYTES:
                most = f"expected at most {_MOST_FILES} with {_MOST_BYTES} bytes in all"
                raise ConfigError(f"{folder} has too many or too large files: {most}")
            yield str(path.relative_to(folder)), data.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
