"""rollout/tasks.py: reading a file of tasks, and which of them are held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nextstate.episodes import Split
from nextstate.errors import ConfigError
from nextstate.records import Json
from plugins.environments.terminal import TerminalKind
from rollout.tasks import Task, read_tasks, split_of


def accepts(_: Json) -> None:
    pass


def read(tmp_path: Path, *lines: str) -> list[Task]:
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(lines))
    return read_tasks(file, "shell", accepts)


def test_a_line_is_a_task_and_empty_lines_are_none(tmp_path: Path) -> None:
    found = read(tmp_path, '{"id": "a", "split": "eval", "x": 1}', "", '{"id": "b:2"}')
    assert found == [
        Task("a", Split.EVAL, {"x": 1}),
        Task("b:2", split_of("shell", "b:2"), {}),
    ]


def test_a_fifth_of_the_tasks_is_held_out_whatever_else_there_is(tmp_path: Path) -> None:
    names = [f"task-{number}" for number in range(1000)]
    splits = {name: split_of("shell", name) for name in names}
    assert 150 < Counter(splits.values())[Split.EVAL] < 250
    found = read(tmp_path, *[f'{{"id": "{name}"}}' for name in reversed(names)])
    assert {task.id: task.split for task in found} == splits


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2: it is no JSON object"),
        ('{"id": "b"', "line 2: it is no JSON object"),
        ('{"task": "b"}', "line 2: id = None: expected 1 to 100 letters"),
        ('{"id": "b c"}', "line 2: id = 'b c': expected 1 to 100 letters"),
        ('{"id": "a"}', "line 2: id = 'a' is there twice"),
        ('{"id": "b", "split": "test"}', "line 2: split = 'test': expected train or eval"),
        ('{"id": "b", "split": ["eval"]}', r"line 2: split = \['eval'\]: expected train or eval"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, '{"id": "a"}', line)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tasks .*none\.jsonl: No such file"):
        read_tasks(tmp_path / "none.jsonl", "shell", accepts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"check": "true"}, "instruction is missing: expected a text"),
        ({"instruction": "go", "check": " "}, "check is missing: expected a text"),
        ({"instruction": 1, "check": "true"}, "instruction = 1: expected a text"),
        ({"instruction": "go", "check": "true", "file": {}}, "unknown field 'file': known are"),
        ({"instruction": "go", "check": "a\0"}, "check: expected at most 32768 bytes"),
        ({"instruction": "go", "check": "true", "files": []}, "files = .*: expected an object"),
        ({"instruction": "go", "check": "true", "files": {"../a": ""}}, "a path below /task"),
        ({"instruction": "go", "check": "true", "files": {"/a": ""}}, "a path below /task"),
        ({"instruction": "go", "check": "true", "files": {"a": 1}}, "'a' = 1: expected a text"),
        ({"instruction": "go", "check": "true", "files": {"a": "x" * (5 << 20)}}, "5242880 char"),
    ],
)
def test_a_wrong_field_of_a_terminal_task_is_named(fields: Json, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TerminalKind().check_task(fields)
