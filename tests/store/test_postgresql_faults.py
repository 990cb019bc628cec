"""A PostgreSQL whose disk is full, that is reached by TLS, or behind a pooler."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nextstate.app.doctor import checks
from nextstate.config import StoreConfig
from nextstate.engine.process import free_port
from nextstate.errors import WaitError
from nextstate.store import Store
from nextstate.store.waiting import Patience
from tests.certificates import certificate
from tests.postgresql_server import Server, needed, require_server
from tests.store.test_records import add, turn

psycopg = needed("psycopg")
pytestmark = [
    pytest.mark.sqlite,  # it brings its own server
    pytest.mark.usefixtures("has_server"),
]
POOLER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.fixture
def has_server() -> None:
    require_server()


@contextmanager
def server(**settings: str) -> Generator[Server]:
    found = Server(**settings)
    try:
        yield found
    finally:
        found.close()


def fill(store: Store, kept: list[str]) -> None:
    """Records large turns without an end."""
    while True:
        number = len(kept)
        add(store, turn(number, client_model=os.urandom(200_000).hex()))
        kept.append(f"turn_{number}")


def test_a_full_disk_is_waited_for_and_loses_nothing_that_was_acknowledged(
    tmp_path: Path,
) -> None:
    """PostgreSQL ends itself when its log has no room, and comes back when there is some."""
    if os.geteuid():
        pytest.skip("to make a small disk needs root")
    with server(wal_recycle="off", max_wal_size="32MB") as found:
        config = StoreConfig(str(tmp_path), found.database("cramped"))
        found.kill()
        small = found.folder / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "none", small], check=True)
        try:
            subprocess.run(["cp", "-a", found.folder / "data", small / "data"], check=True)
            found.data = small / "data"
            found.start()
            store = Store(config, patience=Patience(60.0, pause_s=0.02))
            kept: list[str] = []
            with pytest.raises(WaitError):
                fill(store, kept)
            assert len(kept) > 20
            subprocess.run(["mount", "-o", "remount,size=400m", small], check=True)
            if found.ended():
                found.start()
            number = len(kept)
            while True:  # as the writer does: whether the last one was kept is asked first
                try:
                    if f"turn_{number}" not in store.turns.ids():
                        add(store, turn(number))
                    break
                except WaitError:
                    time.sleep(0.02)
            assert store.turns.ids() == [*kept, f"turn_{number}"]
            assert store.verifying.problems(lambda *_: None) == []
            store.close()
            found.kill()
        finally:
            subprocess.run(["umount", "-l", small], check=True)


def doctors(folder: Path, url: str) -> str:
    """What `nextstate doctor` says of the store."""
    file = folder / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{folder}/state"\nurl = "{url}"\n')
    found = next(check for check in checks(file) if check.name == "state folder")
    return found.problem or found.found


def test_doctor_says_that_the_link_is_encrypted_and_whose_certificate_is_wrong(
    tmp_path: Path,
) -> None:
    files = certificate(tmp_path, "localhost")
    other = tmp_path / "other"
    other.mkdir()
    foreign = certificate(other, "localhost").certificate
    with server() as found:
        found.speak_tls(files)
        url = found.database("secret").replace("127.0.0.1", "localhost")

        def asked(ca: Path, url: str = url) -> str:
            return doctors(tmp_path, f"{url}?sslmode=verify-full&sslrootcert={ca}")

        assert asked(files.certificate).endswith(", TLS")
        assert "sslmode=require does not see whose" in doctors(tmp_path, f"{url}?sslmode=require")
        assert "certificate verify failed" in asked(foreign)
        by_number = url.replace("localhost", "127.0.0.1")
        assert "does not match host name" in asked(files.certificate, by_number)
        assert "does not exist" in asked(tmp_path / "none.pem")


@contextmanager
def pooler(found: Server, folder: Path, mode: str) -> Generator[str]:
    """The address of a PgBouncer before a server."""
    assert POOLER is not None
    port = free_port()
    (folder / "users").write_text('"postgres" ""\n')
    config = folder / f"{mode}.ini"
    config.write_text(
        f"[databases]\n* = host=127.0.0.1 port={found.port}\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = trust\n"
        f"auth_file = {folder}/users\npool_mode = {mode}\n"
        "ignore_startup_parameters = options,extra_float_digits\n"
    )
    command = [POOLER, *(["-u", found.owner[0]] if os.geteuid() == 0 else []), str(config)]
    folder.chmod(0o755)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres").close()
                break
            except psycopg.OperationalError:
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(POOLER is None, reason="pgbouncer is not installed")
@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_doctor_refuses_a_pooler_that_gives_a_connection_away_between_transactions(
    tmp_path: Path, mode: str
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="nextstate-pooler-"))
    with server() as found, pooler(found, folder, mode) as address:
        direct = found.database("pooled")
        through = direct.replace(f"127.0.0.1:{found.port}", address)
        said = doctors(tmp_path, through)
        if mode == "session":
            assert "through a pooler that gives each connection a session" in said
        else:
            assert "pool_mode = session" in said
    shutil.rmtree(folder)
