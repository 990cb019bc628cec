"""Copying one store's records into another database, of another kind or not.

Both are read in the order of their keys, row beside row, and only what differs is written. So a
copy that was cut short goes on where it was when it is begun again, and the last pass, which finds
nothing that differs, is the proof. Adapters and logs are files: they are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson
import sqlalchemy as sa

from nextstate.errors import StoreError
from nextstate.store import schema as t
from nextstate.store.database import Database
from nextstate.store.ledger import Kind
from nextstate.store.vault import vault_of

_AT_ONCE = 500
_MOST_PASSES = 5
_NOT_COPIED = frozenset((t.schema_version, t.workers, t.holds, t.roles, t.spending, t.encryption))
"""What a running process makes anew."""
_ONLY_GROWS = (t.versions, t.ledger)
"""What the copy has of these, and the source has not, was made there."""
TABLES = [
    *(table for table in t.metadata.sorted_tables if table not in (*_NOT_COPIED, t.counts)),
    t.counts,  # the last: until then triggers count in the copy
]
Progress = Callable[[str, int], object]
"""Gets a table's name and how many of its rows were written more."""


def copy(source: Database, target: Database, progress: Progress) -> int:
    """Makes the records of `target` those of `source`; returns how many rows it wrote.

    Raises StoreError if `target` has turns of its own, if one of them is encrypted, or if `source`
    changes faster than it is read; WaitError if one of them cannot be used for now.
    """
    with source.errors(), target.errors():
        return _copy(source, target, progress)


def _copy(source: Database, target: Database, progress: Progress) -> int:
    for database in (source, target):
        if vault_of(database.engine.dialect) is not None:
            raise StoreError(
                f"{database.name} is encrypted: take that away first by `nextstate encrypt --off`"
            )
    with source.read(unhurried=True) as theirs, target.read(unhurried=True) as ours:
        for table, key in _made_there(theirs, ours):
            raise StoreError(
                f"{target.name} has a row of {table.name} that the store has not, "
                f"{key!r:.80}: it is in use already; name an empty database"
            )
    written = 0
    for _ in range(_MOST_PASSES):
        more = _pass(source, target, progress)
        if not more:
            return written
        written += more
    raise StoreError(
        f"after {_MOST_PASSES} passes the copy still differs: stop what writes to the store, and "
        "begin again, which goes on from here"
    )


def _made_there(theirs: sa.Connection, ours: sa.Connection) -> Iterator[tuple[sa.Table, object]]:
    """What a copy has that was never the source's."""
    # A number is used again once its turn is gone, so the id counts.
    turns = _differences(t.turns, theirs, ours)
    made = {other.id for _, row, other in turns if other and (not row or row["id"] != other.id)}
    if made:  # or it was forgotten since, or went by its age: the ledger tells
        content = sa.select(t.ledger.c.content).where(t.ledger.c.kind == Kind.FORGOTTEN)
        for text in theirs.execute(content.execution_options(yield_per=_AT_ONCE)).scalars():
            made.difference_update(orjson.loads(text)["turns"])
    yield from ((t.turns, turn) for turn in made)
    for table in _ONLY_GROWS:
        yield from ((table, key) for key, row, _ in _differences(table, theirs, ours) if not row)


def _pass(source: Database, target: Database, progress: Progress) -> int:
    """Writes what differs; returns how many rows that were."""
    written = 0
    with source.read(unhurried=True) as theirs:  # one state of the source, however long it takes
        for table in reversed(TABLES):
            gone = [key for key, row, _ in _found(table, theirs, target) if row is None]
            for some in _parts(gone):
                with target.write() as connection:
                    key = sa.tuple_(*table.primary_key)
                    connection.execute(sa.delete(table).where(key.in_(some)))
            written += len(gone)
        for table in TABLES:
            insert: Any = target.insert(table)
            given = {c.name: insert.excluded[c.name] for c in table.c if not c.primary_key}
            keys = [c.name for c in table.primary_key]
            statement = insert.on_conflict_do_update(index_elements=keys, set_=given)
            rows = (row for _, row, _ in _found(table, theirs, target) if row is not None)
            for some in _parts(rows):
                with target.write() as connection:
                    connection.execute(statement, some)
                written += len(some)
                progress(table.name, len(some))
    with target.write() as connection:
        target.numbered(connection)
    return written


_Difference = tuple[tuple[Any, ...], dict[str, Any] | None, sa.Row[Any] | None]
"""A key, and the rows of the source and the copy; None: it has none."""


def _found(table: sa.Table, theirs: sa.Connection, target: Database) -> Iterator[_Difference]:
    with target.read(unhurried=True) as ours:
        yield from _differences(table, theirs, ours)


def _differences(
    table: sa.Table, theirs: sa.Connection, ours: sa.Connection
) -> Iterator[_Difference]:
    """Where two databases differ, in the order of keys."""
    names = [c.name for c in table.c]
    places = [names.index(c.name) for c in table.primary_key]
    query = sa.select(table).order_by(*table.primary_key).execution_options(yield_per=_AT_ONCE)
    left, right = (iter(connection.execute(query)) for connection in (theirs, ours))
    one, other = next(left, None), next(right, None)

    def key_of(row: Any) -> tuple[Any, ...]:
        return tuple(row[place] for place in places)

    def order(row: Any) -> list[bytes | int]:
        return [x.encode() if isinstance(x, str) else x for x in key_of(row)]

    while one is not None or other is not None:
        if one is not None and (other is None or order(one) < order(other)):
            yield key_of(one), dict(zip(names, one, strict=True)), None
            one = next(left, None)
        elif other is not None and (one is None or order(other) < order(one)):
            yield key_of(other), None, other
            other = next(right, None)
        else:
            assert one is not None
            if tuple(one) != tuple(other or ()):
                yield key_of(one), dict(zip(names, one, strict=True)), other
            one, other = next(left, None), next(right, None)


def _parts(rows: Any) -> Iterator[list[Any]]:
    part: list[Any] = []
    for row in rows:
        part.append(row)
        if len(part) == _AT_ONCE:
            yield part
            part = []
    if part:
        yield part
