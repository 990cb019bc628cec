"""What is kept is for its owner only, wherever it lies and whoever made it first."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from nextstate import private_files as private
from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.config import StoreConfig
from nextstate.errors import ConfigError, NextStateError, StoreError
from nextstate.private_files import make_folder, make_state_folder, replace_file, secret_of
from nextstate.store import Store
from tests.store.test_records import add, turn

pytestmark = pytest.mark.sqlite


@pytest.fixture(autouse=True)
def usual_umask() -> Generator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def below(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


def test_every_folder_that_is_made_on_the_way_is_private(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b" / "c")
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o700] * 3
    tmp_path.chmod(0o755)
    make_folder(tmp_path / "a")
    assert mode(tmp_path) == 0o755  # not ours


def test_a_file_is_replaced_as_a_whole_and_is_private(tmp_path: Path) -> None:
    file = tmp_path / "proxy.key"
    file.write_text("old")
    with file.open() as opened:
        replace_file(file, "new")
        assert opened.read() == "old"
    assert ([*tmp_path.iterdir()], file.read_text(), mode(file)) == ([file], "new", 0o600)


def test_a_stack_makes_its_state_folder_private(tmp_path: Path) -> None:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/new/state"\n')
    Stack(Settings.read(file))
    assert {mode(path) for path in below(tmp_path / "new")} == {0o700}


NAMES = [
    "what?now",
    "a%2Fb",
    "hash#1",
    "two words",
    'it\'s "quoted"',
    "čaj 茶",
    "a&b=c;d",
    "%",
    ":",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_state_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    store = Store(StoreConfig(dir=str(folder)))
    add(store, turn(0))
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert mode(folder) == 0o700
    assert "nextstate.sqlite3" in os.listdir(folder)
    assert {mode(path) for path in folder.iterdir()} == {0o600}
    again = Store(StoreConfig(dir=str(folder)))
    assert again.turns.ids() == ["turn_0"]
    again.close()


def test_a_state_folder_may_be_relative_below_home_or_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to("real")
    for name, place in (("rel?", "rel?"), ("~/home", "home"), ("link", "real")):
        Store(StoreConfig(dir=name)).close()
        assert mode(tmp_path / place) == 0o700
        assert mode(tmp_path / place / "nextstate.sqlite3") == 0o600


def test_a_secret_is_private_from_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.umask(0)
    modes: list[int] = []
    link = os.link

    def linked(made: Path, file: Path) -> None:
        modes.append(mode(made))
        link(made, file)

    monkeypatch.setattr(os, "link", linked)
    assert len(secret_of(tmp_path / "secret")) == 32
    assert modes == [0o600]
    assert [mode(path) for path in tmp_path.iterdir()] == [0o600]


@pytest.mark.parametrize("entry", ["nextstate", "proxy.writer"])
def test_a_process_makes_private_files_under_any_umask(tmp_path: Path, entry: str) -> None:
    """A command, and the writer, which is none; and so do the processes that they start."""
    command = (
        "import os, runpy, signal, subprocess, sys\n"
        "os.umask(0)\n"
        "sys.argv = ['x', 'turns', '--config', 'none.toml']\n"
        "try:\n"
        f"    runpy.run_module({entry!r}, run_name='__main__')\n"
        "except BaseException:\n"  # there is no such file, and nobody writes to the writer
        "    pass\n"
        "open('own', 'w').close()\n"
        "os.mkdir('folder')\n"
        "subprocess.run(['touch', 'child'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = {name: mode(tmp_path / name) for name in ("own", "folder", "child")}
    assert found == {"own": 0o600, "folder": 0o700, "child": 0o600}


def test_the_folder_of_a_store_on_a_server_that_was_open_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    for name in ("versions/main/v000001-e2", "learner/main", "logs"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o750)
    make_state_folder(folder)
    assert {mode(path) for path in below(folder)} == {0o700}


def test_what_an_earlier_program_left_open_is_closed_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state"
    store = Store(StoreConfig(dir=str(folder)))
    add(store, turn(0))
    (folder / "logs").mkdir(mode=0o755)
    (folder / "logs" / "proxy.log").touch(0o644)
    outside = tmp_path / "outside"
    outside.touch(0o644)
    (folder / "link").symlink_to(outside)
    for path in (folder / "nextstate.sqlite3", folder / "nextstate.sqlite3-wal"):
        path.chmod(0o664)
    folder.chmod(0o755)
    again = Store(StoreConfig(dir=str(folder)))
    assert {mode(p) for p in below(folder) if not p.is_symlink()} == {0o700, 0o600}
    assert mode(outside) == 0o644
    assert f"{folder} was open to others (mode 755) and is closed" in caplog.text
    assert again.turns.ids() == ["turn_0"]
    (folder / "nextstate.sqlite3").chmod(0o640)
    Store(StoreConfig(dir=str(folder))).close()
    assert mode(folder / "nextstate.sqlite3") == 0o600
    store.close()
    again.close()


@pytest.mark.parametrize("exists", [True, False])
def test_a_database_behind_a_link_is_private_where_it_lies(tmp_path: Path, exists: bool) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "state"
    disk.mkdir()
    folder.mkdir()
    (folder / "nextstate.sqlite3").symlink_to(disk / "big.db")
    if exists:
        (disk / "big.db").touch(0o644)
        (disk / "big.db-wal").touch(0o644)
    store = Store(StoreConfig(dir=str(folder)))
    add(store, turn(0))
    assert {mode(path) for path in disk.iterdir()} == {0o600}
    assert {path.name for path in disk.iterdir()} >= {"big.db", "big.db-wal"}
    store.close()


def test_a_log_behind_a_link_is_not_lost_with_an_emptied_database(tmp_path: Path) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "state"
    disk.mkdir()
    folder.mkdir()
    (folder / "nextstate.sqlite3").symlink_to(disk / "big.db")
    (disk / "big.db-wal").write_bytes(b"what people said")
    with pytest.raises(StoreError, match=r"big\.db-wal beside it is not, and would be lost"):
        Store(StoreConfig(dir=str(folder)))


@pytest.mark.parametrize("open_mode", [0o755, 0o1777])
def test_a_folder_with_other_things_in_it_is_not_ours_to_close(
    tmp_path: Path, open_mode: int
) -> None:
    (tmp_path / "thesis.txt").touch(0o644)
    tmp_path.chmod(open_mode)
    with pytest.raises(StoreError, match=r"holds other things: name .*/nextstate'"):
        Store(StoreConfig(dir=str(tmp_path)))
    assert (mode(tmp_path), mode(tmp_path / "thesis.txt")) == (open_mode, 0o644)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private.os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(StoreError, match="belongs to user"):
        make_state_folder(tmp_path)


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "~nobody-of-this-name/x"])
def test_what_names_no_folder_names_the_key(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\[store\] dir"):
        Store(StoreConfig(dir=name))


@pytest.mark.parametrize(
    "url",
    [
        "mysql://localhost/x",
        "nonsense",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///a?b=c",
        "sqlite://host/a",
    ],
)
def test_a_url_that_names_no_file_names_the_key(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match=r"\[store\] url"):
        Store(StoreConfig(dir=str(tmp_path), url=url))
    assert not list(tmp_path.iterdir())


def test_the_password_in_a_refused_url_is_not_shown(tmp_path: Path) -> None:
    url = "mysql://ada:hunter2@db.example/store"
    with pytest.raises(StoreError, match="expected sqlite:///PATH or postgresql:") as refused:
        Store(StoreConfig(dir=str(tmp_path), url=url))
    assert "hunter2" not in str(refused.value)


def test_a_url_may_name_a_file_elsewhere_or_in_the_folder(tmp_path: Path) -> None:
    for url, place in (("my%20own.db", "state/my own.db"), (f"/{tmp_path}/x y", "x y")):
        Store(StoreConfig(dir=str(tmp_path / "state"), url=f"sqlite:///{url}")).close()
        assert mode(tmp_path / place) == 0o600


DAMAGES = {
    "no database": lambda data: b"this is my diary, not a database" * 200,  # pyright: ignore[reportUnknownLambdaType]
    "cut off": lambda data: data[: len(data) // 3 + 100],  # pyright: ignore
    "cut in its last page": lambda data: data[:-100],  # pyright: ignore
    "without its last page": lambda data: data[:-4096],  # pyright: ignore
    "holes": lambda data: data[:100] + bytes(8000) + data[8100:],  # pyright: ignore
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_named_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    add(store, *(turn(number, reply={"content": os.urandom(9000).hex()}) for number in range(9)))
    store.close()
    file = tmp_path / "state" / "nextstate.sqlite3"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    before = file.read_bytes()
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    for command in ("status", "turns", "doctor"):
        assert main([command, "--config", str(config)]) == 2
        assert f"{file} is no whole SQLite database" in "".join(capsys.readouterr())
        assert file.read_bytes() == before


def test_another_programs_database_and_a_broken_schema_are_refused(tmp_path: Path) -> None:
    import sqlite3

    for statements, expected in (
        ("CREATE TABLE bookmarks (x)", "of another program, with the tables bookmarks"),
        ("CREATE TABLE schema_version (version); CREATE TABLE turns (x)", r"version is \[\]"),
        (
            "CREATE TABLE schema_version (version); CREATE TABLE turns (x);"
            "INSERT INTO schema_version VALUES ('six')",
            "expected one number",
        ),
    ):
        file = tmp_path / "nextstate.sqlite3"
        file.unlink(missing_ok=True)
        with sqlite3.connect(file) as connection:
            connection.executescript(statements)
        connection.close()
        with pytest.raises(NextStateError, match=rf"nextstate.sqlite3: .*{expected}"):
            Store(StoreConfig(dir=str(tmp_path)))


def test_an_emptied_database_does_not_take_its_log_with_it(tmp_path: Path) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    add(store, turn(0))
    log = (tmp_path / "nextstate.sqlite3-wal").read_bytes()
    store.close()
    (tmp_path / "nextstate.sqlite3-wal").write_bytes(log)
    (tmp_path / "nextstate.sqlite3").write_bytes(b"")
    with pytest.raises(StoreError, match="would be lost"):
        Store(StoreConfig(dir=str(tmp_path)))
    assert (tmp_path / "nextstate.sqlite3-wal").read_bytes() == log


def _without(file: Path, *statements: str) -> None:
    import sqlite3

    with closing(sqlite3.connect(file)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    ("dropped", "named"),
    [
        (("turns",), "no table turns"),
        (("verdicts",), "no table verdicts"),
        (("schema_version",), "no table schema_version"),
        (("turns", "schema_version", "samples"), "no table samples, schema_version, turns"),
        (("counts",), "no table counts"),
    ],
    ids=["turns", "verdicts", "version", "three", "counts"],
)
def test_every_command_names_the_file_of_a_store_without_one_of_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dropped: tuple[str, ...], named: str
) -> None:
    """As a dump leaves it that was read in only in part."""
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    add(store, turn(0))
    store.close()
    file = tmp_path / "state" / "nextstate.sqlite3"
    _without(file, *(f"DROP TABLE {table}" for table in dropped))
    before = file.read_bytes()
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    commands = (
        *("status", "turns", "doctor", "sessions", "versions", "verify", "ledger", "keys list"),
        *("episodes", "review", "pause", "resume", "forget x --yes", "retain --days 9"),
        *(f"export sft --out {tmp_path}/x.jsonl", f"encrypt --key-file {tmp_path}/key"),
    )
    for command in commands:
        assert main([*command.split(), "--config", str(config)]) == 2, command
        said = "".join(capsys.readouterr())
        assert f"{file} is no whole SQLite database: it has {named}; " in said, command
        assert "put a whole copy in its place, or move it away" in said, command
        assert file.read_bytes() == before


def test_a_table_that_goes_while_the_store_is_open_is_named_too(tmp_path: Path) -> None:
    with closing(Store(StoreConfig(dir=str(tmp_path)))) as store:
        add(store, turn(0))
        file = tmp_path / "nextstate.sqlite3"
        _without(file, "DROP TABLE turns")
        with pytest.raises(StoreError, match=r"is no whole SQLite database: no such table: turns"):
            store.turns.ids()
