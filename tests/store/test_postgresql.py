"""What only a database on a server does: it restarts, refuses, and many write there at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from nextstate.app.cli import main
from nextstate.config import StoreConfig
from nextstate.errors import StoreError, WaitError
from nextstate.records import Feedback
from nextstate.store import Store
from nextstate.store.copying import TABLES, copy
from nextstate.store.forgetting import Wanted
from nextstate.store.shares import OWNER
from nextstate.store.waiting import Patience
from plugins.agents.profile import GENERIC, Profile
from proxy.exchange import record_exchange
from tests.postgresql_server import Server, needed, require_server
from tests.store.rows import change, select
from tests.store.test_records import add, judge, turn

psycopg = needed("psycopg")
PostgreSQL = needed("nextstate.store.postgresql").PostgreSQL
pytestmark = pytest.mark.sqlite  # it brings its own server
PROFILE = Profile(GENERIC)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that tests may kill."""
    require_server()
    found = Server()
    yield found
    found.close()


@pytest.fixture
def config(server: Server, tmp_path: Path) -> StoreConfig:
    name = f"t{time.monotonic_ns()}"
    return StoreConfig(str(tmp_path), server.database(name))


def keep_trying(work: Callable[[], object]) -> None:
    """As the proxy's writer does."""
    while True:
        try:
            work()
            return
        except WaitError:
            time.sleep(0.02)


def test_writers_at_once_merge_no_conversations_and_lose_no_next_state(
    config: StoreConfig,
) -> None:
    """Without a lock around a recording four writers made 72 sessions of 160, and lost turns."""
    from tests.proxy.test_recording import exchange

    def write(writer: int) -> None:
        store = Store(config)
        for number in range(6):
            for step in range(2):
                one = exchange(step)
                name = f"chat-{number}"  # which all writers use
                said = [{"role": "user", "content": f"I am {writer}"}, *one.request["messages"][1:]]
                one = one._replace(explicit_session=name, request={"model": "m", "messages": said})

                def once(one: Any = one) -> None:
                    with store.recording() as recording:
                        record_exchange(recording, one, PROFILE)

                keep_trying(once)
        store.close()

    Store(config).close()
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(4)))
    store = Store(config)
    found = select(store, "SELECT session, idx, parent, id FROM turns")
    assert len(found) == 48
    assert len({(row.session, row.idx) for row in found}) == 48
    followed = [row.parent for row in found if row.parent is not None]
    assert len(followed) == len(set(followed)) == 24
    assert len(select(store, "SELECT turn FROM next_states")) == 24
    assert store.verifying.problems(lambda *_: None) == []
    store.close()


def test_work_is_leased_once_by_judges_at_once(config: StoreConfig) -> None:
    store = Store(config)
    add(store, *map(turn, range(40)))

    def lease(_: int) -> list[str]:
        own = Store(config)
        found = [name for _ in range(5) for name in own.judging.lease(2, 60)]
        own.close()
        return found

    with ThreadPoolExecutor() as pool:
        leased = [name for some in pool.map(lease, range(4)) for name in some]
    assert sorted(leased) == sorted({*leased}) == sorted(f"turn_{n}" for n in range(40))
    store.close()


def test_a_query_that_takes_too_long_is_to_be_tried_again(config: StoreConfig) -> None:
    slow = Store(StoreConfig(config.dir, f"{config.url}?options=-c%20statement_timeout%3D50ms"))
    slow.database.patience = Patience(0.0)
    with pytest.raises(WaitError, match="statement timeout"):
        slow.database.waiting(lambda: select(slow, "SELECT pg_sleep(5)"))
    assert slow.turns.ids() == []
    slow.close()


def test_what_a_client_may_send_is_kept_whatever_it_is(config: StoreConfig) -> None:
    store = Store(config)
    odd = "a\0b\x01c\x010" + "é" * 500
    add(store, turn(0, client_model=odd, session=odd, finish_reason=odd, untrainable=odd))
    found = store.turns.get("turn_0")
    assert found is not None
    assert (found.client_model, found.session, found.finish_reason) == (odd, odd, odd)
    assert store.lookup.session(odd) is not None
    store.close()


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("consuming input failed: SSL SYSCALL error: Connection timed out", True),
        ("consuming input failed: SSL connection has been closed unexpectedly", True),
        ("connection failed: SSL error: unexpected eof while reading", True),
        ("connection failed: connection to server at x failed: Connection refused", True),
        ("connection failed: server does not support SSL, but SSL was required", False),
        ("connection failed: SSL error: certificate verify failed", False),
        ("connection failed: SSL error: tlsv1 alert unknown ca", False),
        ('connection failed: FATAL: password authentication failed for user "x"', False),
    ],
)
def test_a_link_that_is_cut_passes_with_tls_too_and_what_a_person_must_change_does_not(
    said: str, passes: bool
) -> None:
    """Turns that waited for the end of an SSL error were given up as lost."""
    dialect = PostgreSQL("postgresql://a/b")
    assert dialect.is_transient(psycopg.OperationalError(said)) is passes


def test_leases_and_beats_follow_the_databases_clock(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = Store(config), Store(config)
    add(here, turn(0))
    assert here.judging.lease(1, 30) == ["turn_0"]
    here.workers.beat("w", [], {})
    monkeypatch.setattr("time.time", lambda: 1e12)  # this machine's clock runs ahead
    assert abs(here.database.now() - there.database.now()) < 1.0
    assert there.judging.lease(1, 30) == []
    assert there.workers.others("other") == [([], {})]
    here.close()
    there.close()


def test_the_tables_are_written_anew_once_nobody_reads_there_any_more(
    config: StoreConfig,
) -> None:
    """A reader of two seconds is longer than what other statements wait for a lock."""
    store = Store(config, patience=Patience(0.1))
    add(store, turn(0))
    store.forgetting.forget(Wanted(turns=["turn_0"]))
    before = store.database.used_bytes()
    with store.database.read() as connection, ThreadPoolExecutor() as pool:
        connection.exec_driver_sql("SELECT count(*) FROM texts")
        done = pool.submit(store.compact)
        time.sleep(2.0)
        assert not done.done()
        connection.rollback()
        done.result()
    assert store.database.used_bytes() < before
    assert {row[0] for row in select(store, "SHOW lock_timeout")} == {"1s"}
    store.close()


def test_what_reads_sees_the_store_as_it_was_when_it_began(config: StoreConfig) -> None:
    store = Store(config)
    add(store, turn(0))
    with store.database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM texts").scalar_one() > 0
        assert store.forgetting.forget(Wanted(turns=["turn_0"])).turns == ("turn_0",)
        assert connection.exec_driver_sql("SELECT count(*) FROM texts").scalar_one() > 0
    assert select(store, "SELECT count(*) FROM texts") == [(0,)]
    store.close()


def test_an_error_shows_neither_the_password_nor_what_is_stored(config: StoreConfig) -> None:
    secret = config.url.replace("postgres@", "postgres:hunter2@")
    store = Store(StoreConfig(config.dir, secret))
    add(store, turn(0, client_model="my diagnosis"))
    judge(store, 0, 1)
    with pytest.raises(StoreError) as refused, store.recording() as recording:
        recording.add_turn(turn(0, client_model="my diagnosis"), b"c" * 16, b"r" * 16)
    with pytest.raises(StoreError) as gone:
        store.database.waiting(lambda: change(store, "DROP TABLE turns"))
    store.close()
    with pytest.raises(StoreError) as missing_one:
        Store(StoreConfig(config.dir, secret + "x"))
    for error in (refused, gone, missing_one):
        assert not isinstance(error.value, WaitError)
        assert "hunter2" not in str(error.value)
        assert "diagnosis" not in str(error.value)
        assert "***" in str(error.value)
    assert "does not exist" in str(missing_one.value)


def test_a_server_that_is_not_there_is_waited_for_and_a_wrong_url_is_told(tmp_path: Path) -> None:
    config = StoreConfig(str(tmp_path), "postgresql://postgres@127.0.0.1:1/x")
    with pytest.raises(WaitError, match="see that its server runs and can be reached"):
        Store(config, patience=Patience(0.0))
    with pytest.raises(StoreError, match=r"\[store\] url = .*expected postgresql://USER@HOST"):
        Store(StoreConfig(str(tmp_path), "postgresql://a/b?no_such_setting=1"))


def test_a_database_of_another_program_or_encoding_is_refused(
    server: Server, tmp_path: Path
) -> None:
    server.run("CREATE DATABASE foreign_one TEMPLATE template0")
    server.run(
        "CREATE DATABASE latin TEMPLATE template0 ENCODING LATIN1 LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    with psycopg.connect(server.url("foreign_one"), autocommit=True) as other:
        other.execute("CREATE TABLE customers (x int)")
    with pytest.raises(StoreError, match="another program, with the tables customers"):
        Store(StoreConfig(str(tmp_path), server.url("foreign_one")))
    with pytest.raises(StoreError, match="encoding LATIN1: expected version 14 or newer and UTF8"):
        Store(StoreConfig(str(tmp_path), server.url("latin")))


def test_who_waits_is_told_of_a_flip_at_once_and_goes_on_after_a_restart(
    server: Server, config: StoreConfig
) -> None:
    here, there = Store(config), Store(config)
    here.database.wait_for_change(0.0)  # it listens now

    def told_after(change: Callable[[], object]) -> float:
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(here.database.wait_for_change, 20.0)
            began = time.monotonic()
            change()
            waiting.result()
            return time.monotonic() - began

    for number in range(3):
        assert told_after(lambda: there.versions.set_serving("main", 0)) < 10.0, number
    server.kill()
    server.start()
    began = time.monotonic()
    here.database.wait_for_change(0.2)
    assert time.monotonic() - began >= 0.2  # it neither spins nor fails
    here.database.wait_for_change(0.2)
    there.database.patience = Patience(30.0)
    assert told_after(lambda: there.versions.set_serving("main", 0)) < 10.0
    here.close()
    there.close()


def told(store: Store) -> None:
    """Something of each kind, with a member of each type of column."""
    from tests.store.test_forgetting import judge as judged
    from tests.store.test_forgetting import record, said, train

    for number in range(4):
        one = said(2 * number, None)
        after = said(2 * number + 1, one)
        record(store, one, after)
        judged(store, one.id, after)
    train(store, 1, 0)
    store.reviewing.give(Feedback("turn_2", 1, "Be brief.", "It was long."), OWNER)
    store.versions.pause("main", "ana")
    store.workers.beat("w", [], {})
    add(store, turn(900, client_model="odd\0name"))


def everything(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    with store.database.read() as connection:
        return {
            table.name: [
                (*row,) for row in connection.execute(sa.select(table).order_by(*table.primary_key))
            ]
            for table in TABLES
        }


def test_a_copy_goes_on_after_a_cut_is_proven_and_comes_back_the_same(
    config: StoreConfig, server: Server, tmp_path: Path
) -> None:
    first = Store(StoreConfig(str(tmp_path / "first")))
    told(first)
    there = Store(config)

    class Cut(Exception):
        pass

    def cut(table: str, _: int) -> None:
        if table == "verdicts":
            raise Cut

    with pytest.raises(Cut):
        copy(first.database, there.database, cut)
    first.reviewing.give(Feedback("turn_2", -1), OWNER)  # what was copied may change meanwhile
    assert copy(first.database, there.database, lambda *_: None) > 0
    assert copy(first.database, there.database, lambda *_: None) == 0
    back = Store(StoreConfig(str(tmp_path / "back")))
    copy(there.database, back.database, lambda *_: None)
    assert everything(first) == everything(there) == everything(back)
    for store in (there, back):
        assert store.verifying.problems(lambda *_: None) == []
        assert store.ledger.problems(first.ledger.newest(1)[0].head) == []
        add(store, turn(901))  # after all others
        assert store.turns.ids()[-2:] == ["turn_900", "turn_901"]
        store.versions.resume("main")
    with pytest.raises(StoreError, match="has a row of turns that the store has not"):
        copy(first.database, there.database, lambda *_: None)
    assert there.turns.get("turn_901") is not None
    for store in (first, there, back):
        store.close()


def test_a_copy_may_take_longer_for_a_table_than_a_transaction_may_be_idle(
    config: StoreConfig, tmp_path: Path
) -> None:
    def slowly(table: str, _: int) -> None:
        if table == "turns":
            time.sleep(0.3)

    hasty = "?options=-c%20idle_in_transaction_session_timeout%3D100ms"
    with (
        closing(Store(StoreConfig(str(tmp_path / "first")))) as first,
        closing(Store(StoreConfig(config.dir, config.url + hasty))) as there,
        closing(Store(StoreConfig(str(tmp_path / "back")))) as back,
    ):
        add(first, turn(0), turn(1))
        assert copy(first.database, there.database, slowly) > 0
        assert copy(there.database, back.database, slowly) > 0
        assert everything(first) == everything(there) == everything(back)


def test_a_copy_to_a_server_that_goes_away_is_to_be_tried_again(
    config: StoreConfig, server: Server, tmp_path: Path
) -> None:
    with (
        closing(Store(StoreConfig(str(tmp_path / "first")))) as first,
        closing(Store(config, patience=Patience(0.1))) as there,
    ):
        add(first, turn(0), turn(1))
        try:
            with pytest.raises(WaitError):
                copy(first.database, there.database, lambda *_: server.kill())
        finally:
            server.start()
        assert copy(first.database, there.database, lambda *_: None) > 0
        assert everything(first) == everything(there)


def test_a_copied_store_takes_feedback_that_waits(config: StoreConfig, tmp_path: Path) -> None:
    with (
        closing(Store(StoreConfig(dir=str(tmp_path / "files")))) as first,
        closing(Store(config)) as there,
    ):
        add(first, *(turn(n, session=f"s{n}", client="key ann") for n in range(3)))
        for number in range(2):
            first.reviewing.give(Feedback(f"turn_{number}", -1), "key eve")
        copy(first.database, there.database, lambda *_: None)
        there.reviewing.give(Feedback("turn_2", -1), "key eve")
        assert [review.said.turn for review in there.reviewing.waiting()] == [
            f"turn_{number}" for number in range(3)
        ]


def test_an_earlier_copy_is_brought_up_to_date_after_retention(
    config: StoreConfig, tmp_path: Path
) -> None:
    with (
        closing(Store(StoreConfig(dir=str(tmp_path / "files")))) as first,
        closing(Store(config)) as there,
    ):
        add(first, *(turn(n, session=f"s{n}") for n in range(4)), next_state=None)
        copy(first.database, there.database, lambda *_: None)
        assert first.retention.step(0, time.time(), "retention").turns
        add(first, turn(4, session="s4"), next_state=None)
        copy(first.database, there.database, lambda *_: None)
        assert there.turns.ids() == first.turns.ids() == ["turn_4"]
        assert there.ledger.problems() == []
        add(there, turn(5, session="s5"))  # now it goes on by itself
        add(first, turn(6, session="s6"))  # with the same number
        with pytest.raises(StoreError, match="it is in use already"):
            copy(first.database, there.database, lambda *_: None)


def test_the_command_copies_the_configured_store(
    config: StoreConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(StoreConfig(str(tmp_path / "state")))
    add(store, turn(0), turn(1))
    store.close()
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    command = ["store", "copy", config.url, "--config", str(file)]
    assert main(command) == 0
    assert "has all 2 turns; " in capsys.readouterr().out
    assert main(command) == 0
    assert "0 rows were written" in capsys.readouterr().out
    assert main([*command[:2], f"sqlite:///{tmp_path}/state/nextstate.sqlite3", *command[3:]]) != 0
    assert "is the store itself" in capsys.readouterr().err


def test_doctor_tells_the_version_and_refuses_another_machine_without_encryption(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(config)
    assert re.fullmatch(r"PostgreSQL \d+\.\d+, this machine", store.database.about())
    monkeypatch.setattr("nextstate.store.postgresql.is_here", lambda _: False)
    with pytest.raises(StoreError, match="is not encrypted: add \\?sslmode=verify-full"):
        Store(config)  # nothing is sent there before
    with pytest.raises(StoreError, match="is not encrypted: add \\?sslmode=verify-full"):
        store.database.about()
    store.close()


def test_a_role_cannot_be_had_while_the_server_is_away(server: Server, config: StoreConfig) -> None:
    with closing(Store(config, patience=Patience(0.1, pause_s=0.02))) as store:
        server.kill()
        try:
            with pytest.raises(WaitError), store.roles.hold("learner/main", "taken", "end it"):
                pass
        finally:
            server.start()
        with store.roles.hold("learner/main", "taken", "end it"):
            assert store.database.epochs
