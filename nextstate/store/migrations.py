"""The numbered steps that bring an older database up to the tables of nextstate/store/schema.py."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.schema import CreateColumn

from nextstate.errors import StoreError
from nextstate.store import schema as t
from nextstate.store.counts import count_all
from nextstate.store.rows import decompress, keep_body, keep_ids, pack_floats, pack_ids

Step = Callable[[sa.Connection], None]


def _name_clients_sessions(connection: sa.Connection) -> None:
    """Version 2: one client's name for a session may stand for several conversations."""
    for column in (t.turns.c.client_session, t.turns.c.place, t.turns.c.replaced_by):
        _add_column(connection, column)
    connection.execute(sa.text("UPDATE turns SET client_session = session"))
    _create_indexes(connection)


def _store_by_content(connection: sa.Connection) -> None:
    """Version 3: prompts in runs that are stored once, and link keys within their session.

    Only a turn whose reply was cut keeps its place: only that one can be tried again.
    """
    for name in ("turns_by_client_session", "turns_by_place"):
        connection.execute(sa.text(f"DROP INDEX {name}"))
    _create_indexes(connection)
    t.workers.create(connection, checkfirst=True)
    _add_column(connection, t.messages.c.base)
    c = t.turns.c
    read = [column for column in c if column.name != "said_key"]  # which comes with version 5
    for seq in connection.execute(sa.select(c.seq)).scalars().all():
        row = connection.execute(sa.select(*read).where(c.seq == seq)).one()
        logprobs = row.behaviour_logprobs
        values = {
            "rest": keep_body(connection, decompress(row.rest)),
            "prompt_ids": _in_runs(connection, row.prompt_ids),
            "completion_ids": _in_planes(row.completion_ids),
            "behaviour_logprobs": logprobs and pack_floats(array("d", decompress(logprobs))),
            "chain_key": scoped(row.chain_key, row.lineage, row.client_session),
            "reply_key": scoped(row.reply_key, row.lineage, row.client_session),
            "place": row.place if row.finish_reason is None else None,
        }
        connection.execute(sa.update(t.turns).where(c.seq == seq).values(values))
    v = t.verdicts.c
    hinted = sa.select(v.turn, v.hinted_prompt_ids).where(v.hinted_prompt_ids.is_not(None))
    for row in connection.execute(hinted).all():
        runs = {"hinted_prompt_ids": _in_runs(connection, row.hinted_prompt_ids)}
        connection.execute(sa.update(t.verdicts).where(v.turn == row.turn).values(runs))


def _in_planes(packed: bytes | None) -> bytes | None:
    return None if packed is None else pack_ids(array("I", decompress(packed)))


def _in_runs(connection: sa.Connection, packed: bytes | None) -> bytes | None:
    ids = None if packed is None else array("I", decompress(packed))
    return None if ids is None else keep_ids(connection, ids)


def _keep_feedback(connection: sa.Connection) -> None:
    """Version 4: feedback of its own, what judging costs, how sure a verdict is."""
    _add_column(connection, t.verdicts.c.confidence)
    _add_column(connection, t.versions.c.reason)
    _add_column(connection, t.judgements.c.task_end)
    t.feedback.create(connection, checkfirst=True)
    t.spending.create(connection, checkfirst=True)
    t.other_hints.create(connection, checkfirst=True)


def _keep_what_was_said(connection: sa.Connection) -> None:
    """Version 5: a key that tells turns with the same replies apart; earlier turns have none."""
    _add_column(connection, t.turns.c.said_key)
    _create_indexes(connection)


def _keep_counts(connection: sa.Connection) -> None:
    """Version 6: counts, and indexes that give out work in its order."""
    for table in (t.judgements, t.samples):
        _add_column(connection, table.c.seq)
        seq = sa.select(t.turns.c.seq).where(t.turns.c.id == table.c.turn).scalar_subquery()
        connection.execute(sa.update(table).values(seq=seq))
    for name in ("judgements_by_state", "samples_by_state"):
        connection.execute(sa.text(f"DROP INDEX IF EXISTS {name}"))
    for table in (t.judgements, t.samples, t.versions):
        for index in table.indexes:
            index.create(connection, checkfirst=True)
    t.counts.create(connection, checkfirst=True)
    count_all(connection)


def _create_indexes(connection: sa.Connection) -> None:
    """Those of the turns that are not there yet, as far as their columns are."""
    there = {column["name"] for column in sa.inspect(connection).get_columns("turns")}
    for index in t.turns.indexes:
        if there.issuperset(column.name for column in index.columns):
            index.create(connection, checkfirst=True)


def _add_column(connection: sa.Connection, column: sa.Column[Any]) -> None:
    definition = CreateColumn(column).compile(dialect=connection.dialect)
    connection.execute(sa.text(f"ALTER TABLE {column.table.name} ADD COLUMN {definition}"))


MIGRATIONS: Mapping[int, Step] = {
    2: _name_clients_sessions,
    3: _store_by_content,
    4: _keep_feedback,
    5: _keep_what_was_said,
    6: _keep_counts,
}
"""Step n brings a database of version n - 1 to version n. A new database is made whole at VERSION,
so each later step must leave an old database with the tables as they are; a test compares the two.
"""


def is_current(connection: sa.Connection) -> bool:
    """Whether there is nothing to migrate: to see that needs no lock."""
    known = sa.inspect(connection).has_table("schema_version")
    return known and connection.execute(sa.select(t.schema_version.c.version)).all() == [
        (t.VERSION,)
    ]


def migrate(
    connection: sa.Connection,
    target: int = t.VERSION,
    steps: Mapping[int, Step] = MIGRATIONS,
) -> None:
    """Brings the database to `target` inside the caller's transaction. Raises StoreError."""
    tables = sa.inspect(connection).get_table_names()
    if not tables:
        t.metadata.create_all(connection)
        count_all(connection)
        connection.execute(sa.insert(t.schema_version).values(version=target))
        return
    if not {"schema_version", "turns"}.issubset(tables):
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


def scoped(key: bytes, lineage: str, client_session: str | None) -> bytes:
    """A key within one lineage and one name."""
    return hashlib.blake2b(orjson.dumps([lineage, client_session]) + key, digest_size=16).digest()
