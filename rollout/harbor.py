"""Harbor's task folders as tasks of the environment `terminal`.

    instruction.md          what the agent is asked to do
    task.toml               [environment] docker_image names the image
    environment/            its files lie in /app at the beginning; a Dockerfile is not run
    tests/test.sh           says how well it ended, by /logs/verifier/reward.txt

The agent gets neither network nor root. A reward of 1 is solved, any other is not.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from nextstate.episodes import is_label
from nextstate.errors import ConfigError
from nextstate.records import Json
from rollout.tasks import Task, split_of

_NOT_LAID = re.compile(r"dockerfile.*|docker-compose.*|\.dockerignore", re.IGNORECASE)
_MOST_FILE_BYTES = 4 << 20
_MOST_FILES = 2000
_TESTS, _LOGS = "/tests", "/logs"
_CHECK = r"""
mkdir -p /logs/verifier
bash /tests/test.sh
reward=$(cat /logs/verifier/reward.txt 2>/dev/null ||
  sed -n 's/.*"reward": *\([0-9.]*\).*/\1/p' /logs/verifier/reward.json)
echo "reward $reward"
[[ $reward =~ ^1(\.0*)?$ ]]
"""


def harbor_tasks(folder: Path, environment: str, sandbox: str | None) -> Iterator[Task]:
    """The task of a folder, or those of the folders in it. Raises ConfigError.

    `sandbox` is where they are played; None: in the image that each of them names.
    """
    try:
        folders = [folder] if _is_task(folder) else sorted(filter(_is_task, folder.iterdir()))
    except OSError as error:
        raise ConfigError(f"--tasks {folder}: {error.strerror}") from error
    if not folders:
        raise ConfigError(f"--tasks {folder}: expected a task.toml in it or in its folders")
    for one in folders:
        fields, name = _fields(one), one.resolve().name
        if not is_label(name):
            raise ConfigError(f"{one}: expected a name of letters, digits and . _ : ~ + -")
        if sandbox is None and "sandbox" not in fields:
            raise ConfigError(
                f"{one}: task.toml has no [environment] docker_image: run `docker build -t NAME "
                f'{one}/environment` and write `docker_image = "NAME"`, or add '
                "?sandbox=bubblewrap to --tasks if this machine's programs are enough"
            )
        yield Task(name, split_of(environment, name), fields)


def _is_task(folder: Path) -> bool:
    return (folder / "task.toml").is_file()


def _fields(folder: Path) -> Json:
    fields: Json = {
        "instruction": _text(folder / "instruction.md", folder),
        "work": "/app",
        "check": _CHECK,
        "check_folders": [_TESTS, _LOGS],
        "files": {
            path: text
            for path, text in _texts(folder / "environment").items()
            if not _NOT_LAID.fullmatch(path)
        },
        "check_files": {
            f"{_TESTS}/{path}": text for path, text in _texts(folder / "tests").items()
        },
    }
    if f"{_TESTS}/test.sh" not in fields["check_files"]:
        raise ConfigError(f"{folder}: expected tests/test.sh")
    image = _image(folder / "task.toml")
    if image is not None:
        fields["sandbox"] = f"docker:{image}"
    return fields


def _image(file: Path) -> str | None:
    try:
        found: dict[str, Any] = tomllib.loads(_text(file, file.parent))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from error
    section: object = found.get("environment", {})
    image: object = cast(Json, section).get("docker_image") if isinstance(section, dict) else None
    if image is not None and not isinstance(image, str):
        raise ConfigError(f"{file}: [environment] docker_image = {image!r:.80}: expected a name")
    return image


def _texts(folder: Path) -> dict[str, str]:
    """The files below a folder of a task: path to text."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if len(files) > _MOST_FILES:
        raise ConfigError(f"{folder}: expected at most {_MOST_FILES} files")
    return {str(path.relative_to(folder)): _text(path, folder.parent) for path in files}


def _text(file: Path, task: Path) -> str:
    """The text of a file of a task, which may be somebody else's."""
    try:
        found = file.resolve()
        if not found.is_relative_to(task.resolve()):
            raise ConfigError(f"{file}: this link leads out of the task: put a copy in its place")
        with open(os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
            data = opened.read(_MOST_FILE_BYTES + 1)
        if len(data) > _MOST_FILE_BYTES:
            raise ConfigError(f"{file}: expected at most {_MOST_FILE_BYTES} bytes")
        return data.decode()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected text in UTF-8") from error
