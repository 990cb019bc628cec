"""One database: transactions, prepared statements, the clock, waiting, and errors as StoreError.

What differs between databases is a `Dialect`; `nextstate/store/sqlite.py` is the only one so far.
"""

from __future__ import annotations

import functools
import time
from collections import namedtuple
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import FunctionType
from typing import Any, Protocol, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.sql.compiler import SQLCompiler

from nextstate.errors import StoreError, WaitError
from nextstate.store.vault import Name, SealedType, Vault, Way, vault_of
from nextstate.store.waiting import Patience

T = TypeVar("T")


class Dialect(Protocol):
    """What only one kind of database does."""

    kind: str
    """Such as "SQLite", for messages."""
    name: str
    """What a message calls the database: its file or address."""
    errors: tuple[type[Exception], ...]
    """What its driver raises."""
    begin_writing: str
    """The statement that begins a write transaction and waits for its turn."""

    def open(self, lock_wait_s: float) -> sa.Engine:
        """Makes the database ready; it waits for a lock for `lock_wait_s`.

        Raises OSError, SQLAlchemyError and StoreError.
        """
        ...

    def insert(self, table: sa.Table) -> Any:
        """An INSERT that can have an ON CONFLICT clause."""
        ...

    def is_transient(self, error: BaseException) -> bool:
        """True if an error may go away without a change of the program: a lock, a full disk."""
        ...

    def is_damaged(self, error: BaseException) -> bool:
        """True if an error says that the stored data cannot be read."""
        ...

    def checkpoint(self, engine: sa.Engine) -> None:
        """Does what the database postpones, if much of it has come together."""
        ...

    def compact(self, connection: sa.Connection) -> None:
        """Writes the database anew, so that nothing that was deleted is left in its files."""
        ...

    def take(self, connection: sa.Connection) -> None:
        """Takes the database for this connection alone, until it is closed.

        Raises one of `errors` if another connection is open.
        """
        ...

    def damage(self, engine: sa.Engine) -> list[str]:
        """What the database itself finds wrong when it reads all of its pages and references."""
        ...


class _Prepared:
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
        known = {**self._fixed, **values} if self._fixed else values
        if self._vault is not None and (self._hashes or self._sealed):
            sealed = {n: seal(v) for n, seal in self._sealed if (v := known[n]) is not None}
            if hashes := [n for n in self._hashes if known[n] is not None]:
                sealed |= self._seal_hashes(self._vault, hashes, known)
            known = {**known, **sealed}
        return known if self._names is None else tuple(map(known.__getitem__, self._names))

    def _seal_hashes(
        self, vault: Vault, names: Sequence[str], values: Mapping[str, Any]
    ) -> dict[str, object]:
        """Hashes in one call: most of its cost is not of AES."""
        joined, at = vault.seal_names(b"".join([values[name] for name in names])), 0
        sealed: dict[str, object] = {}
        for name in names:
            end = at + len(values[name])
            sealed[name] = joined[at:end]
            at = end
        return sealed

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
            if hashes := [at for at in self._opened_hashes if values[at] is not None]:
                assert self._vault is not None
                joined, start = self._vault.open_names(b"".join([values[a] for a in hashes])), 0
                for at in hashes:
                    end = start + len(values[at])
                    values[at] = joined[start:end]
                    start = end
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


@functools.lru_cache(maxsize=256)
def _prepared(statement: sa.ClauseElement, dialect: sa.Dialect) -> _Prepared:
    return _Prepared(statement, dialect)


class Cursor:
    """The driver's own cursor, for frequent statements. Rows are named tuples.

    A statement is compiled once, so it must be one object: a constant of its module.
    """

    def __init__(self, cursor: Any, dialect: sa.Dialect) -> None:
        self._cursor = cursor
        self._dialect = dialect
        self.vault = vault_of(dialect)
        """What seals values; None: they are stored as they are."""

    def run(self, statement: sa.ClauseElement, **values: object) -> int:
        """Runs a statement; returns how many rows it changed."""
        self._execute(statement, values)
        return self._cursor.rowcount

    def first(self, statement: sa.ClauseElement, **values: object) -> Any | None:
        """The first row, or None."""
        prepared = self._execute(statement, values)
        row = self._cursor.fetchone()
        return None if row is None else prepared.rows([row])[0]

    def all(self, statement: sa.ClauseElement, **values: object) -> list[Any]:
        """Every row."""
        prepared = self._execute(statement, values)
        return prepared.rows(self._cursor.fetchall())

    def _execute(self, statement: sa.ClauseElement, values: Mapping[str, object]) -> _Prepared:
        prepared = _prepared(statement, self._dialect)
        self._cursor.execute(prepared.sql, prepared.arguments(values))
        return prepared


class Database:
    """One database that several threads and processes use.

    Every error that leaves it is a StoreError: a WaitError where trying again may help.
    """

    def __init__(
        self,
        dialect: Dialect,
        clock: Callable[[], float] = time.time,
        patience: Patience | None = None,
    ) -> None:
        self.now = clock
        """Unix time in seconds, for leases and heartbeats."""
        self.patience = patience or Patience()
        self.name = dialect.name
        self.insert = dialect.insert
        self._dialect = dialect
        self._idle: list[sa.PoolProxiedConnection] = []
        """Driver connections that nobody uses. Taking one out of the pool and putting it back
        takes as long as the statements of a turn."""

    def open(self) -> None:
        """Opens the database, whose tables may be missing or old."""
        self.engine = self._dialect.open(self.patience.lock_wait_s)

    def close(self) -> None:
        """Closes every connection."""
        while self._idle:
            self._idle.pop().close()
        self.engine.dispose()

    def checkpoint(self) -> None:
        """Moves what was committed into the database's own file, if that is a lot by now."""
        with self._as_store_errors():
            self._dialect.checkpoint(self.engine)

    def compact(self) -> None:
        """Writes the database anew, so that nothing that was deleted is left in its files."""
        with self._as_store_errors(), self.engine.connect() as connection:
            self._dialect.compact(connection)

    def compact_on(self, connection: sa.Connection) -> None:
        """The same on a connection that has the database for itself."""
        with self._as_store_errors():
            self._dialect.compact(connection)

    def take(self, connection: sa.Connection) -> None:
        """Takes the database for this connection alone. Raises what the driver raises."""
        self._dialect.take(connection)

    def damage(self) -> list[str]:
        """What the database itself finds wrong when it reads all of its pages and references."""
        return self._dialect.damage(self.engine)

    @contextmanager
    def write(self) -> Generator[sa.Connection]:
        """One write transaction."""
        with (
            self.engine.connect().execution_options(immediate=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def read(self) -> Generator[sa.Connection]:
        """One read transaction."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def cursor(self, *, write: bool) -> Generator[Cursor]:
        """The driver's own cursor, for frequent statements; `write` begins a write transaction.

        It does not wait: a database that is locked or full is a WaitError at once.
        """
        try:
            connection = self._idle.pop()
        except IndexError:
            with self._as_store_errors():
                connection = self.engine.raw_connection()
        try:
            with self._as_store_errors(), closing(connection.cursor()) as cursor:
                if write:
                    cursor.execute(self._dialect.begin_writing)
                yield Cursor(cursor, self.engine.dialect)
                if write:
                    connection.commit()
        except BaseException:
            connection.close()  # which rolls back
            raise
        self._idle.append(connection)

    def waiting(self, work: Callable[[], T]) -> T:
        """The result of `work`, one transaction that is tried until the database allows it.

        Raises WaitError once patience ends, and StoreError.
        """
        give_up = self.patience.give_up_at()
        while True:
            try:
                with self._as_store_errors():
                    return work()
            except WaitError as error:
                if self.patience.is_over(give_up):
                    raise
                self.patience.pause(error)

    @contextmanager
    def _as_store_errors(self) -> Generator[None]:
        try:
            yield
        except (SQLAlchemyError, *self._dialect.errors, OSError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            cause = cause or error
            if self._dialect.is_transient(cause):
                raise WaitError(
                    f"the store cannot be used for now: {cause}; make room on its "
                    "disk, end what locks it or make its files writable, and try again"
                ) from cause
            if self._dialect.is_damaged(cause):
                raise StoreError(
                    f"{self._dialect.name} is no whole {self._dialect.kind} database: {cause}; "
                    "it is left as it is: "
                    "put a whole copy in its place, or move it away to begin with an empty store"
                ) from cause
            if isinstance(error, OSError):
                raise
            # Not the error itself, which may hold the values that the statement was given.
            kind = type(cause).__name__
            raise StoreError(f"{self._dialect.name}: {kind}: {cause}") from cause
        except UnicodeEncodeError as error:  # an argument in another encoding than the terminal's
            raise StoreError("a name or text is not valid Unicode: type it anew") from error


def queries(customer: type[T]) -> type[T]:
    """Lets every public method of a class wait for its `_database`; each is one transaction."""

    def waiting(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def until_done(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._database.waiting(lambda: method(self, *args, **kwargs))

        return until_done

    for name, method in list(vars(customer).items()):
        if isinstance(method, FunctionType) and not name.startswith("_"):
            setattr(customer, name, waiting(method))
    return customer
