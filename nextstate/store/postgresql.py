"""PostgreSQL: connections, transaction modes, types and what its errors mean.

A write transaction holds one lock of the database until it ends, so there is one writer at a time,
as in SQLite, and what reads first and writes later is safe. A read transaction sees the store as it
was when it began, and waits for nobody.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import psycopg
import sqlalchemy as sa
from psycopg.adapt import Buffer, Dumper, Loader
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql.base import PGDDLCompiler, PGTypeCompiler

from nextstate.egress import is_here
from nextstate.errors import StoreError
from nextstate.store import schema as t
from nextstate.store.database import Cursor
from nextstate.store.prepared import Prepared, prepare

logging.getLogger("psycopg").setLevel(logging.ERROR)
"""It warns of what a lost connection leaves behind; we tell that it is lost."""
OLDEST = 14
"""The oldest version of PostgreSQL that its makers still mend."""
_LOCK = 0x6E657874
"""Of all write transactions; advisory locks are each database's own."""
_WRITING = "BEGIN ISOLATION LEVEL READ COMMITTED", f"SELECT pg_advisory_xact_lock({_LOCK})"
_BEGIN_READING = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_UNHURRIED = "SET LOCAL idle_in_transaction_session_timeout = 0"
_REWRITING = "SET lock_timeout = '30s'"
"""For each table it waits until nobody reads there: somebody who exports may take a while."""
_VERIFYING = ("verify-ca", "verify-full")
_UNVERIFIED = "sslmode={mode} does not see whose server it is: sslmode=verify-full does"
_CLOCK_S = 60.0
"""How long the database's clock is reckoned with ours before it is asked again."""
_SETTINGS = {
    "connect_timeout": 5,
    "application_name": "nextstate",
    "client_encoding": "utf8",
    # A link that is cut is noticed at both ends after about half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
_OPTIONS = {
    "tcp_keepalives_idle": 10,
    "tcp_keepalives_interval": 5,
    "tcp_keepalives_count": 3,
    "tcp_user_timeout": "25s",  # keepalives say nothing while an answer is under way
    # Whoever vanishes within a transaction must not hold the lock.
    "idle_in_transaction_session_timeout": "60s",
}

_TRANSIENT_CLASSES = frozenset({"08", "53", "57", "58"})
"""Of SQLSTATE: lost connections, no room, shutting down or cancelled, input and output."""
_TRANSIENT_CODES = frozenset({"40001", "40P01", "55P03", "25006", "25P03"})
"""Conflicts, deadlocks, locks, a stand-by server that only reads, a transaction left alone."""
_DROPPED = "57P04"
_DAMAGED_CODES = frozenset({"XX001", "XX002", "42P01"})
"""Two of broken files, and that of a table that is gone."""
_FOR_GOOD = re.compile(
    "authentication failed|does not exist|no pg_hba|no password|not permitted|certificate|"
    r"does not support SSL|SSL error: (?:wrong version|\w+ alert)|"
    "unsupported startup parameter|invalid"
)
"""In what a server, or the driver, says when it refuses a connection: a person must change it. A
link that is cut is an SSL error too, such as `SSL SYSCALL error: Connection timed out`: it passes.
"""


class PostgreSQL:
    """A database on a server."""

    kind = "PostgreSQL"
    tells_changes = True
    remedy = "see that its server runs and can be reached"
    errors: tuple[type[Exception], ...] = (psycopg.Error,)

    def __init__(self, url: str) -> None:
        """`url` is libpq's: postgresql://USER@HOST:PORT/NAME?sslmode=verify-full."""
        try:
            self._given = conninfo_to_dict(url)
        except psycopg.Error as error:
            raise StoreError(
                f"[store] url = {without_password(url)!r}: {str(error).strip()}; expected "
                "postgresql://USER@HOST:PORT/NAME"
            ) from error
        self.name = without_password(url)
        self._listening: psycopg.Connection[Any] | None = None
        self._clock = -_CLOCK_S, 0.0
        """When the database's clock was asked, by `_passed`, and what it said."""

    def open(self, lock_wait_s: float) -> sa.Engine:
        """An engine, whose connections wait for a lock for `lock_wait_s`."""
        options = {**_OPTIONS, "lock_timeout": f"{max(1, round(lock_wait_s * 1000))}ms"}
        given = str(self._given.get("options") or "")
        values: dict[str, Any] = {**_SETTINGS, **self._given}
        values["options"] = " ".join([*(f"-c {k}={v}" for k, v in options.items()), given])

        def connect() -> psycopg.Connection[Any]:
            connection = psycopg.connect(autocommit=True, **values)  # we send BEGIN ourselves
            connection.server_cursor_factory = _Streaming
            connection.adapters.register_dumper(str, _TextDumper)
            for kind in ("text", "varchar"):
                connection.adapters.register_loader(kind, _TextLoader)
            return connection

        engine = sa.create_engine(
            "postgresql+psycopg://",
            creator=connect,
            hide_parameters=True,
            use_native_hstore=False,
            pool_size=3,
            max_overflow=12,
        )
        engine.dialect.type_compiler_instance = _Types(engine.dialect)
        engine.dialect.ddl_compiler = _Tables

        @event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:  # pyright: ignore[reportUnusedFunction]
            options = connection.get_execution_options()
            begin = [_BEGIN_READING, _UNHURRIED][: 1 + bool(options.get("unhurried"))]
            connection.exec_driver_sql("; ".join(_WRITING if options.get("immediate") else begin))

        self._engine, self._connect = engine, connect
        try:
            self._check_server()
        except BaseException:
            engine.dispose()
            raise
        return engine

    @contextmanager
    def cursor(self, connection: Any, dialect: sa.Dialect, write: bool) -> Generator[Cursor]:
        """A cursor of a driver's connection; in a transaction if it shall `write`.

        What it writes is sent without waiting: a query, and the end, wait for all before them.
        """
        driver = connection.driver_connection
        if not write:
            with driver.cursor() as cursor:
                yield Cursor(cursor, dialect)
            return
        with driver.pipeline() as pipeline:
            for statement in _WRITING:
                driver.execute(statement)
            cursor = _Sending(driver, pipeline, dialect)
            yield cursor
            cursor.settle()
            driver.execute("COMMIT")

    def insert(self, table: sa.Table) -> postgresql.Insert:
        """An INSERT that can have an ON CONFLICT clause."""
        return postgresql.insert(table)

    def now(self) -> float:
        """The database's time: machines that share it may have clocks that differ.

        It is asked once a minute; between, our clock counts on, also while the machine sleeps.
        """
        asked, said = self._clock
        if _passed() - asked >= _CLOCK_S:
            said = self._ask("SELECT extract(epoch FROM clock_timestamp())::float8")[0]
            asked = _passed()
            self._clock = asked, said
        return said + _passed() - asked

    def describe(self, error: BaseException) -> str:
        """The message of an error without its details, which may hold stored values."""
        if isinstance(error, psycopg.Error) and error.diag.message_primary:
            return error.diag.message_primary
        return str(error).strip().partition("\n")[0]

    def is_transient(self, error: BaseException) -> bool:
        """True for a lock, a deadlock, a server that restarts, a lost connection and the like."""
        if not isinstance(error, psycopg.Error):
            return False
        if error.sqlstate is None:
            is_lost = isinstance(error, psycopg.OperationalError)
            return is_lost and _FOR_GOOD.search(str(error)) is None
        if error.sqlstate == _DROPPED:
            return False
        return error.sqlstate[:2] in _TRANSIENT_CLASSES or error.sqlstate in _TRANSIENT_CODES

    def is_damaged(self, error: BaseException) -> bool:
        """True if the server finds its files broken, or one of our tables is gone."""
        return isinstance(error, psycopg.Error) and error.sqlstate in _DAMAGED_CODES

    def is_lost(self, connection: Any) -> bool:
        """True for a connection that has ended."""
        return connection.closed

    def about(self) -> str:
        """The server's version, and how it is reached.

        Raises StoreError for another machine without encryption: everything recorded goes there;
        and for a pooler that gives a connection to somebody else after each transaction.
        """
        with closing(self._connect()) as connection:
            _refuse_readable(connection)
            link = "this machine"
            if connection.pgconn.ssl_in_use:
                mode = connection.info.get_parameters().get("sslmode", "prefer")
                link = "TLS" if mode in _VERIFYING else f"TLS, but {_UNVERIFIED.format(mode=mode)}"
            row = connection.execute("SELECT version(), pg_backend_pid()").fetchone()
            version, process = row or ("", 0)
            found = [" ".join(version.split()[:2]), link]
            if process != connection.info.backend_pid:
                self._refuse_shared_sessions(connection)
                found.append("through a pooler that gives each connection a session of its own")
        return ", ".join(found)

    def _refuse_shared_sessions(self, connection: psycopg.Connection[Any]) -> None:
        """Raises StoreError if two open connections are one of the server's in turn."""
        query = "SELECT pg_backend_pid()"
        with closing(self._connect()) as other:
            for _ in range(3):
                before = connection.execute(query).fetchone()
                other.execute("BEGIN")
                theirs = other.execute(query).fetchone()
                after = connection.execute(query).fetchone()
                other.execute("COMMIT")
                if theirs == before or before != after:
                    raise StoreError(
                        f"[store] url: {self.name} is a pooler that gives a connection away after "
                        "each transaction, so no lock lasts: connect to the server itself, or let "
                        "the pooler have pool_mode = session"
                    )

    def numbered(self, connection: sa.Connection) -> None:
        """Makes new rows' numbers follow the largest there are."""
        for table in (t.turns, t.rewards, t.decisions, t.reviews):
            connection.exec_driver_sql(
                f"SELECT setval(pg_get_serial_sequence('{table.name}', 'seq'), "
                f"max(seq)) FROM {table.name} HAVING max(seq) IS NOT NULL"
            )

    def wait_for_change(self, timeout_s: float) -> None:
        """Waits until the server tells that versions may have changed, or for `timeout_s`."""
        end = time.monotonic() + timeout_s
        try:
            if self._listening is None or self._listening.closed:
                self._listening = self._connect()
                self._listening.execute(f"LISTEN {t.CHANGED}")
                return  # what was told before, nobody heard
            for _ in self._listening.notifies(timeout=timeout_s, stop_after=1):
                pass
        except psycopg.Error:
            if self._listening is not None:
                self._listening.close()
            time.sleep(max(0.0, end - time.monotonic()))

    def close(self, engine: sa.Engine) -> None:
        """Closes every connection that nobody has."""
        engine.dispose()
        if self._listening is not None:
            self._listening.close()

    @contextmanager
    def exclusive(self, name: str) -> Generator[bool]:
        """A lock of a connection of its own, so that it is free once we are gone."""
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)
        with closing(self._connect()) as connection:
            cursor = connection.cursor()
            row = cursor.execute("SELECT pg_try_advisory_lock(%s)", (key,)).fetchone()
            try:
                yield bool(row and row[0])
            finally:  # the server may notice later that the connection has ended
                with suppress(psycopg.Error):
                    cursor.execute("SELECT pg_advisory_unlock_all()")

    def checkpoint(self, engine: sa.Engine) -> None:
        """Nothing: the server does it."""

    def sync(self) -> None:
        """Nothing: the server commits to its disk."""

    def compact(self, connection: sa.Connection) -> None:
        """Rewrites the tables. The server's write-ahead log and its backups are its owner's."""
        cursor = connection.connection.cursor()
        cursor.execute(_REWRITING)
        try:
            cursor.execute("VACUUM (FULL)")
        finally:
            with suppress(psycopg.Error):
                cursor.execute("RESET lock_timeout")

    def used_bytes(self, engine: sa.Engine) -> tuple[int, int]:
        """What the server says of the database, with the room of rows that are gone; no log."""
        return self._ask("SELECT pg_database_size(current_database())")[0], 0

    def take(self, connection: sa.Connection) -> None:
        """Raises StoreError: a server's database is others' too."""
        raise StoreError(f"{self.name} cannot be taken for one connection alone")

    def damage(self, engine: sa.Engine) -> list[str]:
        """Nothing that reading the records would not find: references are checked as they change.

        Who wants more has `pg_amcheck`.
        """
        return []

    def _check_server(self) -> None:
        with closing(self._connect()) as connection:
            _refuse_readable(connection)
        query = "SELECT current_setting('server_version_num')::int, getdatabaseencoding()"
        number, encoding = self._ask(query)
        if number // 10_000 < OLDEST or encoding != "UTF8":
            raise StoreError(
                f"{self.name}: PostgreSQL {number // 10_000} with the encoding {encoding}: "
                f"expected version {OLDEST} or newer and UTF8 (`createdb --encoding UTF8 "
                "--template template0 NAME`)"
            )

    def _ask(self, query: str) -> Any:
        with self._engine.connect() as connection:
            return connection.connection.cursor().execute(query).fetchone()


class _Streaming(psycopg.ServerCursor[Any]):
    """A result that is read as it is needed. One that is not read to its end is no mistake."""

    def __del__(self, *_: Any) -> None:
        """Nothing: it ends with its transaction."""


class _Sending(Cursor):
    """A cursor that waits for an answer only where one is asked for."""

    looks_ahead = True

    def __init__(self, driver: Any, pipeline: psycopg.Pipeline, dialect: sa.Dialect) -> None:
        super().__init__(None, dialect)
        self._driver = driver
        self._pipeline = pipeline
        self._later: dict[sa.ClauseElement, list[Any]] = {}

    def later(self, statement: sa.ClauseElement, **values: object) -> None:
        """Runs a statement at the end, for all values that it was given until then."""
        rows = self._later.setdefault(statement, [])
        rows.append(prepare(statement, self._dialect).arguments(values))

    def settle(self) -> None:
        """Runs what was to be run `later`."""
        for statement, rows in self._later.items():
            self._driver.cursor().executemany(prepare(statement, self._dialect).sql, rows)
        self._later.clear()

    def run(self, statement: sa.ClauseElement, **values: object) -> int:
        """Runs a statement; returns how many rows it changed."""
        self._execute(statement, values)
        self._pipeline.sync()
        return self._cursor.rowcount

    def run_many(self, statement: sa.ClauseElement, rows: Sequence[Mapping[str, object]]) -> int:
        """Runs a statement for each row of values and waits once; returns how many rows changed."""
        cursors: list[Any] = []
        for row in rows:
            self._execute(statement, row)
            cursors.append(self._cursor)
        self._pipeline.sync()
        return sum(cursor.rowcount for cursor in cursors)

    def _execute(self, statement: sa.ClauseElement, values: Mapping[str, object]) -> Prepared:
        self._cursor = self._driver.cursor()  # each has the answer to one statement
        return super()._execute(statement, values)


def _refuse_readable(connection: psycopg.Connection[Any]) -> None:
    """Raises StoreError for another machine without encryption: everything recorded goes there."""
    host = connection.info.host
    if not (connection.pgconn.ssl_in_use or host.startswith("/") or is_here(host)):
        raise StoreError(
            f"[store] url: the connection to {host} is not encrypted: add ?sslmode=verify-full, "
            "and give the server a certificate"
        )


def _passed() -> float:
    """Seconds since the machine was started, where it can tell with those in which it slept."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def without_password(url: str) -> str:
    """The URL as messages and logs show it."""
    try:
        parts = urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        shown = parts._replace(netloc=f"{user.partition(':')[0]}{':***' * (':' in user)}{at}{host}")
    except ValueError:
        return "postgresql://…"
    query = re.sub(r"(?i)(password=)[^&]*", r"\1***", shown.query)
    return shown._replace(query=query).geturl()


# What PostgreSQL's texts cannot hold is written as two characters, and so is the first of them.
_ESCAPES = str.maketrans({"\0": "\x010", "\x01": "\x011"})
_ESCAPED = re.compile("\x01([01])")


class _TextDumper(Dumper):
    """A text with a NUL, which a client may send as its name or model, is kept all the same."""

    def dump(self, obj: str) -> bytes:
        return (obj.translate(_ESCAPES) if "\0" in obj or "\x01" in obj else obj).encode()


class _TextLoader(Loader):
    def load(self, data: Buffer) -> str:
        text = bytes(data).decode()
        if "\x01" not in text:
            return text
        return _ESCAPED.sub(lambda found: "\x01" if found[1] == "1" else "\0", text)


class _Types(PGTypeCompiler):
    """Texts without a limit, and integers of 64 bits: as SQLite has them."""

    def visit_VARCHAR(self, type_: Any, **kw: Any) -> str:
        return "TEXT"

    def visit_INTEGER(self, type_: Any, **kw: Any) -> str:
        return "BIGINT"


class _Tables(PGDDLCompiler):
    """Columns: texts in the order of their bytes, as look-ups by the beginning of a name need."""

    def get_column_specification(self, column: Any, **kwargs: Any) -> str:
        found = super().get_column_specification(column, **kwargs)
        return found.replace(" SERIAL", " BIGSERIAL").replace(" TEXT", ' TEXT COLLATE "C"')
