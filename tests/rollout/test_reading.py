"""rollout/reading.py: where --tasks may lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextstate.errors import ConfigError
from nextstate.records import Json
from rollout.reading import read_source


def seen(fields: Json) -> None:
    if fields.get("level") == "bad":
        raise ConfigError("level = 'bad'")


def test_fields_after_a_question_mark_are_given_to_every_task(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"id": "a", "level": 1}\n{"id": "b"}')
    plain = read_source(str(file), "terminal", seen)
    assert [one.fields for one in plain] == [{"level": 1}, {}]
    given = read_source(f"{file}?sandbox=docker%3Atools&level=2&show=", "terminal", seen)
    expected = {"sandbox": "docker:tools", "level": "2", "show": ""}
    assert [one.fields for one in given] == [expected] * 2
    assert [one.split for one in given] == [one.split for one in plain]
    with pytest.raises(ConfigError, match=r"tasks\.jsonl, line 1: level = 'bad'"):
        read_source(f"{file}?level=bad", "terminal", seen)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tasks .*none\.jsonl: No such file"):
        read_source(f"{tmp_path}/none.jsonl", "terminal", seen)
