"""An older database is brought up to the tables of now, a newer one is refused."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from nextstate.config import StoreConfig
from nextstate.episodes import Episode
from nextstate.errors import StoreError
from nextstate.keys import key_hash
from nextstate.records import Feedback, SampleState, Source, Verdict
from nextstate.store import Store, schema
from nextstate.store.migrations import migrate
from tests.store.test_texts import check

pytestmark = pytest.mark.sqlite

OF_VERSION_1 = Path(__file__).parent / "data" / "schema_1.sql"
"""A dump of a database that the program wrote before there were episodes."""


OF_VERSION_2 = OF_VERSION_1.with_name("schema_2.sql")
"""The same database as version 2 left it, before people could pause a lineage."""

OF_VERSION_3 = OF_VERSION_1.with_name("schema_3.sql")
"""The same as version 3 left it, before there were keys and a ledger."""

OF_VERSION_4 = OF_VERSION_1.with_name("schema_4.sql")
"""The same as version 4 left it, before turns told their engine and whose they are, and before a
store could be encrypted, with an episode, whose key it held in clear."""

OF_VERSION_5 = OF_VERSION_1.with_name("schema_5.sql")
"""The same as version 5 left it, before an episode told the family of its task."""


def old_database(folder: Path, dump: Path = OF_VERSION_1) -> Path:
    file = folder / "nextstate.sqlite3"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(dump.read_text())
    return file


Rows = dict[str, list[tuple[object, ...]]]


def rows(file: Path, like: Rows | None = None) -> Rows:
    """All rows of the tables, or of those in `like`, and in as many columns as there."""
    with closing(sqlite3.connect(file)) as connection:
        names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        tables = [name for (name,) in connection.execute(names)]
        found = {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in tables}
    # Version 5 counts these under other keys.
    found["counts"] = [row for row in found["counts"] if row[0] != "ready"]
    if like is None:
        return found
    return {
        name: [row[: len(old[0])] for row in found[name]] if old else found[name]
        for name, old in like.items()
    }


def shape(file: Path) -> tuple[dict[str, list[tuple[object, ...]]], dict[str, str]]:
    """The columns of each table, and the SQL of each index and trigger."""
    with closing(sqlite3.connect(file)) as connection:
        made = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        columns = {
            name: connection.execute(f"PRAGMA table_info({name})").fetchall()
            for kind, name, _ in made
            if kind == "table"
        }
    return columns, {name: sql for kind, name, sql in made if kind in ("index", "trigger")}


@pytest.mark.parametrize(
    "dump", [OF_VERSION_1, OF_VERSION_2, OF_VERSION_3, OF_VERSION_4, OF_VERSION_5]
)
def test_an_older_database_gets_the_tables_of_a_new_one(tmp_path: Path, dump: Path) -> None:
    (tmp_path / "new").mkdir()
    Store(StoreConfig(dir=str(tmp_path / "new"))).close()
    file = old_database(tmp_path, dump)
    assert shape(file) != shape(tmp_path / "new" / "nextstate.sqlite3")
    Store(StoreConfig(dir=str(tmp_path))).close()
    assert shape(file) == shape(tmp_path / "new" / "nextstate.sqlite3")


def test_nothing_that_was_recorded_before_episodes_is_lost(tmp_path: Path) -> None:
    file = old_database(tmp_path)
    before = rows(file)
    assert before.pop("schema_version") == [(1,)]
    with closing(Store(StoreConfig(dir=str(tmp_path)))) as store:
        assert rows(file, like=before) == before
        check(store)
        turn = store.turns.get("turn_1")
        assert turn is not None
        assert (turn.episode, turn.step, turn.completion_ids) == (None, None, (4, 6))
        assert turn.request["messages"] == [{"role": "user", "content": "question 1"}]
        assert [(s.source, s.text) for s in store.turns.next_states("turn_3")] == [
            (Source.USER, "thanks 3")
        ]
        hint = "Answer in one sentence."
        assert store.judging.verdict("turn_1") == Verdict(
            "turn_1", (-1,), -1, "rules", hint, (1, 2, 9)
        )
        assert store.judging.feedback("turn_2") == Feedback("turn_2", 1, None, "nice")
        assert store.judging.lease(9, 60) == ["turn_3"]
        assert [turn for turn, _ in store.versions.used_turns("main", 1)] == ["turn_0"]
        leased = store.training.lease_samples("main", 9, "b2", scored=True, hinted=True)
        assert [(s.turn, s.score, s.advantage) for s in leased] == [
            ("turn_1", -1, None),
            ("turn_2", 1, None),
        ]


def test_decisions_from_before_there_were_pauses_pause_nothing(tmp_path: Path) -> None:
    file = old_database(tmp_path, OF_VERSION_2)
    before = rows(file)
    assert before.pop("schema_version") == [(2,)]
    with closing(Store(StoreConfig(dir=str(tmp_path)))) as store:
        assert rows(file, like=before) == before
        found = store.versions.decisions("main")
        assert (found.after, found.pause) == (1, None)
        store.versions.pause("main", "ada")
        assert store.versions.decisions("main").pause is not None


def test_an_older_database_keeps_its_episodes_and_ends_their_keys(tmp_path: Path) -> None:
    key = "ep-9292487f35524a5b8c7741fd5d4f318a"
    assert key in OF_VERSION_4.read_text()
    old_database(tmp_path, OF_VERSION_4)
    with closing(Store(StoreConfig(dir=str(tmp_path)))) as store:
        assert store.episodes.of_key(key) is None
        assert store.episodes.of_key(key_hash(key)) is None
        episode = Episode("e-old", "main", "shell", "find the file")
        (again,) = store.episodes.open([episode], None, {"e-old": key}, "key ann:00")
        found = store.episodes.of_key(key)
        assert found is not None
        assert (found.id, found.opener, again.task) == ("e-old", "key ann:00", "find the file")


def test_an_older_database_goes_on_with_episodes_and_their_counts(tmp_path: Path) -> None:
    old_database(tmp_path)
    for _ in range(2):  # it is brought up once
        with closing(Store(StoreConfig(dir=str(tmp_path)))) as store:
            store.episodes.open([Episode("e-1", "main", "shell", "find the file")], None)
            counts = store.counts()
            assert counts["episodes/open"] == 1
            assert counts[f"samples/{SampleState.READY}"] == 2


def test_a_newer_store_is_refused_and_an_older_one_is_brought_up(tmp_path: Path) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    store.close()
    engine = sa.create_engine(f"sqlite:///{tmp_path}/nextstate.sqlite3")
    with engine.begin() as connection:
        migrate(
            connection,
            target=schema.VERSION + 1,
            steps={
                schema.VERSION + 1: lambda c: (
                    c.exec_driver_sql("CREATE TABLE newer (x INTEGER)") and None
                )
            },
        )
        assert sa.inspect(connection).has_table("newer")
    engine.dispose()
    with pytest.raises(StoreError, match="schema version"):
        Store(StoreConfig(dir=str(tmp_path)))
