"""What only SQLite needs: pragmas, transaction modes and file permissions."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

BUSY_TIMEOUT_MS = 10_000
_CACHE_KIB = 8192
"""Of one connection: room for the indexes' upper pages, and what a writer's memory grows by."""
_BEGIN_WRITING = "BEGIN IMMEDIATE"
_MANY_PAGES, _LOG_BYTES = 16_384, 4 << 20


def open_file(path: Path) -> sa.Engine:
    """An engine on the SQLite file `path`, made with mode 0600 in a folder of mode 0700.

    Write transactions take the lock when they begin (`immediate` execution option): two processes
    that read first and write later would otherwise fail with "database is locked".
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600, exist_ok=True)
    # Its errors go into logs and rows: the values in them are what people said.
    engine = sa.create_engine(f"sqlite:///{path}", hide_parameters=True)

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


def is_busy(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that another connection holds the database."""
    while error is not None:
        if isinstance(error, sqlite3.OperationalError):
            code: int = getattr(error, "sqlite_errorcode", 0)  # with details above its low byte
            return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        error = error.__cause__
    return False


def checkpoint(engine: sa.Engine, path: Path) -> None:
    """Moves the write-ahead log into the database once it has 4 MB; nobody waits for it."""
    log = path.with_name(path.name + "-wal")
    if log.exists() and log.stat().st_size >= _LOG_BYTES:
        with engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
