"""Whether a store is encrypted, the key to it, and changing that: on, off, or to another key.

The data key is in the database, wrapped by a person's key (nextstate/store_key.py). So another
key of the person is a matter of one row. Another data key, and turning encryption on or off, change
every row, a page in a transaction: after a kill the same command goes on. Nobody else can open the
store meanwhile.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import sqlalchemy as sa

from nextstate import sealed_files
from nextstate.errors import SealError, StartError
from nextstate.store import schema as t
from nextstate.store.database import APPENDED, Database
from nextstate.store.ledger import Head, Kind, append
from nextstate.store.migrations import NotWholeError, is_current, migrate
from nextstate.store.texts import packed_place
from nextstate.store.vault import (
    KEY_BYTES,
    NoKey,
    SealedType,
    Vault,
    open_column,
    seal,
    seal_column,
    unseal,
    unwrap,
    wrap,
)
from nextstate.store_key import HOW, StoreKey, find_store_key

Progress = Callable[[int, int], object]
Files = Callable[[Vault | None, Vault | None], object]
"""Changes the files of a store from one vault to the other; it may have begun before."""
ON, OFF, KEY, DATA_KEY = "on", "off", "key", "data key"
"""Changes, as the ledger tells them."""
_Statement: TypeAlias = sa.Insert | sa.Update | sa.Delete
_E = t.encryption.c
_AT_ONCE = 500
_CHANGED = t.texts.to_metadata(sa.MetaData(), name="texts_changed")
_CHANGED.indexes.clear()  # they are made once it has the other one's place, and their names
_TEXTS, _FILES, _COMPACTING = "texts", "files", "compacting"


def _sealed_columns(table: sa.Table) -> dict[str, SealedType]:
    return {c.name: c.type for c in table.columns if isinstance(c.type, SealedType)}


_TABLES = {
    table.name: table
    for table in t.metadata.sorted_tables
    if table is not t.texts and (_sealed_columns(table) or table.name in t.VALUES)
}
_PHASES = (*_TABLES, _TEXTS, _FILES, _COMPACTING)


def unlock(connection: sa.Connection, folder: Path, with_key: bool = True) -> Vault | None:
    """What opens the store; None if it is not encrypted. Raises SealError and ConfigError."""
    row = connection.execute(sa.select(t.encryption)).first()
    if row is None:
        return None
    if row.phase is not None:
        raise SealError(
            f"the store in {folder} is half changed, because `nextstate encrypt` was interrupted: "
            "run it again, it goes on where it was"
        )
    return Vault(_data_key(row.wrapped, folder, _required(folder))) if with_key else NoKey()


def _required(folder: Path) -> StoreKey:
    key = find_store_key(folder)
    if key is None:
        raise SealError(f"the store in {folder} is encrypted, and no key is given: {HOW}")
    return key


def _data_key(wrapped: bytes, folder: Path, key: StoreKey) -> bytes:
    found = unwrap(wrapped, key.key)
    if found is None:
        raise SealError(
            f"the key in {key.where} is not the one of the store in {folder}: {HOW}. Without the "
            "right one nothing of it can be read"
        )
    return found


class Encryption:
    """Changes how a store is encrypted. Open it with `exclusive_encryption`."""

    def __init__(self, database: Database, connection: sa.Connection, folder: Path) -> None:
        self._database = database
        self._connection = connection
        self._folder = folder

    @property
    def is_on(self) -> bool:
        """Whether the store is encrypted, or about to be."""
        row = self._row()
        return row is not None and (row.phase is None or row.next_wrapped is not None)

    @property
    def is_interrupted(self) -> bool:
        """Whether a change was begun and not ended."""
        row = self._row()
        return row is not None and row.phase is not None

    def turn_on(self, key: StoreKey) -> None:
        """Begins to encrypt a store that is not."""
        values = {"id": 1, "next_wrapped": wrap(os.urandom(KEY_BYTES), key.key)}
        values |= {"phase": _PHASES[0], "created_at": self._database.now()}
        self._run(sa.insert(t.encryption).values(values))

    def turn_off(self) -> None:
        """Begins to take the encryption away."""
        self._unwrapped()
        self._run(sa.update(t.encryption).values(phase=_PHASES[0], next_wrapped=None))

    def change_data_key(self) -> None:
        """Begins to encrypt everything with a new data key."""
        self._unwrapped()
        new = wrap(os.urandom(KEY_BYTES), _required(self._folder).key)
        self._run(sa.update(t.encryption).values(phase=_PHASES[0], next_wrapped=new))

    def change_key(self, new: StoreKey) -> None:
        """Wraps the data key with another key of a person: from now on only that one opens it."""
        data_key = self._unwrapped()
        sealed_files.use(self._folder, Vault(data_key))
        wrapped, now = wrap(data_key, new.key), self._database.now()
        self._end(sa.update(t.encryption).values(wrapped=wrapped, created_at=now), KEY)

    def go_on(self, key: StoreKey | None, progress: Progress, files: Files) -> None:
        """Does what was begun, to its end; `key` is the person's, else it is looked for."""
        row = self._row()
        assert row is not None
        key = key or _required(self._folder)
        source, target = (
            None if wrapped is None else Vault(_data_key(wrapped, self._folder, key))
            for wrapped in (row.wrapped, row.next_wrapped)
        )
        counted = (*_TABLES.values(), t.texts)
        count = [sa.select(sa.func.count()).select_from(table) for table in counted]
        total = sum(self._connection.execute(query).scalar_one() for query in count)
        self._connection.commit()
        done = 0

        def step(rows: int) -> None:
            nonlocal done
            done += rows
            progress(done, max(total, done))

        for phase in _PHASES[_PHASES.index(row.phase) :]:
            if phase == _FILES:
                files(source, target)
            elif phase == _COMPACTING:
                self._database.compact_on(self._connection)
            elif phase == _TEXTS:
                self._change_texts(source, target, step)
            else:
                self._change(_TABLES[phase], source, target, step)
            later = _PHASES[_PHASES.index(phase) + 1 :]
            if later:
                self._run(sa.update(t.encryption).values(phase=later[0], position=None))
        sealed_files.use(self._folder, target)
        if target is None:
            self._end(sa.delete(t.encryption), OFF)
        else:
            values: dict[str, Any] = {"phase": None, "position": None, "next_wrapped": None}
            change = sa.update(t.encryption).values(**values, wrapped=row.next_wrapped)
            self._end(change, ON if source is None else DATA_KEY)

    def _change(
        self,
        table: sa.Table,
        source: Vault | None,
        target: Vault | None,
        step: Callable[[int], None],
    ) -> None:
        """Changes the rows of a table whose primary key stays, in its order."""
        keys, sealed = list(table.primary_key.columns), _sealed_columns(table)
        values = t.VALUES.get(table.name, ())
        names = [*sealed, *values]
        order = sa.tuple_(*keys)
        # The types of the columns would seal and open; this engine has no vault, so they do not.
        query = sa.select(*keys, *(table.c[name] for name in names), *_id(table)).order_by(*keys)
        change = (
            sa.update(table)
            .where(*(key == sa.bindparam(f"of_{key.name}", type_=key.type) for key in keys))
            .values({name: sa.bindparam(f"to_{name}", type_=table.c[name].type) for name in names})
        )
        position = self._connection.execute(sa.select(_E.position)).scalar()
        at = None if position is None else orjson.loads(position)
        self._connection.commit()
        while True:
            page = query if at is None else query.where(order > sa.tuple_(*at))
            with self._connection.begin():
                rows = self._connection.execute(page.limit(_AT_ONCE)).all()
                if not rows:
                    return
                self._connection.execute(
                    change,
                    [
                        {f"of_{key.name}": getattr(row, key.name) for key in keys}
                        | {
                            f"to_{name}": _changed(kind, getattr(row, name), source, target)
                            for name, kind in sealed.items()
                        }
                        | {
                            f"to_{name}": seal_column(
                                target,
                                row.id,
                                name,
                                open_column(source, row.id, name, getattr(row, name)),
                            )
                            for name in values
                        }
                        for row in rows
                    ],
                )
                at = [getattr(rows[-1], key.name) for key in keys]
                self._connection.execute(
                    sa.update(t.encryption).values(position=orjson.dumps(at).decode())
                )
            step(len(rows))

    def _change_texts(
        self, source: Vault | None, target: Vault | None, step: Callable[[int], None]
    ) -> None:
        """Moves the texts, whose names change, into another table, which takes the old one's place.

        A text with a base is sealed as it is: it is still compressed against that.
        """
        c, kind = t.texts.c, t.texts.c.hash.type
        assert isinstance(kind, SealedType)
        inspector = sa.inspect(self._connection)
        if not inspector.has_table(_CHANGED.name):
            _CHANGED.create(self._connection)
        self._connection.commit()
        while True:
            with self._connection.begin():
                query = sa.select(t.texts).order_by(c.hash).limit(_AT_ONCE)
                rows = self._connection.execute(query).all()
                if not rows:
                    t.texts.drop(self._connection)
                    rename = f"ALTER TABLE {_CHANGED.name} RENAME TO {t.texts.name}"
                    self._connection.exec_driver_sql(rename)
                    for index in t.texts.indexes:
                        index.create(self._connection)
                    self._connection.execute(sa.update(t.encryption).values(phase=_FILES))
                    return
                new: list[dict[str, Any]] = []
                for row in rows:
                    key, base = (
                        _changed(kind, name, source, None) for name in (row.hash, row.base)
                    )
                    place = packed_place(key, base)
                    stored = seal(target, place, unseal(source, place, row.stored))
                    key, base = (_changed(kind, name, None, target) for name in (key, base))
                    new.append({"hash": key, "uses": row.uses, "base": base, "stored": stored})
                self._connection.execute(sa.insert(_CHANGED), new)
                gone = sa.delete(t.texts).where(c.hash.in_([row.hash for row in rows]))
                self._connection.execute(gone)
            step(len(rows))

    def _unwrapped(self) -> bytes:
        row = self._row()
        assert row is not None
        return _data_key(row.wrapped, self._folder, _required(self._folder))

    def _row(self) -> Any:
        row = self._connection.execute(sa.select(t.encryption)).first()
        self._connection.commit()
        return row

    def _run(self, statement: _Statement) -> None:
        with self._connection.begin():
            self._connection.execute(statement)

    def _end(self, statement: _Statement, change: str) -> None:
        """Runs the statement that ends a change, and tells the ledger."""
        with self._connection.begin():
            self._connection.execute(statement)
            content = {"change": change}
            append(self._connection, self._database.now(), Kind.ENCRYPTION, content)
        head = self._connection.info.pop(APPENDED)
        Head(self._folder).note(self._database, head, self._connection)
        self._connection.commit()


def _id(table: sa.Table) -> list[sa.Column[Any]]:
    """The id that the place of a value is made of, if it is not in the primary key."""
    return [table.c.id] if table.name in t.VALUES else []


def _changed(kind: SealedType, stored: Any, source: Vault | None, target: Vault | None) -> Any:
    if stored is None:
        return None
    if source is not None:
        stored = kind.ways(source)[1](stored)
    return stored if target is None else kind.ways(target)[0](stored)


@contextmanager
def exclusive_encryption(database: Database, folder: Path) -> Generator[Encryption]:
    """Opens the store's database for nobody else. Raises StartError if another process has it."""
    database.open()
    try:
        with database.engine.connect() as connection:
            try:
                database.take(connection)
            except sqlite3.OperationalError as error:
                raise StartError(
                    f"the store in {folder} is in use ({error}): end `nextstate up` and whatever "
                    "else has it open"
                ) from None
            try:
                with connection.begin():
                    if not is_current(connection):
                        migrate(connection)
            except NotWholeError as error:
                raise database.damaged(str(error)) from error
            yield Encryption(database, connection, folder)
    finally:
        database.close()
