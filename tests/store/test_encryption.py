"""An encrypted store: nobody without its key finds a word of it, and nothing else changes."""

from __future__ import annotations

import os
import secrets
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from nextstate.config import StoreConfig
from nextstate.episodes import Episode
from nextstate.errors import ConfigError, SealError, StartError
from nextstate.records import Feedback, Turn, Verdict
from nextstate.store import Store
from nextstate.store.encryption import Encryption
from nextstate.store.shares import OWNER
from nextstate.store.texts import content_hash
from nextstate.store_key import (
    FILE_VARIABLE,
    VARIABLE,
    StoreKey,
    find_store_key,
    make_key_file,
)
from tests.encrypted import encrypt
from tests.store.test_forgetting import LONG, said
from tests.store.test_records import add
from tests.store.test_records import turn as a_turn

WORDS = (
    *("wordofuser", "wordofreply", "wordoftool", "wordofstate", "wordofstop", "wordofhint"),
    *("wordofcomment", "wordoftask", "wordofmetadata", "wordofsession", "wordofclient"),
)
STATES = "wordofstate is what followed"

pytestmark = pytest.mark.sqlite


def fill(store: Store, count: int = 3) -> None:
    """Records whatever may hold a person's words: one word of its own for each place."""
    for number in range(count):
        request: dict[str, Any] = {
            "messages": [
                {"role": "system", "content": f"{LONG} wordofuser {number}"},
                {"role": "user", "content": f"wordofuser asks {number}"},
            ],
            "tools": [{"name": "wordoftool"}],
        }
        turn = a_turn(
            number,
            prompt_ids=tuple(range(1000 * number, 1000 * number + 300)),
            completion_ids=(7, number),
            request=request,
            reply={"role": "assistant", "content": f"wordofreply {number}"},
            session=f"wordofsession-{number}",
            sampling={"stop": ["wordofstop"], "temperature": 0.5},
        )
        with store.recording() as recording:
            keys = (content_hash(f"{key} {number}".encode()) for key in ("chain", "reply"))
            recording.add_turn(
                turn,
                *keys,
                context_key=content_hash(b"words") + content_hash(b"system, letters"),
                client_session=f"wordofclient-{number}",
                place=content_hash(b"place"),
            )
        add(store, said(100 + number, turn, id=f"later_{number}"), next_state=STATES)
        hint = "wordofhint says it."
        store.judging.settle_verdict(Verdict(turn.id, (-1,), -1, "rules", hint, (9, 8)))
        store.reviewing.give(Feedback(turn.id, -1, hint, "wordofcomment"), OWNER)
        episode = Episode(
            id=f"ep_{number}",
            lineage="main",
            environment="e",
            task=f"wordoftask {number}",
            metadata={"of": "wordofmetadata"},
            group=f"group_{number}",
        )
        store.episodes.open([episode], None)


def everything(store: Store) -> list[object]:
    """What can be read back."""
    ids = store.turns.ids()
    found: list[object] = [store.turns.get(one) for one in ids]
    found += [store.turns.next_states(one) for one in ids]
    found += [store.judging.verdict(one) for one in ids]
    found += [store.judging.feedback(one) for one in ids]
    found += [store.episodes.get(f"ep_{number}") for number in range(len(ids) // 2)]
    found += [store.lookup.summaries(ids)]
    with store.recording() as recording:
        context = content_hash(b"words") + content_hash(b"system, letters")
        for size in (16, 24, 32):
            found.append(recording.sessions.with_context_prefix(context[:size]))
        found.append(recording.sessions.with_context_key(context))
        found.append(recording.sessions.with_chain_key(content_hash(b"chain 1")))
        found.append(recording.sessions.with_reply_key(content_hash(b"reply 1")))
        found.append(recording.sessions.cut_session(content_hash(b"place")))
        found.append(recording.sessions.newest_started("wordofclient-1"))
        found.append(recording.sessions.next_index("wordofsession-1"))
        found.append(recording.sessions.parent_of("later_1"))
    return found


def in_files(folder: Path) -> list[str]:
    """The words, and unkeyed hashes of short texts, that are in any file of the folder."""
    files = b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    found = [word for word in WORDS if word.encode() in files]
    hashes = {
        "a next state": STATES.encode(),
        "a comment": b"wordofcomment",
        "a chain": b"chain 1",
        "a task": b"wordoftask 1",
    }
    found += [f"the hash of {n}" for n, text in hashes.items() if content_hash(text) in files]
    # Whoever knows the environment can try tasks by this one.
    task_key = Episode("ep_1", "main", "e", "wordoftask 1").task_key
    return found + (["the key of a task"] if task_key.encode() in files else [])


@contextmanager
def opened(config: StoreConfig) -> Iterator[Store]:
    with closing(Store(config, clock=lambda: 100.0)) as store:
        yield store


def change(config: StoreConfig, begin: Callable[[Encryption], None]) -> None:
    with Store.encryption(config) as encryption:
        begin(encryption)
        encryption.go_on(None, lambda *_: None, lambda *_: None)


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return StoreConfig(dir=str(tmp_path / "state"))


def test_no_byte_of_a_conversation_is_in_the_files(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(config) as store:
        fill(store)
        found = in_files(config.path)
        assert found[: len(WORDS)] == [*WORDS], "a store that is not encrypted shows every word"
        assert len(found) == len(WORDS) + 5, found
        before = everything(store)
    encrypt(config, monkeypatch)
    assert in_files(config.path) == []
    with opened(config) as store:
        assert everything(store) == before
        add(store, a_turn(50, reply={"content": "wordofreply"}))
        assert in_files(config.path) == [], "what is recorded later, while the store is open"
        assert store.verifying.problems(lambda *_: None) == []
    assert in_files(config.path) == []


def test_a_store_that_was_encrypted_from_the_start_is_the_same_to_its_readers(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt(config, monkeypatch)
    clear = StoreConfig(dir=str(tmp_path / "clear"))
    with opened(config) as store, opened(clear) as other:
        for one in (store, other):
            fill(one)
        assert everything(store) == everything(other)
        assert in_files(config.path) == []


def test_it_is_taken_away_and_every_byte_is_readable_without_a_key(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(config) as store:
        fill(store)
        before = everything(store)
    encrypt(config, monkeypatch)
    change(config, Encryption.turn_off)
    monkeypatch.delenv(VARIABLE)
    with opened(config) as store:
        assert store.vault is None
        assert everything(store) == before
        assert store.verifying.problems(lambda *_: None) == []


def test_a_new_data_key_changes_every_sealed_byte(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt(config, monkeypatch)
    with opened(config) as store:
        fill(store)
        before = everything(store)
    old = stored_bytes(config)
    change(config, Encryption.change_data_key)
    assert not old & stored_bytes(config)
    with opened(config) as store:
        assert everything(store) == before
        assert store.verifying.problems(lambda *_: None) == []


def stored_bytes(config: StoreConfig) -> set[object]:
    """Every sealed value and name in the database."""
    with closing(sqlite3.connect(config.path / "nextstate.sqlite3")) as connection:
        found: set[object] = set()
        for query in (
            "SELECT hash, stored FROM texts",
            "SELECT session, messages, reply, completion_ids, sampling, chain_key, context_key "
            "FROM turns",
            "SELECT text FROM next_states",
            "SELECT task, metadata, task_key FROM episodes",
        ):
            for row in connection.execute(query):
                found |= {*row}
        return {one for one in found - {None} if not str(one).startswith("{")}  # numbers only


def test_another_key_opens_the_store_and_the_old_one_does_not(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = encrypt(config, monkeypatch)
    with opened(config) as store:
        fill(store)
        before, sealed = everything(store), stored_bytes(config)
    new = StoreKey(secrets.token_bytes(32), "the test")
    with Store.encryption(config) as encryption:
        encryption.change_key(new)
    assert stored_bytes(config) == sealed, "only the data key is wrapped anew"
    with pytest.raises(SealError, match="is not the one of the store"):
        Store(config)
    monkeypatch.setenv(VARIABLE, new.key.hex())
    with opened(config) as store:
        assert everything(store) == before
    assert old.key != new.key


def test_a_start_without_the_key_says_how_to_give_it(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt(config, monkeypatch)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(SealError, match=f"is encrypted, and no key is given: set {VARIABLE}, or"):
        Store(config)


@pytest.mark.parametrize("text", ["secret", "a" * 64, "01" * 32, "g" * 64, "1234567890abcdef" * 3])
def test_what_is_no_key_is_refused_and_not_quoted(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    encrypt(config, monkeypatch)
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{VARIABLE} does not hold a key") as raised:
        Store(config)
    assert text not in str(raised.value)


def test_the_key_comes_from_a_file_or_from_systemd(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = encrypt(config, monkeypatch)
    monkeypatch.delenv(VARIABLE)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "nextstate-store-key").write_text(key.key.hex() + "\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    Store(config).close()
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Store(config)
    monkeypatch.setenv(FILE_VARIABLE, str(credentials / "nextstate-store-key"))
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    Store(config).close()


def test_a_key_beside_what_it_opens_is_refused(config: StoreConfig) -> None:
    Store(config).close()
    with pytest.raises(ConfigError, match="lies in the state folder"):
        make_key_file(config.path / "key", config.path)
    assert not (config.path / "key").exists()


def test_nobody_else_has_the_store_open_meanwhile(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        opened(config),
        pytest.raises(StartError, match=r"is in use .*: end `nextstate up`"),
        Store.encryption(config),
    ):
        pass
    encrypt(config, monkeypatch)


_KEYRING = """
import os
from pathlib import Path
def get_password(service, account):
    if os.environ.get("NO_DESKTOP"):
        raise RuntimeError("no bus")
    file = Path(__file__).with_name(account.replace("/", "-") + "." + service)
    return file.read_text() if file.exists() else None
"""


@pytest.fixture
def keyring(config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the store's key in a keyring, with the one call of the package that we use."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/keyring.py").write_text(_KEYRING)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "keyring", raising=False)
    for variable in (VARIABLE, FILE_VARIABLE, "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "modules" / (str(config.path).replace("/", "-") + ".nextstate")


def test_the_keyrings_key_of_this_folder_opens_it(
    config: StoreConfig, keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = encrypt(config, monkeypatch).key.hex()
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(SealError, match="no key is given"):
        Store(config)
    keyring.write_text(key)
    found = find_store_key(config.path)
    assert found == StoreKey(bytes.fromhex(key), "the keyring")
    assert find_store_key(config.path.with_name("other")) is None
    Store(config).close()
    monkeypatch.setenv(VARIABLE, secrets.token_hex(32))  # what is named comes first
    with pytest.raises(SealError, match=f"the key in {VARIABLE} is not the one"):
        Store(config)


def test_a_keyring_without_a_desktop_or_with_another_word_is_told(
    config: StoreConfig, keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring.write_text("a password")
    with pytest.raises(ConfigError, match="the keyring does not hold a key") as told:
        find_store_key(config.path)
    assert "a password" not in str(told.value)
    monkeypatch.setenv("NO_DESKTOP", "1")
    assert find_store_key(config.path) is None


_KILLED = """
import os, signal, sys, traceback
from nextstate.config import StoreConfig
from nextstate.store import Store, encryption
from nextstate.store_key import find_store_key
encryption._AT_ONCE = 2
config = StoreConfig(dir=sys.argv[1])

def work(what, left):
    def step(*_):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    key = find_store_key(config.path)
    with Store.encryption(config) as found:
        found._database.compact_on = (lambda old: lambda on: (step(), old(on), step()))(
            found._database.compact_on
        )
        if not found.is_interrupted and what != "go_on":
            found.turn_on(key) if what == "turn_on" else getattr(found, what)()
        if found.is_interrupted:
            found.go_on(key, step, step)

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            what, left = line.split()
            work(what, int(left))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize("what", ["turn_on", "change_data_key", "turn_off"])
def test_a_kill_at_any_moment_loses_nothing_and_the_command_goes_on(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "turn_on":
        monkeypatch.setenv(VARIABLE, secrets.token_hex(32))
    else:
        encrypt(config, monkeypatch)
    with opened(config) as store:
        fill(store)
        before = everything(store)
    kills = 0
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", _KILLED, config.dir]
    with subprocess.Popen(command, text=True, **pipes) as forking:
        assert forking.stdin is not None
        assert forking.stdout is not None
        while True:  # each fork is killed after one more step
            print("go_on" if kills else what, kills, file=forking.stdin, flush=True)
            if (code := int(forking.stdout.readline())) == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
            with pytest.raises(SealError, match="run it again"):
                Store(config)
        forking.stdin.close()
    assert kills > 3
    with opened(config) as store:
        assert everything(store) == before
        assert store.verifying.problems(lambda *_: None) == []
    assert (in_files(config.path) == []) == (what != "turn_off")


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE texts SET stored = "
        "CAST(substr(stored, 1, 30) || x'00' || substr(stored, 32) AS BLOB)",
        "UPDATE texts SET stored = (SELECT b.stored FROM texts b WHERE b.hash > texts.hash "
        "ORDER BY b.hash LIMIT 1) WHERE hash < (SELECT max(hash) FROM texts)",
        "UPDATE texts SET stored = x'00'",
    ],
)
def test_a_text_that_was_changed_or_moved_is_an_error(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    encrypt(config, monkeypatch)
    with opened(config) as store:
        fill(store, 1)
    alter(config, damage)
    with opened(config) as store:
        with pytest.raises(SealError, match="was changed or moved"):
            store.turns.get("turn_0")
        assert "not what its name says" in " ".join(store.verifying.problems(lambda *_: None))


@pytest.mark.parametrize("column", ["completion_ids", "behaviour_logprobs", "sampling"])
def test_values_of_two_turns_that_change_places_are_an_error(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    encrypt(config, monkeypatch)
    with opened(config) as store:
        fill(store, 2)
    other = f"(SELECT b.{column} FROM turns b WHERE b.id = 'turn_1')"
    alter(config, f"UPDATE turns SET {column} = {other} WHERE id = 'turn_0'")
    with opened(config) as store:
        with pytest.raises(SealError, match="was changed or moved"):
            store.turns.get("turn_0")
        assert isinstance(store.turns.get("turn_1"), Turn)
        problems = store.verifying.problems(lambda *_: None)
    assert problems == ["1 turns have a sealed value that was changed: turn_0"]


def test_a_plain_text_in_the_place_of_a_sealed_one_is_an_error(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt(config, monkeypatch)
    with opened(config) as store:
        fill(store, 1)
    alter(config, """UPDATE turns SET sampling = '{"stop":["evil"]}' WHERE id = 'turn_0'""")
    with opened(config) as store, pytest.raises(SealError, match="was changed or moved"):
        store.turns.get("turn_0")


def alter(config: StoreConfig, statement: str) -> None:
    with closing(sqlite3.connect(config.path / "nextstate.sqlite3")) as connection, connection:
        assert connection.execute(statement).rowcount


def test_a_process_without_the_key_reads_states_and_no_text(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt(config, monkeypatch)
    with opened(config) as store:
        fill(store)
    monkeypatch.delenv(VARIABLE)
    with closing(Store(config, with_key=False)) as store:
        assert store.counts()["episodes/open"] == 3
        assert store.groups.unfinished("group_") != []
        with pytest.raises(SealError, match="this process has no key"):
            store.turns.get("turn_0")


def test_a_failed_open_leaves_nothing_open(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt(config, monkeypatch)
    monkeypatch.setenv(VARIABLE, secrets.token_hex(32))
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SealError, match="is not the one of the store"):
        Store(config)
    assert len(os.listdir("/proc/self/fd")) == open_files
