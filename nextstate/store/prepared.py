"""A statement as the driver takes it: compiled once, its values sealed and opened on the way."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.sql.compiler import SQLCompiler

from nextstate.store.vault import Name, SealedType, Vault, Way, vault_of


class Prepared:
    """One statement as the driver takes it, compiled once.

    SQLAlchemy takes longer to look up a statement and to wrap its rows than SQLite to run it.
    """

    def __init__(self, statement: sa.ClauseElement, dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        assert isinstance(compiled, SQLCompiler)
        self.sql = str(compiled)
        self._names = compiled.positiontup
        self._fixed = {k: v for k, v in compiled.params.items() if v is not None}
        columns = statement.selected_columns.keys() if isinstance(statement, sa.Select) else []
        self.row: Any = namedtuple("Row", columns)  # pyright: ignore[reportUntypedNamedTuple]
        self._sealed: list[tuple[str, Way]] = []
        self._hashes: list[str] = []
        self._opened_hashes: list[int] = []
        self._opened: list[tuple[int, Way]] = []
        self._vault = vault_of(dialect)
        if self._vault is not None:
            self._find_sealed(cast(Any, statement), compiled, self._vault)

    def arguments(self, values: Mapping[str, object]) -> Any:
        """The values in the order, or under the names, that the driver wants."""
        known = {**self._fixed, **values}
        if self._vault is not None:
            for name, seal in self._sealed:
                if (value := known[name]) is not None:
                    known[name] = seal(value)
            if self._hashes:
                self._seal_hashes(self._vault, known)
        return known if self._names is None else tuple(map(known.__getitem__, self._names))

    def _seal_hashes(self, vault: Vault, values: dict[str, Any]) -> None:
        """Hashes in one call: most of its cost is not of AES."""
        names = [name for name in self._hashes if values[name]]
        if len(names) == 1:
            values[names[0]] = vault.seal_names(values[names[0]])
            return
        joined, at = vault.seal_names(b"".join([values[name] for name in names])), 0
        for name in names:
            values[name] = joined[at : (at := at + len(values[name]))]

    def rows(self, found: Sequence[Any]) -> list[Any]:
        """The driver's rows as named tuples."""
        make = self.row._make
        if not (self._opened or self._opened_hashes):
            return [make(row) for row in found]
        rows: list[Any] = []
        for row in found:
            values = list(row)
            for at, opened in self._opened:
                if values[at] is not None:
                    values[at] = opened(values[at])
            if self._opened_hashes:
                assert self._vault is not None
                hashes = [values[at] or b"" for at in self._opened_hashes]
                joined, start = self._vault.open_names(b"".join(hashes)), 0
                for at, value in zip(self._opened_hashes, hashes, strict=True):
                    if value:
                        values[at] = joined[start : (start := start + len(value))]
            rows.append(make(values))
        return rows

    def _find_sealed(self, statement: Any, compiled: SQLCompiler, vault: Vault) -> None:
        """Notes which values are sealed and opened on the way."""
        for name, bind in compiled.binds.items():
            if isinstance(bind.type, Name):
                self._hashes.append(name)
            elif isinstance(bind.type, SealedType):
                self._sealed.append((name, bind.type.ways(vault)[0]))
        columns: list[Any] = (
            list(statement.selected_columns) if isinstance(statement, sa.Select) else []
        )
        for at, column in enumerate(columns):
            if isinstance(column.type, Name):
                self._opened_hashes.append(at)
            elif isinstance(column.type, SealedType):
                self._opened.append((at, column.type.ways(vault)[1]))


_plain: dict[tuple[sa.ClauseElement, type[sa.Dialect]], Prepared] = {}
"""What stores that are not encrypted have in common."""
_MOST_PLAIN = 512


def prepare(statement: sa.ClauseElement, dialect: sa.Dialect) -> Prepared:
    """A statement as the driver takes it, compiled once a process, or once an encrypted store."""
    if vault_of(dialect) is not None:
        return _sealing(statement, dialect)
    key = (statement, type(dialect))
    if (found := _plain.get(key)) is None:
        if len(_plain) >= _MOST_PLAIN:
            _plain.clear()
        found = _plain[key] = Prepared(statement, dialect)
    return found


@functools.lru_cache(maxsize=256)
def _sealing(statement: sa.ClauseElement, dialect: sa.Dialect) -> Prepared:
    return Prepared(statement, dialect)
