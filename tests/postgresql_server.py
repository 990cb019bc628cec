"""A PostgreSQL of the tests' own: Debian's, on a free port, with a new database for each test."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nextstate.config import StoreConfig
from nextstate.engine.process import free_port
from nextstate.store import Store
from tests.certificates import Files

if TYPE_CHECKING:
    import psycopg

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
_AS_ROOT: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []}
"""It does not run as root."""
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "32MB",
    "max_connections": "200",
    "max_wal_size": "128MB",
    "dynamic_shared_memory_type": "mmap",  # in its folder, so that a killed one leaves nothing
    "fsync": "off",  # a killed server loses nothing by that, only a machine without power
}
_TEMPLATE = "nextstate_template"
_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 2 << 30


def missing() -> str | None:
    """Why there can be no PostgreSQL here; None if there can."""
    if not PROGRAMS:
        return "PostgreSQL is not installed: `make postgres` installs it"
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed: `make postgres` installs it"
    return None


def require_server() -> None:
    """Skips the test where there can be no PostgreSQL; in CI it fails."""
    if reason := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def needed(module: str) -> Any:
    """A module that needs psycopg: without it a file's tests are skipped, but not in CI."""
    return import_module(module) if os.environ.get("CI") else pytest.importorskip(module)


def _fast_folder() -> Path | None:
    """The file system in memory, if it has room: a database is made there in a tenth of the time.

    None for that of other temporary files.
    """
    is_there = os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM_BYTES
    return _MEMORY if is_there else None


def _copying() -> str:
    """How a database is copied: PostgreSQL 15 began to send each page through its log."""
    return "STRATEGY FILE_COPY" if int(PROGRAMS[-1].parts[-3]) >= 15 else ""


class Server:
    """A running server; everybody on this machine is its superuser."""

    def __init__(self, **settings: str) -> None:
        self.folder = Path(tempfile.mkdtemp("", "nextstate-postgresql-", _fast_folder()))
        self.data = self.folder / "data"
        self._as = _AS_ROOT if os.geteuid() == 0 else {}
        if self._as:
            shutil.chown(self.folder, "postgres", "postgres")
        self.port = free_port()
        self._settings = {**_SETTINGS, **settings}
        self._call(
            PROGRAMS[-1],
            *("-A", "trust", "-U", "postgres", "--encoding", "UTF8", "--no-sync"),
            *("--locale", "C.UTF-8", "-D", self.data),
        )
        self.has_template = False
        self._one_at_a_time = threading.Lock()
        self._own: psycopg.Connection[Any] | None = None
        self.start()

    def speak_tls(self, files: Files) -> None:
        """Encrypts new connections that ask for it, with copies of a certificate and its key."""
        for name, file in (("ssl_cert_file", files.certificate), ("ssl_key_file", files.key)):
            own = self.folder / file.name
            shutil.copy(file, own)
            own.chmod(0o600)
            shutil.chown(own, *self.owner)
            self.run(f"ALTER SYSTEM SET {name} = '{own}'")
        self.run("ALTER SYSTEM SET ssl = on")
        self.run("SELECT pg_reload_conf()")

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        import psycopg

        self._forget_connection()
        settings = {**self._settings, "port": self.port}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [PROGRAMS[-1].with_name("postgres"), "-D", self.data, *options],
                **{**self._as, "cwd": "/", "stdout": log, "stderr": log},
            )
        while True:
            assert self._process.poll() is None, (self.folder / "log").read_text()
            try:
                self.run("SELECT 1")
                return
            except psycopg.OperationalError:
                time.sleep(0.02)

    @property
    def owner(self) -> tuple[str, str]:
        """The user and the group that it runs as."""
        if self._as:
            return self._as["user"], self._as["group"]
        return self.folder.owner(), self.folder.group()

    def ended(self) -> bool:
        """Whether it has ended by itself; waits a moment for it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        return self._process.poll() is not None

    def kill(self) -> None:
        """Ends every process of it with SIGKILL, as the kernel does without memory."""
        main = self._process.pid
        self._process.send_signal(signal.SIGSTOP)  # so that it starts no other
        children = [*map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())]
        for process in (main, *children):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        while any(map(_lives, children)):
            time.sleep(0.01)

    def restart(self) -> None:
        """Ends it as its service does, and starts it again."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        self.start()

    def close(self) -> None:
        """Ends it at once and removes its files."""
        self._forget_connection()
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, name: str) -> str:
        """The URL of a database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def database(self, name: str) -> str:
        """The URL of a database that is made from the template if it is not there yet."""
        import psycopg

        if not self.has_template:
            self._make(_TEMPLATE, "template0")
            Store(StoreConfig(dir=tempfile.mkdtemp(), url=self.url(_TEMPLATE))).close()
            self.has_template = True
        with suppress(psycopg.errors.DuplicateDatabase):
            self._make(name, _TEMPLATE)
        return self.url(name)

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        """Runs a statement in the database `postgres`, over one connection: each costs 8 ms."""
        import psycopg

        with self._one_at_a_time:
            if self._own is None or self._own.closed:
                self._own = psycopg.connect(self.url("postgres"), autocommit=True)
            cursor = self._own.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _forget_connection(self) -> None:
        if self._own is not None:
            self._own.close()
        self._own = None

    def _make(self, name: str, template: str) -> None:
        self.run(f"CREATE DATABASE {name} TEMPLATE {template} {_copying()}")

    def _call(self, *command: str | Path) -> None:
        done = subprocess.run(
            command, cwd="/", capture_output=True, text=True, timeout=120, **self._as
        )
        assert done.returncode == 0, done.stdout + done.stderr


def _lives(process: int) -> bool:
    """False once it has ended, also if nobody has asked yet how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


_chosen: list[Server] = []


def url_of(folder: Path) -> str:
    """The URL of the database of a store in this folder; "" outside of `instead_of_files`."""
    name = "t" + hashlib.sha256(str(folder).encode()).hexdigest()[:30]
    return _chosen[-1].database(name) if _chosen else ""


def dropped() -> AbstractContextManager[None]:
    """As `instead_of_files` around it, if there is one: what is made inside is gone afterwards."""
    return instead_of_files(_chosen[-1]) if _chosen else nullcontext()


@contextmanager
def instead_of_files(server: Server) -> Iterator[None]:
    """Inside, a store whose folder is named without a URL is in a database of its own there."""
    opened, made, stores = Store.__init__, set[str](), list[Store]()

    def open_there(self: Store, config: StoreConfig, *args: Any, **kwargs: Any) -> None:
        if not config.url:
            config = replace(config, url=url_of(config.path))
            made.add(config.url.rpartition("/")[2])
        opened(self, config, *args, **kwargs)
        stores.append(self)

    _chosen.append(server)

    patch = pytest.MonkeyPatch()
    patch.setattr(Store, "__init__", open_there)
    try:
        yield
    finally:
        patch.undo()
        _chosen.remove(server)
        for store in stores:  # an open connection that nobody closes is an error
            store.close()
        for name in made:
            server.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
