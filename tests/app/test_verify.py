"""`nextstate verify`: what is stored is whole, or the command says what is not."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.config import StoreConfig
from nextstate.records import Feedback, PolicyVersion, VersionState
from nextstate.store import Store
from tests.store.test_forgetting import LONG, judge, message, record, said
from tests.store.test_records import turn


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two turns with a verdict and a remark, and texts that are compressed against another one."""
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    first = said(0, None)
    second = said(1, first)
    record(store, first, second)
    judge(store, first.id, second)
    store.judging.give_feedback(Feedback(second.id, 1, "Be brief.", "It was long."))
    for number in (2, 3):
        request = {"messages": [message("user", f"{LONG} {number}")]}
        record(store, turn(number, session=f"s{number}", request=request))
    store.close()
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    return file


def verify(config: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main(["verify", "--config", str(config)])
    return code, capsys.readouterr().out.splitlines()


def test_a_whole_store_is_whole(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, empty = " ok   4 turns and 0 versions are whole", " ok   ledger: no entry yet"
    assert verify(config, capsys) == (0, [whole, empty])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE texts SET uses = uses + 1 WHERE base NOT NULL", "1 of 19 texts is miscounted"),
        ("UPDATE texts SET stored = x'00' WHERE base NOT NULL", "is not what its name says"),
        ("DELETE FROM texts WHERE base NOT NULL", "texts is missing"),
        ("UPDATE counts SET count = 7 WHERE key = 'main'", "turns/main is counted as 7, and there"),
        ("DELETE FROM turns WHERE id = 'turn_0'", "refers to one of turns that is gone"),
    ],
)
def test_what_was_changed_by_hand_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    file = config.parent / "state" / "nextstate.sqlite3"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(change)
        connection.commit()
    code, lines = verify(config, capsys)
    assert code == 2
    assert any(said in line for line in lines), lines
    assert all(line.startswith("FAIL  ") for line in lines)


def test_an_adapter_that_is_not_the_registered_one_is_named(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(StoreConfig(dir=str(config.parent / "state")))
    path = str(config.parent / "v1")
    store.versions.add(PolicyVersion("main", 1, 0, path, "ff", 1, VersionState.CANDIDATE), None)
    store.close()
    code, lines = verify(config, capsys)
    assert code == 2
    assert lines[0].startswith("FAIL  version 1 of main: ")
