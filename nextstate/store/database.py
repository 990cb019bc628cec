"""One database: transactions, the clock, waiting, and errors as StoreError.

What differs between databases is a `Dialect`: `nextstate/store/sqlite.py` and
`nextstate/store/postgresql.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import FunctionType
from typing import Any, Protocol, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from nextstate.errors import FencedError, StoreError, WaitError
from nextstate.store import schema as t
from nextstate.store.prepared import Prepared, prepare
from nextstate.store.vault import vault_of
from nextstate.store.waiting import Patience

T = TypeVar("T")
_KEPT_IDLE = 3
"""Connections that nobody uses and that stay out of the pool, which has at least 15."""
APPENDED = "nextstate_appended"
"""In a connection's `info`: the ledger's head, once its transaction has added to the ledger."""


class Dialect(Protocol):
    """What only one kind of database does."""

    kind: str
    """Such as "SQLite", for messages."""
    name: str
    """What a message calls the database: its file or address."""
    remedy: str
    """What else may help where it cannot be used, for messages."""
    errors: tuple[type[Exception], ...]
    """What its driver raises."""

    tells_changes: bool
    """Whether `wait_for_change` waits; a database that does not is asked again and again."""

    def open(self, lock_wait_s: float) -> sa.Engine:
        """Makes the database ready; it waits for a lock for `lock_wait_s`.

        Raises OSError, SQLAlchemyError and StoreError.
        """
        ...

    def cursor(self, connection: Any, dialect: sa.Dialect, write: bool) -> Cursors:
        """A cursor of a driver's connection; in a transaction if it shall `write`.

        One transaction writes at a time: it waits for its turn.
        """
        ...

    def insert(self, table: sa.Table) -> Any:
        """An INSERT that can have an ON CONFLICT clause."""
        ...

    def now(self) -> float:
        """Unix time in seconds, the same for all that use the database."""
        ...

    def describe(self, error: BaseException) -> str:
        """What a message says of an error: nothing that is stored."""
        ...

    def is_transient(self, error: BaseException) -> bool:
        """True if an error may go away without a change of the program: a lock, a full disk."""
        ...

    def is_damaged(self, error: BaseException) -> bool:
        """True if an error says that the stored data cannot be read."""
        ...

    def is_lost(self, connection: Any) -> bool:
        """True for a driver's connection that can never be used again."""
        ...

    def about(self) -> str:
        """What a person should know of the database. Raises StoreError if it is not safe."""
        ...

    def numbered(self, connection: sa.Connection) -> None:
        """Makes new rows' numbers follow the largest there are, after rows came with theirs."""
        ...

    def wait_for_change(self, timeout_s: float) -> None:
        """Waits until versions may have changed, or for `timeout_s`, if it `tells_changes`."""
        ...

    def close(self, engine: sa.Engine) -> None:
        """Closes every connection that nobody has."""
        ...

    def exclusive(self, name: str) -> AbstractContextManager[bool | None]:
        """A lock for as long as the block runs, or until its connection is lost.

        Gives whether it was free; None if nobody on another machine can use the database.
        """
        ...

    def checkpoint(self, engine: sa.Engine) -> None:
        """Does what the database postpones, if much of it has come together."""
        ...

    def sync(self) -> None:
        """Waits until what was committed is on the disk. Raises OSError."""
        ...

    def compact(self, connection: sa.Connection) -> None:
        """Writes the database anew, so that nothing that was deleted is left in its files."""
        ...

    def used_bytes(self, engine: sa.Engine) -> tuple[int, int]:
        """What the database needs on its disk: (without room that is free in its file, its log)."""
        ...

    def take(self, connection: sa.Connection) -> None:
        """Takes the database for this connection alone, until it is closed.

        Raises one of `errors` if another connection is open.
        """
        ...

    def damage(self, engine: sa.Engine) -> list[str]:
        """What the database itself finds wrong when it reads all of its pages and references."""
        ...


class Cursor:
    """The driver's own cursor, for frequent statements. Rows are named tuples.

    A statement is compiled once, so it must be one object: a constant of its module.
    """

    looks_ahead = False
    """Whether what several statements would find is better asked for in one."""

    def __init__(self, cursor: Any, dialect: sa.Dialect) -> None:
        self._cursor = cursor
        self._dialect = dialect
        self.vault = vault_of(dialect)
        """What seals values; None: they are stored as they are."""

    def send(self, statement: sa.ClauseElement, **values: object) -> None:
        """Runs a statement whose result nobody needs: an error may be raised only later."""
        self._execute(statement, values)

    def later(self, statement: sa.ClauseElement, **values: object) -> None:
        """Like `send`, at the end of the transaction or by `settle`: until then nobody sees it."""
        self._execute(statement, values)

    def settle(self) -> None:
        """Runs what was to be run `later`."""

    def run(self, statement: sa.ClauseElement, **values: object) -> int:
        """Runs a statement; returns how many rows it changed."""
        self._execute(statement, values)
        return self._cursor.rowcount

    def run_many(self, statement: sa.ClauseElement, rows: Sequence[Mapping[str, object]]) -> int:
        """Runs a statement once for each row of values; returns how many rows all changed."""
        prepared = prepare(statement, self._dialect)
        self._cursor.executemany(prepared.sql, [prepared.arguments(row) for row in rows])
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

    def _execute(self, statement: sa.ClauseElement, values: Mapping[str, object]) -> Prepared:
        prepared = prepare(statement, self._dialect)
        self._cursor.execute(prepared.sql, prepared.arguments(values))
        return prepared


Cursors: TypeAlias = AbstractContextManager[Cursor]


_EPOCH = sa.select(t.roles.c.epoch, t.roles.c.holder).where(t.roles.c.name == sa.bindparam("name"))


def _require(name: str, epoch: int, row: Any) -> None:
    if row is None or row.epoch != epoch:
        holder = "nobody" if row is None else row.holder
        raise FencedError(
            f"this process was cut off from the store, and its role, {name}, has been taken by "
            f"{holder}: it writes nothing any more; end it, or start it anew"
        )


class Database:
    """One database that several threads and processes use.

    Every error that leaves it is a StoreError: a WaitError where trying again may help.
    """

    def __init__(
        self,
        dialect: Dialect,
        clock: Callable[[], float] | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.now = clock or dialect.now
        """Unix time in seconds, for leases and heartbeats."""
        self.patience = patience or Patience()
        self.name = dialect.name
        self.insert = dialect.insert
        self.numbered = dialect.numbered
        self.about = dialect.about
        self.tells_changes = dialect.tells_changes
        self.epochs: dict[str, int] = {}
        """What this process has the roles of (nextstate/store/roles.py): each write checks them."""
        self.appended: Callable[[str], object] = str
        """Gets the ledger's head after a transaction that has added to it."""
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
        self._dialect.close(self.engine)

    def checkpoint(self) -> None:
        """Moves what was committed into the database's own file, if that is a lot by now."""
        with self._as_store_errors():
            self._dialect.checkpoint(self.engine)

    def sync(self) -> None:
        """Waits until what was committed is on the disk. Raises OSError."""
        self._dialect.sync()

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

    def used_bytes(self) -> tuple[int, int]:
        """What it needs on its disk: (without room that is free in its file, its log)."""
        with self._as_store_errors():
            return self._dialect.used_bytes(self.engine)

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
            connection.info.pop(APPENDED, None)  # of a transaction that was rolled back
            for name, epoch in self.epochs.items():
                row = connection.execute(_EPOCH, {"name": name}).first()
                _require(name, epoch, row)
            yield connection
            head = connection.info.pop(APPENDED, None)
        if head is not None:
            self.appended(head)

    @contextmanager
    def read(self, *, unhurried: bool = False) -> Generator[sa.Connection]:
        """One read transaction; `unhurried` if it may do nothing for more than a minute."""
        connected = self.engine.connect().execution_options(unhurried=unhurried)
        with connected as connection, connection.begin():
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
            with (
                self._as_store_errors(),
                self._dialect.cursor(connection, self.engine.dialect, write) as cursor,
            ):
                if write:
                    for name, epoch in self.epochs.items():
                        _require(name, epoch, cursor.first(_EPOCH, name=name))
                yield cursor
        except BaseException:
            if self._dialect.is_lost(connection.driver_connection):
                connection.invalidate()
                with suppress(IndexError):
                    while True:  # they are lost as well
                        self._idle.pop().invalidate()
            connection.close()  # which rolls back
            raise
        if len(self._idle) < _KEPT_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def wait_for_change(self, timeout_s: float) -> None:
        """Waits until versions may have changed, or for `timeout_s`, if it `tells_changes`.

        It may miss a change. Only one thread may wait.
        """
        self._dialect.wait_for_change(timeout_s)

    @contextmanager
    def exclusive(self, name: str) -> Generator[bool | None]:
        """A lock of the database itself: whether it was got. None where it has no such locks."""
        with ExitStack() as opened:
            with self._as_store_errors():
                got = opened.enter_context(self._dialect.exclusive(name))
            yield got

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

    def errors(self) -> AbstractContextManager[None]:
        """What fails in the block with this database raises StoreError, as in its queries."""
        return self._as_store_errors()

    def damaged(self, said: str) -> StoreError:
        """The error for a database that is not whole."""
        return StoreError(
            f"{self._dialect.name} is no whole {self._dialect.kind} database: {said}; "
            "it is left as it is: "
            "put a whole copy in its place, or move it away to begin with an empty store"
        )

    @contextmanager
    def _as_store_errors(self) -> Generator[None]:
        try:
            yield
        except (SQLAlchemyError, *self._dialect.errors, OSError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            if isinstance(error, DBAPIError) and not isinstance(cause, self._dialect.errors):
                raise  # it is another database's
            cause = cause or error
            said = self._dialect.describe(cause)
            if isinstance(error, PoolTimeoutError) or self._dialect.is_transient(cause):
                raise WaitError(
                    f"the store cannot be used for now: {said}; make room on its "
                    f"disk, end what locks it or {self._dialect.remedy}, and try again"
                ) from cause
            if self._dialect.is_damaged(cause):
                raise self.damaged(said) from cause
            if isinstance(error, OSError):
                raise
            # Not the error itself, which may hold the values that the statement was given.
            kind = type(cause).__name__
            raise StoreError(f"{self._dialect.name}: {kind}: {said}") from cause
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
