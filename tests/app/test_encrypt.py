"""`nextstate encrypt`, the files of an encrypted state folder, and what the engine reads."""

from __future__ import annotations

import gc
import hashlib
import os
import secrets
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nextstate import sealed_files
from nextstate.app.cli import main
from nextstate.app.page.episodes import picture
from nextstate.config import StoreConfig
from nextstate.engine import adapter_files
from nextstate.errors import AdapterError, EngineError, SealError
from nextstate.process_lock import ProcessLock
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store_key import FILE_VARIABLE, VARIABLE
from tests.encrypted import encrypt
from tests.store.test_encryption import everything, fill, in_files

WEIGHTS = b"weights that learned the wordofuser"
FILES = {
    "versions/main/v000001/adapter_model.safetensors": WEIGHTS,
    "judge/v000001/adapter_model.safetensors": b"wordofhint weights",
    "learner/main/checkpoint.pt": b"wordofreply checkpoint",
    "pictures/ep_0/3.png": b"\x89PNG\r\n\x1a\n wordoftask",
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with turns, and files of the learner and of an environment beside it."""
    config = StoreConfig(dir=str(tmp_path_factory.mktemp("filled") / "state"))
    for name, data in FILES.items():
        file = config.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (config.path / "versions/main/v000001/card.json").write_text("{}")
    judge = adapter_files.folder_sha256(config.path / "judge/v000001", with_card=True)
    with closing(Store(config)) as store:
        fill(store)
        store.ledger.tell_judge(1, None, judge)
    return config.path


@pytest.fixture
def config(tmp_path: Path, filled: Path) -> Iterator[StoreConfig]:
    """A copy of it, and a file of settings that names it."""
    (tmp_path / "nextstate.toml").write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    config = StoreConfig(dir=str(tmp_path / "state"))
    shutil.copytree(filled, config.path)
    yield config
    adapter_files.remove_all_served(config.path)


def command(config: StoreConfig, *arguments: str) -> int:
    gc.collect()  # a command leaves its store to the end of its process
    return main([*arguments, "--config", str(config.path.parent / "nextstate.toml")])


def test_a_command_encrypts_everything_and_another_one_takes_it_away(
    config: StoreConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with closing(Store(config)) as store:
        before = everything(store)
    key = tmp_path / "store.key"
    assert command(config, "encrypt", "--key-file", str(key)) == 0
    assert f"set {FILE_VARIABLE}={key} wherever" in capsys.readouterr().out
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert in_files(config.path) == []
    assert command(config, "turns") == 2
    assert "is encrypted, and no key is given: set NEXTSTATE_STORE_KEY" in capsys.readouterr().err

    monkeypatch.setenv(FILE_VARIABLE, str(key))
    assert command(config, "turns", "--grep", "wordofreply 1") == 0
    assert "wordofreply 1" in capsys.readouterr().out
    assert command(config, "feedback", "turn_1", "--score", "1") == 0
    assert command(config, "verify") == 0
    assert command(config, "encrypt") == 2
    assert "is encrypted already: --rotate changes its key" in capsys.readouterr().err
    with closing(Store(config)) as store:
        for name, data in FILES.items():
            assert sealed_files.read(config.path / name) == data
            assert b"wordof" not in (config.path / name).read_bytes()

    assert command(config, "encrypt", "--off") == 0
    monkeypatch.delenv(FILE_VARIABLE)
    assert {name: (config.path / name).read_bytes() for name in FILES} == FILES
    with closing(Store(config)) as store:
        assert len(everything(store)) == len(before)
        assert everything(store)[:12] == before[:12]
    assert command(config, "encrypt", "--off") == 2
    assert "is not encrypted" in capsys.readouterr().err


def test_another_key_is_a_matter_of_a_moment_and_the_old_one_opens_nothing(
    config: StoreConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encrypt(config, monkeypatch)
    old = os.environ[VARIABLE]
    sealed = (config.path / "learner/main/checkpoint.pt").read_bytes()
    key = tmp_path / "new.key"
    assert command(config, "encrypt", "--rotate", "--key-file", str(key)) == 0
    assert (config.path / "learner/main/checkpoint.pt").read_bytes() == sealed
    assert command(config, "turns") == 2
    assert f"the key in {VARIABLE} is not the one" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, key.read_text())
    assert command(config, "turns") == 0
    assert old != key.read_text().strip()


def test_a_new_data_key_changes_the_files_too_and_goes_on_after_a_kill(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, secrets.token_hex(32))
    assert command(config, "encrypt") == 0
    sealed = {name: (config.path / name).read_bytes() for name in FILES}
    changed = iter(sealed_files.sealable(config.path))

    def some(folder: Path) -> Iterator[Path]:
        yield next(changed)
        yield next(changed)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sealed_files, "sealable", some)
        with pytest.raises(KeyboardInterrupt):
            command(config, "encrypt", "--rotate")
    with pytest.raises(SealError, match="was interrupted: run it again"):
        Store(config)
    assert command(config, "encrypt", "--rotate") == 0
    with closing(Store(config)):
        for name, data in FILES.items():
            assert sealed_files.read(config.path / name) == data
            assert (config.path / name).read_bytes() != sealed[name]
    assert in_files(config.path) == []


def test_the_engine_reads_an_opened_copy_in_memory_that_is_gone_afterwards(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = config.path / "versions/main/v000001"
    assert adapter_files.prepare_served(str(folder)) == str(folder), "a plain one as it is"
    encrypt_with_files(config, monkeypatch)
    with closing(Store(config)):
        adapter_files.verify_adapter(folder, hashlib.sha256(WEIGHTS).hexdigest())
        served = Path(adapter_files.prepare_served(str(folder)))
        assert str(served) == adapter_files.served_folder(str(folder))
        assert (served / "adapter_model.safetensors").read_bytes() == WEIGHTS
        assert (served / "card.json").read_text() == "{}"
        assert served.parent.parent == Path("/dev/shm")
        for path in (served.parent, served, *served.iterdir()):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        adapter_files.remove_served(str(served))
        assert not served.exists()
        adapter_files.prepare_served(str(folder))
    adapter_files.remove_all_served(config.path)
    assert not served.parent.exists()


def encrypt_with_files(config: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, secrets.token_hex(32))
    assert command(config, "encrypt") == 0


def test_a_folder_of_another_account_in_memory_is_not_used(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt_with_files(config, monkeypatch)
    adapter_files.in_memory(config.path.resolve()).symlink_to(tmp_path)
    try:
        with closing(Store(config)), pytest.raises(EngineError, match="another account's"):
            adapter_files.prepare_served(str(config.path / "versions/main/v000001"))
    finally:
        adapter_files.in_memory(config.path.resolve()).unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"nextstate.toml", "state"}


def test_files_that_were_changed_or_change_places_are_an_error(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt_with_files(config, monkeypatch)
    adapter = config.path / "versions/main/v000001/adapter_model.safetensors"
    checkpoint = config.path / "learner/main/checkpoint.pt"
    with closing(Store(config)):
        checkpoint.write_bytes(adapter.read_bytes())
        with pytest.raises(SealError, match=r"checkpoint.pt was changed since it was encrypted"):
            sealed_files.read(checkpoint)
        adapter.write_bytes(adapter.read_bytes()[:-1])
        with pytest.raises(AdapterError, match="cannot be read"):
            adapter_files.verify_adapter(adapter.parent, "")


@pytest.mark.parametrize("what", ["turns", "adapter"])
def test_nothing_is_exported_in_clear_unless_a_person_says_so(
    what: str,
    config: StoreConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = config.path / "versions/main/v000001"
    with closing(Store(config)) as store:
        sha256 = hashlib.sha256(WEIGHTS).hexdigest()
        trained = PolicyVersion("main", 1, 0, str(folder), sha256, 1, VersionState.CANDIDATE)
        store.versions.add(trained, None)
    encrypt_with_files(config, monkeypatch)
    out = config.path.parent / ("turns.jsonl" if what == "turns" else "adapter")
    words = ["export", what, "--out", str(out)]
    words += ["--version", "1"] if what == "adapter" else []
    assert command(config, *words) == 2
    assert "Add --in-clear if that is what you want" in capsys.readouterr().err
    left_over = {path.name for path in out.parent.iterdir()}
    assert left_over == {"nextstate.toml", "state"}, "not even a draft"
    assert command(config, *words, "--in-clear") == 0
    data = out.read_bytes() if what == "turns" else (out / adapter_files.WEIGHTS_FILE).read_bytes()
    assert b"wordofuser" in data


@pytest.mark.parametrize("name", FILES)
def test_a_plain_file_in_the_place_of_an_encrypted_one_is_an_error(
    config: StoreConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    encrypt_with_files(config, monkeypatch)
    (config.path / name).write_bytes(b"what a thief would like to be read")
    with closing(Store(config)), pytest.raises(SealError, match="is not encrypted, but its folder"):
        sealed_files.read(config.path / name)
    assert command(config, "verify") == 2
    assert f"{config.path / name} is not encrypted" in capsys.readouterr().out


def test_what_was_deleted_before_and_not_overwritten_is_not_left_in_clear(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an earlier program: ours overwrites what it deletes."""
    file = config.path / "nextstate.sqlite3"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("PRAGMA secure_delete=OFF")
        connection.execute("CREATE TABLE old (text)")
        connection.execute("INSERT INTO old VALUES (?)", ("never overwritten " * 99_000,))
        connection.execute("DROP TABLE old")
    assert b"never overwritten" in file.read_bytes()
    encrypt_with_files(config, monkeypatch)
    assert b"never overwritten" not in file.read_bytes()


def test_what_was_half_written_does_not_stay_in_clear(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed learner's, and that of a training of a judge."""
    drafts = "versions/main/.v000003.draft", "judge/.v000002.draft", "judge/..v000002.draft.draft"
    for draft in drafts:
        (config.path / draft).mkdir()
        (config.path / draft / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (config.path / "learner/main/.checkpoint.pt.draft").write_bytes(WEIGHTS)
    encrypt_with_files(config, monkeypatch)
    assert in_files(config.path) == []


def test_a_store_is_not_encrypted_while_a_judge_is_being_trained(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, secrets.token_hex(32))
    with ProcessLock(config.path / "judge" / "lock", "it is trained", ""):
        assert command(config, "encrypt") != 0
    assert "a judge is being trained" in capsys.readouterr().err
    monkeypatch.delenv(VARIABLE)
    Store(config).close()


@pytest.mark.parametrize("more", [(), ("--off",), ("--rotate",), ("--key-file", "store.key")])
def test_a_store_on_a_server_is_refused_before_anything_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    url = "postgresql://ann:hunter2@db.example/turns"
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\nurl = "{url}"\n')
    assert main(["encrypt", *more, "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert "[store] url names a server (db.example), and only a store in a file can be" in said
    assert "encrypt the disks of the server" in said
    assert "hunter2" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"nextstate.toml"}


def test_the_page_shows_a_picture_of_an_encrypted_folder(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt_with_files(config, monkeypatch)
    with closing(Store(config)):
        assert picture(config.path, "ep_0", 3) == (FILES["pictures/ep_0/3.png"], "image/png")
    with closing(Store(config, with_key=False)):
        assert picture(config.path, "ep_0", 3) is None
        assert not sealed_files.may_write(config.path / "pictures/ep_1")


def test_doctor_says_whether_the_folder_is_encrypted_and_where_its_key_is(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(config, "doctor")
    assert "encryption" in (out := capsys.readouterr().out)
    assert "off: who can read the disk reads everything" in " ".join(out.split())
    encrypt(config, monkeypatch)
    command(config, "doctor")
    out = " ".join(capsys.readouterr().out.split())
    assert f"on; the key is in {VARIABLE}; vLLM reads opened adapters from memory, /dev/shm" in out
    monkeypatch.delenv(VARIABLE)
    command(config, "doctor")
    assert "is encrypted, and no key is given" in " ".join(capsys.readouterr().out.split())
