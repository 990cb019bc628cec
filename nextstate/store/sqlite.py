"""What only SQLite needs: pragmas, transaction modes and what its errors mean."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError

from nextstate.errors import StoreError
from nextstate.private_files import make_file, make_folder

BUSY_TIMEOUT_MS = 1_000
"""How long SQLite itself waits for a lock: whoever waits longer looks meanwhile whether to stop."""
_CACHE_KIB = 8192
"""Of one connection: room for the indexes' upper pages, and what a writer's memory grows by."""
_BEGIN_WRITING = "BEGIN IMMEDIATE"
_MANY_PAGES, _LOG_BYTES = 16_384, 4 << 20


_PASSING_CODES = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,  # a quota, a limit on the size of files, a network's disk
        sqlite3.SQLITE_READONLY,  # how Linux mounts a disk again that had an error
        sqlite3.SQLITE_CANTOPEN,  # too many open files
    }
)
_PASSING_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
)
_DAMAGED_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def file_of(url: str, folder: Path) -> Path:
    """The database that `[store] url` names; one in `folder` if it is empty. Raises StoreError."""
    if not url:
        return folder / "nextstate.sqlite3"
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.drivername != "sqlite" or parsed.host:
        raise StoreError(
            f"[store] url = {url!r}: only sqlite:///PATH is supported so far; "
            "empty the key to use [store] dir"
        )
    if parsed.query or parsed.database in (None, "", ":memory:"):
        raise StoreError(
            f"[store] url = {url!r} does not name a file: expected sqlite:///PATH without a `?`; "
            "a [store] dir may have any name"
        )
    return folder / parsed.database


def open_file(path: Path) -> sa.Engine:
    """An engine on the SQLite file `path`, which only its owner may read.

    Write transactions take the lock when they begin (`immediate` execution option): two processes
    that read first and write later would otherwise fail with "database is locked".
    """
    make_folder(path.parent)
    make_file(path)
    log = _log_of(path)
    if log.exists() and log.stat().st_size and not path.stat().st_size:
        raise StoreError(
            f"{path} is empty, but {log.name} beside it is not, and would be lost: put the "
            "database back, or move both away"
        )
    for beside in (log, path.with_name(f"{path.name}-shm")):
        if beside.exists():
            make_file(beside)
    # Not a URL as text: it would give `?` and `%` in a path a meaning. Its errors go into logs and
    # rows, and the values in them are what people said.
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _: object) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.isolation_level = None  # we send BEGIN ourselves
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        # In WAL mode NORMAL survives kill -9; only a power cut can lose the newest commits.
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")  # negative: in KiB
        # Whoever commits past this waits for the disk: the proxy calls `checkpoint` long before.
        cursor.execute(f"PRAGMA wal_autocheckpoint={_MANY_PAGES}")
        # Begun anew, the log gives its space back: its size is what `checkpoint` goes by.
        cursor.execute("PRAGMA journal_size_limit=0")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql(_BEGIN_WRITING if immediate else "BEGIN")

    return engine


def begin_writing(cursor: Any) -> None:
    """Begins a write transaction on the driver's own cursor."""
    cursor.execute(_BEGIN_WRITING)


def is_passing(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, may be gone in a while: a lock, a full disk."""
    while error is not None:
        if isinstance(error, sqlite3.Error):
            code = _code(error)
            moved = code == sqlite3.SQLITE_READONLY_DBMOVED  # the file has been removed
            return code & 0xFF in _PASSING_CODES and not moved
        if isinstance(error, OSError):
            return error.errno in _PASSING_ERRNOS
        error = error.__cause__
    return False


def is_damaged(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that the file is no whole database."""
    while error is not None:
        if isinstance(error, sqlite3.Error):
            return _code(error) & 0xFF in _DAMAGED_CODES
        error = error.__cause__
    return False


def _code(error: sqlite3.Error) -> int:
    """SQLite's own code, with details above its low byte; 0 where the driver made the error."""
    return getattr(error, "sqlite_errorcode", 0)


def _log_of(path: Path) -> Path:
    """The write-ahead log of a database."""
    return path.with_name(f"{path.name}-wal")


def checkpoint(engine: sa.Engine, path: Path) -> None:
    """Moves the write-ahead log into the database once it has 4 MB; nobody waits for it."""
    log = _log_of(path)
    if log.exists() and log.stat().st_size >= _LOG_BYTES:
        with engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
