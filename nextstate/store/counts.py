"""Counts of the store's records, which triggers keep: reading them costs the same at any size.

A trigger changes a row of `counts` in the transaction that changes what is counted. Only new turns
are counted without one (`nextstate/store/recording.py`): for a statement with a trigger SQLite
first copies every page that it changes, which costs as much as the statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa

from nextstate.records import Turn
from nextstate.store.schema import counts

SHOWN = ("turns", "judgements", "verdicts", "samples", "versions", "episodes", "groups", "rewards")
"""The areas that people see; stages look up the others."""

TURNS_ADDED = "turns_added"
"""The trigger that does not exist: `Recording` counts new turns, a transaction at a time."""
ADD = sa.text(
    "INSERT INTO counts (area, key, count) VALUES (:area, :key, :more) "
    "ON CONFLICT (area, key) DO UPDATE SET count = counts.count + :more"
)


def keys_of_new(turn: Turn) -> list[str]:
    """The keys of the area `turns` under which a turn that is added counts."""
    return [turn.kind.value, *(["trainable"] if turn.trainable else [])]


@dataclass(frozen=True, slots=True)
class _Counted:
    """Rows of a table, counted under `area` by a key that is made of their columns."""

    table: str
    area: str
    key: str
    """SQL of the key, with `{r}` before each column."""
    where: str = "1"
    """SQL of the condition under which a row counts, with `{r}` as above."""


_COUNTED = (
    _Counted("turns", "turns", "{r}kind", "{r}replaced_by IS NULL"),
    _Counted("turns", "turns", "'trainable'", "{r}untrainable IS NULL"),
    _Counted("judgements", "judgements", "{r}state"),
    _Counted("verdicts", "verdicts", "{r}score"),
    _Counted("samples", "samples", "{r}state"),
    _Counted(
        "samples",
        "ready",
        "{r}lineage || '/' || {r}client || '/' || {r}policy_version || '/' || {r}score || '/' || "
        "{r}hinted",
        "{r}state = 'ready' AND {r}policy_version IS NOT NULL",
    ),
    _Counted("versions", "versions", "{r}state"),
    _Counted("episodes", "episodes", "{r}state"),
    _Counted("groups", "groups", "{r}state"),
    _Counted("rewards", "rewards", "{r}kind"),
    _Counted(
        "feedback",
        "labels",
        "{r}voted_judge || '/' || {r}score || '/' || {r}voted_score",
        "{r}voted_judge IS NOT NULL",
    ),
)
_CHANGING = {
    "turns": ("kind", "replaced_by", "untrainable"),
    "judgements": ("state",),
    "verdicts": ("score",),
    "samples": ("state", "lineage", "client", "policy_version", "score", "hinted"),
    "versions": ("state",),
    "episodes": ("state",),
    "groups": ("state",),
    "rewards": ("kind",),
    "feedback": ("score", "voted_judge", "voted_score"),
}
"""The columns that the keys and conditions above are made of."""


def count_all(connection: sa.Connection) -> None:
    """Counts what is stored and creates the triggers that keep the counts."""
    for counted in _counted(connection):
        query = _counting(counted)
        connection.exec_driver_sql(f"INSERT INTO counts (area, key, count) {query}")
    create_triggers(connection, _CHANGING)


def count_anew(connection: sa.Connection, table: str, area: str) -> None:
    """Counts an area of a table anew, under keys that an older program made otherwise."""
    for event in ("added", "changed", "removed"):
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {table}_{event}")
    connection.execute(sa.delete(counts).where(counts.c.area == area))
    for counted in _COUNTED:
        if (counted.table, counted.area) == (table, area):
            query = _counting(counted)
            connection.exec_driver_sql(f"INSERT INTO counts (area, key, count) {query}")
    create_triggers(connection, (table,))


def recount(connection: sa.Connection) -> dict[tuple[str, str], int]:
    """What the counts should be, by (area, key): every record is read."""
    return {
        (area, str(key)): count
        for counted in _counted(connection)
        for area, key, count in connection.exec_driver_sql(_counting(counted))
    }


def _counting(counted: _Counted) -> str:
    """SQL that counts rows: (area, key, count)."""
    key, where = counted.key.format(r=""), counted.where.format(r="")
    return f"SELECT '{counted.area}', {key}, count(*) FROM {counted.table} WHERE {where} GROUP BY 2"


def create_triggers(connection: sa.Connection, tables: Iterable[str]) -> None:
    """Creates the triggers of some tables: of new ones, which have nothing to count yet."""
    make = _procedures if _is_postgresql(connection) else _trigger
    for trigger in _triggers(_counted(connection), tables):
        for statement in make(*trigger):
            connection.exec_driver_sql(statement)


def _triggers(
    counted: Sequence[_Counted], tables: Iterable[str]
) -> Iterator[tuple[str, str, str, str]]:
    """(name, event, table, body) of each trigger."""
    for table in tables:
        columns = _CHANGING[table]
        kinds = [one for one in counted if one.table == table]
        gone, come = "".join(map(_less, kinds)), "".join(map(_more, kinds))
        for name, event, body in (
            ("added", "INSERT", come),
            ("changed", f"UPDATE OF {', '.join(columns)}", gone + come),
            ("removed", "DELETE", gone),
        ):
            if f"{table}_{name}" != TURNS_ADDED:
                yield f"{table}_{name}", event, table, body


def _trigger(name: str, event: str, table: str, body: str) -> Iterator[str]:
    """A trigger of SQLite."""
    yield f"CREATE TRIGGER {name} AFTER {event} ON {table} BEGIN {body}END"


def _procedures(name: str, event: str, table: str, body: str) -> Iterator[str]:
    """A trigger of PostgreSQL, and the function that it calls."""
    body = body.replace("SET count = count + 1", "SET count = counts.count + 1")
    yield (
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {body}RETURN NULL; END $$"
    )
    yield f"CREATE TRIGGER {name} AFTER {event} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()"


def _is_postgresql(connection: sa.Connection) -> bool:
    return connection.dialect.name == "postgresql"


def _counted(connection: sa.Connection) -> Sequence[_Counted]:
    """What is counted, in the words of the database: SQLite has no types for keys and truth."""
    if not _is_postgresql(connection):
        return _COUNTED
    return [
        replace(
            one,
            key=f"({one.key.replace('{r}hinted', 'CAST({r}hinted AS INTEGER)')})::text",
            where="true" if one.where == "1" else one.where,
        )
        for one in _COUNTED
    ]


def _more(counted: _Counted) -> str:
    key, where = counted.key.format(r="NEW."), counted.where.format(r="NEW.")
    return (
        f"INSERT INTO counts (area, key, count) SELECT '{counted.area}', {key}, 1 WHERE {where} "
        "ON CONFLICT (area, key) DO UPDATE SET count = count + 1; "
    )


def _less(counted: _Counted) -> str:
    key, where = counted.key.format(r="OLD."), counted.where.format(r="OLD.")
    row = f"area = '{counted.area}' AND key = {key}"
    return (
        f"UPDATE counts SET count = count - 1 WHERE {row} AND {where}; "
        f"DELETE FROM counts WHERE {row} AND count = 0; "
    )


def read_counts(
    connection: sa.Connection, area: str, prefix: str = ""
) -> Iterator[tuple[str, int]]:
    """The counts of an area: of all keys, or of those under `prefix`, which ends with a slash."""
    c = counts.c
    query = sa.select(c.key, c.count.label("count_")).where(c.area == area)
    if prefix:
        query = query.where(c.key > prefix, c.key < prefix[:-1] + "0")  # what follows the slash
    for row in connection.execute(query):
        yield row.key, row.count_
