"""The ledger tells what happened to versions, and shows every edit of itself and of them."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from nextstate import sealed_files
from nextstate.config import StoreConfig
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.forgetting import Wanted
from nextstate.store.ledger import HEAD_FILE, Head, Kind, append
from tests.store.rows import change, select
from tests.store.test_forgetting import judge, record, said, train
from tests.store.test_migrations import OF_VERSION_3, old_database

SECRET = "my locker opens with 4711"


def candidate(number: int, parent: int, state: VersionState) -> PolicyVersion:
    return PolicyVersion("main", number, parent, f"/v{number}", "ff", 1, state, {"kl": 0.01})


@pytest.fixture
def told(store: Store) -> Iterator[Store]:
    """A store with something of each kind in its ledger."""
    for number in range(4):
        one = replace(said(2 * number, None), reply=SECRET)
        after = said(2 * number + 1, one)
        record(store, one, after)
        judge(store, one.id, after)
    versions = store.versions
    train(store, 1, 0)
    train(store, 2, 1)
    versions.pause("main", "ana")
    versions.resume("main", "ana")
    versions.add(candidate(3, 2, VersionState.CANDIDATE), None)
    versions.note("main", 3, {"exam/right": 0.5})
    versions.fail(versions.newest("main", 1)[0], "worse than its parent")
    versions.add(candidate(4, 2, VersionState.REJECTED), None)
    versions.set_serving("main", 1, "ana")
    versions.reject("main", 2, "rolled back: a fall")
    versions.forget_adapter("main", 4)
    store.forgetting.forget(Wanted(turns=["turn_7"]), "ana")
    return store


def rows(store: Store) -> list[tuple[int, float, str, str, bytes]]:
    return [(*row,) for row in select(store, "SELECT * FROM ledger ORDER BY seq")]


def write(store: Store, entries: list[tuple[int, float, str, str, bytes]]) -> None:
    change(store, "DELETE FROM ledger")
    for entry in entries:
        values = dict(zip(("seq", "at", "kind", "content", "hash"), entry, strict=True))
        change(store, "INSERT INTO ledger VALUES (:seq, :at, :kind, :content, :hash)", **values)


def test_it_tells_what_happened_in_order(told: Store) -> None:
    entries = told.ledger.newest(None)
    assert [entry.seq for entry in entries] == [*range(1, len(entries) + 1)]
    if told.vault is not None:
        assert entries.pop(0).kind == "encryption"
    assert [entry.kind for entry in entries] == [
        *("version", "state", "version", "state", "state", "pause", "resume", "version", "exam"),
        *("state", "version", "choice", "state", "state", "state", "deleted", "forgotten"),
    ]
    first, *_ = entries
    assert first.content["turns"] == [["turn_0", -1, True, None]]
    assert first.content["parent"] == 0
    assert first.content["sha256"] == "ff"
    assert entries[11].content == {"lineage": "main", "number": 1, "by": "ana"}
    assert entries[-1].content == {"turns": ["turn_7"], "episodes": 0, "by": "ana"}
    assert told.ledger.newest(2, before=entries[2].seq) == entries[:2]


def test_a_hash_is_that_of_the_entry_before_and_its_own_content(told: Store) -> None:
    before = bytes(32)
    for seq, at, kind, content, found in rows(told):
        before = hashlib.sha256(before + orjson.dumps([seq, at, kind, content])).digest()
        assert found == before


def test_it_holds_no_word_of_a_conversation(told: Store) -> None:
    assert all(SECRET not in content for _, _, _, content, _ in rows(told))


def test_every_edit_of_an_entry_is_found(told: Store) -> None:
    entries = rows(told)
    assert told.ledger.problems() == []
    for number in range(len(entries)):
        seq, at, kind, content, hashed = entries[number]
        for edited in (
            (seq, at + 1e-6, kind, content, hashed),
            (seq, at, "pause" if kind != "pause" else "resume", content, hashed),
            (seq, at, kind, content.replace("1", "2", 1) + " ", hashed),
            (seq, at, kind, content, bytes([hashed[0] ^ 1]) + hashed[1:]),
        ):
            write(told, [*entries[:number], edited, *entries[number + 1 :]])
            (found,) = told.ledger.problems()
            assert f"entry {number + 1} was changed" in found
    write(told, entries)


def test_an_entry_that_is_missing_moved_or_put_in_is_found(told: Store) -> None:
    entries = rows(told)
    for number in range(len(entries) - 1):
        one, two = entries[number], entries[number + 1]
        write(told, [*entries[:number], *entries[number + 1 :]])
        assert "is missing" in told.ledger.problems()[0]
        swapped = [(one[0], *two[1:]), (two[0], *one[1:])]
        write(told, [*entries[:number], *swapped, *entries[number + 2 :]])
        assert "was changed" in told.ledger.problems()[0]
        later = [(entry[0] + 1, *entry[1:]) for entry in entries[number:]]
        write(told, [*entries[:number], one, *later])
        assert "was changed" in told.ledger.problems()[0]
    write(told, entries)


@pytest.mark.parametrize(
    ("edit", "undo", "told_of"),
    [
        (
            "UPDATE versions SET state = 'retired' WHERE number = 3",
            "UPDATE versions SET state = 'rejected' WHERE number = 3",
            "version 3 of main is",
        ),
        (
            "UPDATE versions SET sha256 = 'ee' WHERE number = 1",
            "UPDATE versions SET sha256 = 'ff' WHERE number = 1",
            "version 1 of main is",
        ),
        (
            "UPDATE samples SET trained_in = NULL, state = 'ready' WHERE turn = 'turn_0'",
            "UPDATE samples SET trained_in = 1, state = 'trained' WHERE turn = 'turn_0'",
            "trained on other turns than the ledger tells, or on other scores: turn_0",
        ),
        (
            "UPDATE samples SET score = 0 - score WHERE turn = 'turn_0'",
            "UPDATE samples SET score = 0 - score WHERE turn = 'turn_0'",
            "trained on other turns than the ledger tells, or on other scores: turn_0",
        ),
        (
            "UPDATE samples SET advantage = 2.5 WHERE turn = 'turn_0'",
            "UPDATE samples SET advantage = NULL WHERE turn = 'turn_0'",
            "trained on other turns than the ledger tells, or on other scores: turn_0",
        ),
    ],
)
def test_versions_that_differ_from_what_it_tells_are_named(
    told: Store, edit: str, undo: str, told_of: str
) -> None:
    change(told, edit)
    (found,) = told.ledger.problems()
    assert told_of in found
    change(told, undo)


def test_a_version_that_failed_its_exam_and_serves_by_choice_is_no_edit(told: Store) -> None:
    told.versions.set_serving("main", 3, "ana")
    assert told.ledger.problems() == []


def test_a_ledger_without_its_end_is_found_by_the_head_that_its_folder_notes(told: Store) -> None:
    entries, head = rows(told), told.ledger.newest(1)[0].head
    assert told.ledger.problems(head) == []
    write(told, entries[:9])
    assert told.ledger.problems()
    file = told.dir / HEAD_FILE
    noted = file.read_bytes()
    write(told, entries[:-1])  # only the heads tell of this entry
    (found,) = told.ledger.problems()
    assert f"does not go on from {head}, which {file} notes: it was cut" in found
    file.unlink()  # with the whole folder
    unseen = [f"{file} is not there, which notes the ledger's head"] if told.vault else []
    assert told.ledger.problems() == unseen
    assert told.ledger.problems(head) == [
        f"the ledger does not go on from {head}: it was cut, or written anew",
        *unseen,
    ]
    write(told, entries)
    file.write_bytes(noted)


def test_a_ledger_that_is_written_anew_is_found_by_a_head(told: Store) -> None:
    entries, head = rows(told), told.ledger.newest(1)[0].head
    before, forged = bytes(32), []
    for seq, at, kind, content, _ in entries:
        text = content.replace("ana", "bob")
        before = hashlib.sha256(before + orjson.dumps([seq, at, kind, text])).digest()
        forged.append((seq, at, kind, text, before))
    write(told, forged)
    (found,) = told.ledger.problems()
    assert "it was cut, or written anew" in found
    file = told.dir / HEAD_FILE
    noted = file.read_bytes()
    file.write_text(f"{len(forged)}:{forged[-1][-1].hex()}")  # with the whole folder
    problems = told.ledger.problems()
    if told.vault is None:
        assert problems == []
        assert told.ledger.problems(head)
    else:
        assert problems == [
            f"{file} is not encrypted, but its folder is: somebody has put it there; delete it"
        ]
    file.write_bytes(noted)
    write(told, entries)


def test_what_happens_after_a_cut_does_not_hide_it(
    told: Store, caplog: pytest.LogCaptureFixture
) -> None:
    entries, head = rows(told), told.ledger.newest(1)[0].head
    write(told, entries[:-1])
    for _ in range(2):
        told.versions.pause("main", "eve")
        told.versions.resume("main", "eve")
    assert told.ledger.problems() == [Head(told.dir).says(head)]
    assert f"does not go on from {head}" in caplog.text
    write(told, entries)


def test_an_entry_that_was_not_committed_is_not_noted(told: Store) -> None:
    noted = Head(told.dir).read()
    assert noted == told.ledger.newest(1)[0].head
    with suppress(KeyboardInterrupt), told.database.write() as connection:
        append(connection, 1.0, Kind.PAUSE, {"lineage": "main", "by": "ana"})
        raise KeyboardInterrupt
    with told.database.write():
        pass
    assert Head(told.dir).read() == noted


@pytest.mark.parametrize("is_read_only", [False, True])
def test_an_entry_stays_where_its_head_cannot_be_noted(
    told: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_read_only: bool,
) -> None:
    before = told.ledger.newest(1)[0].seq

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        if is_read_only:
            for name in ("touch", "unlink", "replace"):
                patch.setattr(Path, name, refused)
        patch.setattr(sealed_files, "write", refused)
        told.versions.pause("main", "ana")
    assert "the ledger's head cannot be noted" in caplog.text
    assert told.ledger.newest(1)[0].seq == before + 1
    told.versions.resume("main", "ana")
    assert Head(told.dir).read() == told.ledger.newest(1)[0].head
    assert [path.name for path in told.dir.glob(f".{HEAD_FILE}*")] == []


@pytest.mark.parametrize("head", ["", "1", "1:", "x:y", "99999:00", "0:" + "00" * 32])
def test_a_head_that_is_none_is_not_gone_on_from(told: Store, head: str) -> None:
    assert "does not go on from" in told.ledger.problems(head)[0]


SOMEBODY_ELSE = """
import sys
from nextstate.config import StoreConfig
from nextstate.store import Store
store = Store(StoreConfig(dir=sys.argv[1]))
store.versions.resume("main", "bo")
store.close()
"""


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("store", ["clear"], indirect=True)
def test_what_is_noted_costs_no_lock_of_the_database(store: Store) -> None:
    """A process without its locks writes into a log that another process has taken away."""
    for _ in range(2):
        store.versions.pause("main", "ana")
        subprocess.run([sys.executable, "-c", SOMEBODY_ELSE, str(store.dir)], check=True)
    for reader in (store, Store(StoreConfig(dir=str(store.dir)))):
        with closing(reader):
            assert len(reader.ledger.newest(None)) == 4


@pytest.mark.parametrize(
    "head", ["99999999999999999999:ab", "9" * 5000, "9" * 18 + ":" + "00" * 32]
)
def test_a_note_that_is_no_head_stays_and_stops_no_write(
    told: Store, caplog: pytest.LogCaptureFixture, head: str
) -> None:
    file = told.dir / HEAD_FILE
    noted = file.read_bytes()
    sealed_files.write(file, head.encode())
    try:
        told.versions.pause("main", "ana")
        assert told.ledger.newest(1)[0].kind == "pause"
        assert Head(told.dir).read() == head
    finally:
        file.write_bytes(noted)
    assert Head(told.dir).says(head) in caplog.text
    assert "or the server lost its last commits" in caplog.text


@pytest.mark.sqlite
def test_an_older_store_begins_its_ledger_with_its_versions(tmp_path: Path) -> None:
    old_database(tmp_path, OF_VERSION_3)
    with closing(Store(StoreConfig(dir=str(tmp_path)))) as store:
        versions = store.versions.all()
        assert [entry.kind for entry in store.ledger.newest(None)] == ["version"] * len(versions)
        assert versions
        assert store.ledger.problems() == []
