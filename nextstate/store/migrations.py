"""The numbered steps that bring an older database up to the tables of nextstate/store/schema.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import sqlalchemy as sa

from nextstate.errors import StoreError
from nextstate.keys import key_hash, new_key
from nextstate.store import schema as t
from nextstate.store.counts import TURNS_ADDED, count_all, count_anew, create_triggers
from nextstate.store.ledger import append_version

Step = Callable[[sa.Connection], None]


def _add_episodes(connection: sa.Connection) -> None:
    """Version 2: episodes, groups and rewards; a turn's episode and step, a sample's advantage."""
    for column in (t.turns.c.episode, t.turns.c.step, t.samples.c.advantage):
        kind = column.type.compile(connection.dialect)
        connection.exec_driver_sql(
            f"ALTER TABLE {column.table.name} ADD COLUMN {column.name} {kind}"
        )
    for table in (t.groups, t.episodes, t.rewards):
        table.create(connection)
    for index in t.turns.indexes:
        index.create(connection, checkfirst=True)
    create_triggers(connection, ("episodes", "groups", "rewards"))


def _add_pauses(connection: sa.Connection) -> None:
    """Version 3: who pauses a lineage; new turns are counted without a trigger."""
    column = t.decisions.c.paused_by
    kind = column.type.compile(connection.dialect)
    connection.exec_driver_sql(f"ALTER TABLE decisions ADD COLUMN {column.name} {kind}")
    connection.exec_driver_sql(f"DROP TRIGGER {TURNS_ADDED}")


def _add_ledger(connection: sa.Connection) -> None:
    """Version 4: keys; the ledger, which begins with the versions that there are."""
    t.keys.create(connection)
    t.ledger.create(connection)
    c = t.versions.c
    made = sa.select(c.lineage, c.number, c.created_at).order_by(c.created_at)
    for row in connection.execute(made).all():
        append_version(connection, row.created_at, row.lineage, row.number)


def _add_clients(connection: sa.Connection) -> None:
    """Whose each turn, feedback and sample is, and which engine answered; feedback that waits."""
    columns = (
        t.turns.c.client,
        t.feedback.c.client,
        t.samples.c.client,
        t.samples.c.source,
        t.turns.c.engine,
    )
    for column in columns:
        made = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
        connection.exec_driver_sql(f"ALTER TABLE {column.table.name} ADD COLUMN {made}")
    t.reviews.create(connection)
    connection.exec_driver_sql("DROP INDEX samples_by_kind")
    for index in (*t.samples.indexes, *t.feedback.indexes, *t.texts.indexes):
        index.create(connection, checkfirst=True)
    count_anew(connection, "samples", "ready")


def _hash_episode_keys(connection: sa.Connection) -> None:
    """Of an episode's key only the hash is kept, and which key opened it.

    The keys of before end, because they may still lie in free pages of the file.
    """
    e = t.episodes.c
    if not any(c["name"] == "api_key" for c in sa.inspect(connection).get_columns("episodes")):
        return  # version 2 has just made the table
    connection.exec_driver_sql("ALTER TABLE episodes RENAME COLUMN api_key TO key_hash")
    kind = e.opener.type.compile(connection.dialect)
    connection.exec_driver_sql(f"ALTER TABLE episodes ADD COLUMN {e.opener.name} {kind}")
    for name in connection.execute(sa.select(e.id)).scalars().all():
        nobodys = sa.update(t.episodes).values(key_hash=key_hash(new_key()))
        connection.execute(nobodys.where(e.id == name))


def _protect(connection: sa.Connection) -> None:
    """Version 5: whose each turn is and which engine answered, hashed keys of episodes, encryption,
    roles.
    """
    _add_clients(connection)
    _hash_episode_keys(connection)
    t.encryption.create(connection)
    t.roles.create(connection)


def _add_families(connection: sa.Connection) -> None:
    """Version 6: the family of an episode's task, which of those of before nobody knows; what calls
    hold of an episode's tokens.
    """
    t.holds.create(connection)
    column = t.episodes.c.family
    if any(c["name"] == column.name for c in sa.inspect(connection).get_columns("episodes")):
        return  # version 2 has just made the table
    kind = column.type.compile(connection.dialect)
    connection.exec_driver_sql(f"ALTER TABLE episodes ADD COLUMN {column.name} {kind}")


MIGRATIONS: Mapping[int, Step] = {
    2: _add_episodes,
    3: _add_pauses,
    4: _add_ledger,
    5: _protect,
    6: _add_families,
}
"""Step n brings a database of version n - 1 to version n.

A new database is made at VERSION at once, so a step must leave an old one with the same tables."""


_OURS = 3
"""A database with so many tables of our names is ours, also if others of them are gone."""


class NotWholeError(StoreError):
    """A table is gone, as in a database that a dump was read into only in part."""


def is_current(connection: sa.Connection) -> bool:
    """True if there is nothing to migrate: to see that needs no lock. Raises NotWholeError."""
    tables = sa.inspect(connection).get_table_names()
    if "schema_version" not in tables:
        return False
    if connection.execute(sa.select(t.schema_version.c.version)).all() != [(t.VERSION,)]:
        return False
    _require_all(tables)
    return True


def _require_all(tables: Iterable[str]) -> None:
    gone = sorted(t.metadata.tables.keys() - set(tables))
    if gone:
        raise NotWholeError(f"it has no table {', '.join(gone)}")


def migrate(
    connection: sa.Connection,
    target: int = t.VERSION,
    steps: Mapping[int, Step] = MIGRATIONS,
) -> None:
    """Brings the database to `target` inside the caller's transaction. Raises StoreError.

    If a table is gone, that is a NotWholeError.
    """
    tables = sa.inspect(connection).get_table_names()
    if not tables:
        t.metadata.create_all(connection, checkfirst=False)
        count_all(connection)
        connection.execute(sa.insert(t.schema_version).values(version=target))
        return
    if not {"schema_version", "turns"}.issubset(tables):
        if len(t.metadata.tables.keys() & set(tables)) >= _OURS:
            _require_all(tables)
        raise StoreError(
            f"it is a database of another program, with the tables {', '.join(tables)[:200]}: "
            "name another file or folder in [store]"
        )
    rows = connection.execute(sa.select(t.schema_version.c.version)).scalars().all()
    if len(rows) != 1 or not isinstance(rows[0], int) or rows[0] < 1:
        raise StoreError(
            f"its schema version is {rows!r:.80}, expected one number: put a whole copy of the "
            "store in its place, or name another folder as [store] dir"
        )
    found = rows[0]
    if found > target:
        raise StoreError(
            f"the store has schema version {found}, this program knows up to {target}: "
            "install the newer nextstate, or name another folder as [store] dir"
        )
    for number in range(found + 1, target + 1):
        steps[number](connection)
        connection.execute(sa.update(t.schema_version).values(version=number))
    _require_all(sa.inspect(connection).get_table_names())
