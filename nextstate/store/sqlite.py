"""SQLite: pragmas, transaction modes and what its errors mean."""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import ArgumentError

from nextstate.errors import StoreError
from nextstate.private_files import make_file, make_folder
from nextstate.store.database import Cursor

FILE = "nextstate.sqlite3"
_CACHE_KIB = 8192
"""Of one connection: room for the upper pages of the indexes. A writer grows by as much."""
_MANY_PAGES, _LOG_BYTES = 16_384, 4 << 20

_BEGIN_WRITING = "BEGIN IMMEDIATE"
_TRANSIENT_CODES = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,  # a quota, a limit on the size of files, a network's disk
        sqlite3.SQLITE_READONLY,  # how Linux mounts a disk again that had an error
        sqlite3.SQLITE_CANTOPEN,  # too many open files
    }
)
_TRANSIENT_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
)
_DAMAGED_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_NO_TABLE = "no such table: "


def is_open(path: Path) -> bool:
    """Whether a process has the database at `path` open. Only for one that is deleted next."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(path, timeout=0)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")  # needs it for itself
    except sqlite3.Error as error:
        return _code(error) & 0xFF == sqlite3.SQLITE_BUSY
    return False


class SQLite:
    """A database in one file, which only its owner may read."""

    kind = "SQLite"
    tells_changes = False
    remedy = "make its files writable"
    errors: tuple[type[Exception], ...] = (sqlite3.Error,)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def open(self, lock_wait_s: float) -> sa.Engine:
        """An engine on the file, which waits for a lock for `lock_wait_s`.

        Write transactions take the lock when they begin (`immediate` execution option): two
        processes that read first and write later would otherwise fail with "database is locked".
        """
        make_folder(self.path.parent)
        make_file(self.path)
        log = self._log
        if log.exists() and log.stat().st_size and not self.path.stat().st_size:
            raise StoreError(
                f"{self.path} is empty, but {log.name} beside it is not, and would be lost: put "
                "the database back, or move both away"
            )
        if not log.exists():
            _require_whole_pages(self.path)
        for beside in (log, log.with_name(f"{self.path.resolve().name}-shm")):
            if beside.exists():
                make_file(beside)
        # Not a URL as text: there `?` and `%` in a path have a meaning. Errors go into logs and
        # rows, so they must not show the values in them, which are what people said.
        url = sa.URL.create("sqlite", database=str(self.path))
        engine = sa.create_engine(url, hide_parameters=True)

        @event.listens_for(engine, "connect")
        def _configure(connection: sqlite3.Connection, _: object) -> None:  # pyright: ignore[reportUnusedFunction]
            connection.isolation_level = None  # we send BEGIN ourselves
            for pragma in (
                f"busy_timeout={lock_wait_s * 1000:.0f}",
                "journal_mode=WAL",
                # In WAL mode NORMAL survives kill -9; only a power cut can lose the last commits.
                "synchronous=NORMAL",
                "foreign_keys=ON",
                # What is deleted is overwritten, also on pages that become free. Debian's default.
                "secure_delete=ON",
                f"cache_size=-{_CACHE_KIB}",  # negative: in KiB
                # A commit past this waits for the disk: the proxy calls `checkpoint` long before.
                f"wal_autocheckpoint={_MANY_PAGES}",
                # A log that begins anew shrinks: its size tells `checkpoint` what to do.
                "journal_size_limit=0",
            ):
                connection.execute(f"PRAGMA {pragma}").close()

        @event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:  # pyright: ignore[reportUnusedFunction]
            immediate = connection.get_execution_options().get("immediate", False)
            connection.exec_driver_sql(_BEGIN_WRITING if immediate else "BEGIN")

        return engine

    @contextmanager
    def cursor(self, connection: Any, dialect: sa.Dialect, write: bool) -> Generator[Cursor]:
        """A cursor of a driver's connection; in a transaction if it shall `write`."""
        with closing(connection.cursor()) as cursor:
            if write:
                cursor.execute(_BEGIN_WRITING)
            yield Cursor(cursor, dialect)
            if write:
                connection.commit()

    def insert(self, table: sa.Table) -> sqlite.Insert:
        """An INSERT that can have an ON CONFLICT clause."""
        return sqlite.insert(table)

    def now(self) -> float:
        """This machine's time: nobody else has the file."""
        return time.time()

    def describe(self, error: BaseException) -> str:
        """The whole message: SQLite quotes no values."""
        return str(error)

    def is_transient(self, error: BaseException) -> bool:
        """True for a lock, a full disk and the like."""
        if isinstance(error, sqlite3.Error):
            code = _code(error)
            moved = code == sqlite3.SQLITE_READONLY_DBMOVED  # the file was removed
            return code & 0xFF in _TRANSIENT_CODES and not moved
        return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS

    def is_damaged(self, error: BaseException) -> bool:
        """True if the file is not a whole database, or one of its tables is gone."""
        if not isinstance(error, sqlite3.Error):
            return False
        code = _code(error) & 0xFF
        gone = code == sqlite3.SQLITE_ERROR and str(error).startswith(_NO_TABLE)
        return gone or code in _DAMAGED_CODES

    def is_lost(self, connection: object) -> bool:
        """Never: there is nothing between us and the file."""
        return False

    def about(self) -> str:
        """Its library's version."""
        return f"SQLite {sqlite3.sqlite_version}"

    def numbered(self, connection: sa.Connection) -> None:
        """Nothing: a new number is always larger than the largest."""

    def wait_for_change(self, timeout_s: float) -> None:
        """Not at all: a look at the file costs as little as waiting."""

    def close(self, engine: sa.Engine) -> None:
        """Closes every connection that nobody has."""
        engine.dispose()

    def exclusive(self, name: str) -> AbstractContextManager[None]:
        """Nothing: a lock on a file does it."""
        return nullcontext()

    def checkpoint(self, engine: sa.Engine) -> None:
        """Moves the write-ahead log into the database once it has 4 MB; nobody waits for it."""
        if self._log.exists() and self._log.stat().st_size >= _LOG_BYTES:
            with engine.connect() as connection:
                connection.connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def sync(self) -> None:
        """Waits until what was committed is on the disk, also if the power is cut.

        What is not in the log any more was synced as it left it. The database itself must not be
        opened here: to close it would end the locks of this process, and then another process
        that closes it takes the log away while this one still writes to it.
        """
        with suppress(FileNotFoundError), self._log.open("rb") as file:
            os.fsync(file.fileno())

    def compact(self, connection: sa.Connection) -> None:
        """Rewrites the file without its free pages, and empties the write-ahead log."""
        cursor = connection.connection.cursor()
        cursor.execute("VACUUM")
        busy = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:  # somebody still reads what was there before
            error = sqlite3.OperationalError("its write-ahead log is in use")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error

    def used_bytes(self, engine: sa.Engine) -> tuple[int, int]:
        """The pages that are not free, and the write-ahead log."""
        with engine.connect() as connection:
            pages, free, size = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("page_count", "freelist_count", "page_size")
            )
        log = self._log.stat().st_size if self._log.exists() else 0
        return (pages - free) * size, log

    def take(self, connection: sa.Connection) -> None:
        """Keeps every other connection out, until this one is closed."""
        cursor = connection.connection.cursor()
        for statement in ("PRAGMA locking_mode=EXCLUSIVE", "BEGIN IMMEDIATE", "COMMIT"):
            cursor.execute(statement).fetchall()

    def damage(self, engine: sa.Engine) -> list[str]:
        """Broken pages and indexes, and rows that refer to rows that are not there."""
        with engine.connect() as connection:
            cursor = connection.connection.cursor()
            pages = [row[0] for row in cursor.execute("PRAGMA integrity_check(10)")]
            rows = cursor.execute("PRAGMA foreign_key_check").fetchmany(10)
        found = [] if pages == ["ok"] else [f"SQLite says: {page}" for page in pages]
        found += [
            f"row {row[1]} of {row[0]} refers to one of {row[2]} that is gone" for row in rows
        ]
        return found

    @property
    def _log(self) -> Path:
        """The write-ahead log. SQLite puts it beside the file that a link leads to."""
        file = self.path.resolve()
        return file.with_name(f"{file.name}-wal")


def database_file(url: str, folder: Path) -> Path:
    """The file that `[store] url` names; one in `folder` if it is empty. Raises StoreError."""
    if not url:
        return folder / FILE
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.drivername != "sqlite" or parsed.host:
        shown = url if parsed is None else str(parsed)  # without a password
        raise StoreError(
            f"[store] url = {shown!r}: expected sqlite:///PATH or postgresql://USER@HOST:PORT/NAME;"
            " empty the key to use [store] dir"
        )
    if parsed.query or parsed.database in (None, "", ":memory:"):
        raise StoreError(
            f"[store] url = {url!r} does not name a file: expected sqlite:///PATH without a `?`; "
            "a [store] dir may have any name"
        )
    return folder / parsed.database


def _require_whole_pages(path: Path) -> None:
    """Raises sqlite3.Error for a file that ends within a page: SQLite reads the rest as zeros."""
    with path.open("rb") as file:
        page = int.from_bytes(file.read(18)[16:])
    if page and path.stat().st_size % (page if page > 1 else 1 << 16):
        error = sqlite3.DatabaseError("its last page is cut")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _code(error: sqlite3.Error) -> int:
    """SQLite's own code, with details above its low byte; 0 where the driver made the error."""
    return getattr(error, "sqlite_errorcode", 0)
