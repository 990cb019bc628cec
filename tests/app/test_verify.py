"""`nextstate verify`: what is stored is whole, or the command says what is not."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing, nullcontext
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.config import StoreConfig
from nextstate.engine.adapter_files import (
    CARD_FILE,
    MODEL_FILE,
    WEIGHTS_FILE,
    file_sha256,
    folder_sha256,
)
from nextstate.records import Feedback, PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.shares import OWNER
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
    store.reviewing.give(Feedback(second.id, 1, "Be brief.", "It was long."), OWNER)
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


def with_folders(config: Path) -> dict[str, Path]:
    """Everything that an engine loads, as the learner and `judge train` leave it."""
    settings = Settings.read(config)
    store = Store(settings.store)
    names = {
        "serving": "versions/main/v000001",
        "candidate": "versions/main/v000002",
        "whole": "versions/main/v000003",
        "judge": "judge/v000001",
        "warm-up": "warm-up/0123456789ab-rank16",
    }
    folders = {what: store.dir / name for what, name in names.items()}
    for number, (what, folder) in enumerate(folders.items(), 1):
        folder.mkdir(parents=True)
        weights = MODEL_FILE if what == "whole" else WEIGHTS_FILE
        for name in (weights, "adapter_config.json", "tokenizer.json"):
            (folder / name).write_text(f"{name} of {what}")
        sha256 = folder_sha256(folder)
        (folder / CARD_FILE).write_text(f'{{"number": 1, "sha256": "{sha256}"}}')
        if folder.parent.name == "main":
            made = PolicyVersion("main", number, 0, str(folder), sha256, 1, VersionState.CANDIDATE)
            store.versions.add(made, None)
    store.versions.set_serving("main", 1, "ana")
    store.ledger.tell_judge(1, None, folder_sha256(folders["judge"], with_card=True))
    store.close()
    return folders


@pytest.mark.parametrize("what", ["serving", "candidate", "whole", "judge", "warm-up"])
def test_a_changed_byte_of_any_file_that_an_engine_loads_is_found(
    config: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    folder = with_folders(config)[what]
    assert verify(config, capsys)[0] == 0
    loaded = {file.name for file in folder.iterdir()} - {CARD_FILE}
    assert len(loaded) == 3
    for name in (*loaded, *([CARD_FILE] if what in ("judge", "warm-up") else [])):
        file = folder / name
        whole = file.read_bytes()
        for changed in (whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], whole[:-1], None):
            file.unlink() if changed is None else file.write_bytes(changed)
            code, lines = verify(config, capsys)
            assert (code, len(lines)) == (2, 1), (name, lines)
            assert str(folder) in lines[0]
            file.write_bytes(whole)
    (folder / "adapter_model.bin").touch()
    assert verify(config, capsys)[0] == 2
    (folder / "adapter_model.bin").unlink()
    (folder / ".nfs0123").touch()  # no engine loads a hidden file
    assert verify(config, capsys)[0] == 0


def test_a_judge_that_the_ledger_does_not_tell_of_is_found(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_folders(config)["judge"]
    second = folder.with_name("v000002")
    shutil.copytree(folder, second)
    (second / CARD_FILE).write_text('{"number": 2}')
    code, lines = verify(config, capsys)
    assert code == 2
    assert "v000002 is not one that the ledger tells of" in lines[0]
    store = Store(StoreConfig(dir=str(config.parent / "state")))
    store.ledger.tell_judge(2, 1, folder_sha256(second, with_card=True))
    store.close()
    assert verify(config, capsys)[0] == 0
    shutil.rmtree(second)
    shutil.copytree(folder, second)  # the first one votes again
    code, lines = verify(config, capsys)
    assert code == 2
    assert "v000002 is not one that the ledger tells of" in lines[0]


def test_it_says_how_far_it_is_while_it_reads_files(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_folders(config)
    told: list[tuple[str, int, int | None]] = []
    monkeypatch.setattr(
        "nextstate.app.progress.progress", lambda: nullcontext(lambda *step: told.append(step))
    )
    assert verify(config, capsys)[0] == 0
    assert told[-4:] == [*(("reading versions", n, 3) for n in range(3)), ("reading judges", 0, 1)]


def test_a_version_that_was_registered_by_its_weights_alone_is_whole(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it was before every file counted."""
    folder = config.parent / "v1"
    folder.mkdir()
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    store = Store(StoreConfig(dir=str(config.parent / "state")))
    sha256 = file_sha256(folder / WEIGHTS_FILE)
    version = PolicyVersion("main", 1, 0, str(folder), sha256, 1, VersionState.CANDIDATE)
    store.versions.add(version, None)
    store.close()
    assert verify(config, capsys)[0] == 0
    (folder / WEIGHTS_FILE).write_bytes(b"Weights")
    assert verify(config, capsys)[0] == 2


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
