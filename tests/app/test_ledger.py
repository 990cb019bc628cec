"""`nextstate ledger`: a line for each thing that happened, in words."""

from __future__ import annotations

import gc
import json
import secrets
from contextlib import closing
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.config import StoreConfig
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.forgetting import Wanted
from nextstate.store_key import VARIABLE
from tests.store.test_forgetting import judge, record, said, train


@pytest.fixture
def config(tmp_path: Path) -> Path:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    one = said(0, None)
    after = said(1, one)
    other = said(2, None)
    record(store, one, after, other)
    judge(store, one.id, after)
    train(store, 1, 0)
    worse = PolicyVersion("main", 2, 1, "/v2", "ff", 1, VersionState.REJECTED, {}, "too far")
    store.versions.add(worse, None)
    store.versions.set_serving("main", 0, "ana")
    store.versions.pause("main", "ana")
    store.versions.resume("main")
    store.versions.forget_adapter("main", 2)
    store.versions.reject("main", 1, "rolled back: a fall")
    store.forgetting.forget(Wanted(turns=[other.id]), "ana")
    store.close()
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    return file


def lines(config: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    capsys.readouterr()
    assert main(["ledger", "--config", str(config), *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_each_entry_is_a_line_in_words(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split("  ")[-1] for line in lines(config, capsys)] == [
        "version 1 of main was made from version 0 with 1 turn; it is candidate",
        "version 1 of main is serving",
        "version 2 of main was made from version 1 with 0 turns; it is rejected: too far",
        "version 0 of main serves by choice of ana",
        "version 1 of main is retired",
        "main was paused by ana",
        "main was resumed by a person",
        "version 2 of main: its adapter was deleted to make room",
        "version 1 of main is rejected: rolled back: a fall",
        "forgotten by ana: 1 turn",
    ]


def test_an_empty_ledger_is_said_to_be_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    assert lines(file, capsys, "--json") == []
    assert main(["ledger", "--config", str(file)]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "nextstate: the ledger is empty: no version was made yet\n")


def test_each_change_of_the_encryption_is_told_without_a_key(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(lines(config, capsys, "--limit", "0"))
    monkeypatch.setenv(VARIABLE, secrets.token_hex(32))
    new = config.with_name("new.key")
    gc.collect()  # a command leaves its store to the end of its process
    assert main(["encrypt", "--config", str(config)]) == 0
    assert main(["encrypt", "--config", str(config), "--rotate"]) == 0
    assert main(["encrypt", "--config", str(config), "--rotate", "--key-file", str(new)]) == 0
    monkeypatch.setenv(VARIABLE, new.read_text())
    assert main(["encrypt", "--config", str(config), "--off"]) == 0
    monkeypatch.delenv(VARIABLE)
    assert [line.split("  ")[-1] for line in lines(config, capsys, "--limit", "0")[before:]] == [
        "encryption: the store was encrypted",
        "encryption: everything was encrypted anew",
        "encryption: another key opens the store",
        "encryption: it was taken away",
    ]
    with closing(Store(Settings.read(config).store)) as store:
        assert store.ledger.problems() == []


def test_entries_are_paged_and_are_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(config, capsys, "--limit", "2", "--before", "3")
    assert [line.split()[0] for line in shown] == ["1", "2"]
    first = json.loads(lines(config, capsys, "--limit", "0", "--json")[0])
    assert first["content"]["turns"] == [["turn_0", -1, True, None]]
    assert len(first["hash"]) == 64


def test_verify_prints_the_head_and_checks_one(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "--config", str(config)]) == 2  # its adapters are not on this disk
    capsys.readouterr()
    assert main(["verify", "--config", str(config), "--head", "3:00"]) == 2
    assert "the ledger does not go on from 3:00" in capsys.readouterr().out
