"""What the command line prints and reads, on terminals and from files of every kind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.config import StoreConfig
from nextstate.errors import ConfigError
from nextstate.records import Feedback
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.store.test_records import add, judge, turn

ESC = "\x1b]0;title\x07\u202e"
SAID = "né → 谢谢 🙂\x1b[2J\nnext"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    store = Store(StoreConfig(dir=str(folder / "state")))
    add(store, *(turn(number, session=f"s→{number}") for number in range(400)), next_state=SAID)
    hostile = {"role": "user", "content": SAID}, {"role": "assistant", "content": SAID}
    add(store, turn(400, request={"messages": [hostile[0]]}, reply=hostile[1], session=f"s{ESC}"))
    judge(store, 0, -1, hint="Sé breve → 短.")
    store.reviewing.give(Feedback("turn_0", -1, comment="nö →"), OWNER)
    store.close()
    file = folder / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{folder}/state"\n')
    return file


def command(*arguments: str, encoding: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    argv = [sys.executable, "-P", "-m", "nextstate", *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_unicode_gets_escapes_and_valid_json(
    config: Path, encoding: str
) -> None:
    given = ("--config", str(config))
    shown = [
        ["status"],
        ["turns"],
        ["versions", "0"],
        ["feedback", "tüřn", "--score", "1"],
        ["turns", "--json"],
    ]
    code = f"""
import sys
from nextstate.__main__ import main
for arguments in {[[*one, *given] for one in shown]!r}:
    sys.argv = ["nextstate", *arguments]
    print(main())
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    argv = [sys.executable, "-P", "-c", code]
    done = subprocess.run(argv, capture_output=True, env=environment)
    assert b"Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    codes = [line for line in lines if line in (b"0", b"2")]
    assert (done.returncode, codes) == (0, [b"0", b"0", b"0", b"2", b"0"])
    rows = [json.loads(line.decode("ascii")) for line in lines if line.startswith(b'{"turn"')]
    assert rows[0]["next_state"][0]["text"] == SAID
    assert rows[7]["session"] == "s→7"


def test_recorded_control_characters_do_not_reach_the_terminal(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    for arguments in (["--limit", "1"], ["turn_399"], ["turn_400"]):
        assert main(["turns", *arguments, "--config", str(config)]) == 0
        shown.append(capsys.readouterr().out)
    lines = "".join(shown).splitlines()
    assert [line for line in lines if not line.isprintable()] == []
    assert lines[0] == "turn_400  v0  ·  person: né → 谢谢 🙂 next  →  né → 谢谢 🙂 next"
    assert [line for line in lines if line == "  né → 谢谢 🙂"] != []


def test_a_reader_that_closes_the_pipe_causes_no_error(config: Path) -> None:
    for arguments in (["turns", "--json"], ["status"]):
        process = command(*arguments, "--config", str(config), encoding="utf-8")
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, b"")


def test_a_full_disk_under_the_output_is_a_message(config: Path) -> None:
    argv = [sys.executable, "-P", "-m", "nextstate", "turns", "--config", str(config)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE)
    assert b"Traceback" not in done.stderr
    assert b"nextstate: [Errno 28]" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf[proxy]\nport = 4321\n",
        b"[proxy]\r\nport = 4321\r\n",
        b"\xef\xbb\xbf[proxy]\r\nport = 4321",
    ],
)
def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(data)
    assert Settings.read(file).proxy.port == 4321


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("[proxy]\nport = 1\n".encode("utf-16"), "UTF-16 or UTF-32; save it as UTF-8"),
        ("[proxy]\nport = 1\n".encode("utf-16-le"), "UTF-16 or UTF-32"),
        ("[proxy]\nport = 1\n".encode("utf-32"), "UTF-16 or UTF-32"),
        ("[proxy]\n# Größe\n".encode("latin-1"), "line 2 has the byte 0xf6; save it as UTF-8"),
        (b"[proxy]\nport = " + b"[" * 100_000, "nested too deep"),
        (b"[proxy]\nport = " + b"1" * 5000, "Exceeds the limit"),
        (b"[proxy\n", "not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_read_says_what_to_do(
    tmp_path: Path, data: bytes, expected: str
) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=expected) as found:
        Settings.read(file)
    assert str(file) in str(found.value)


def test_a_folder_instead_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        Settings.read(tmp_path)
    with pytest.raises(ConfigError, match="there is no file"):
        Settings.read(tmp_path / "none.toml")


@pytest.mark.parametrize("module", ["orjson", "sqlalchemy", "nextstate.app.views"])
def test_ctrl_c_ends_a_command_without_a_traceback_even_while_it_imports(
    config: Path, module: str
) -> None:
    code = f"""
import runpy, sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
sys.argv = ["nextstate", "versions", "--config", {str(config)!r}]
runpy.run_module("nextstate", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize(
    ("number", "code", "remedy"),
    [
        (errno.EACCES, 2, "give yourself access to it"),
        (errno.EPERM, 2, "give yourself access to it"),
        (errno.ENOSPC, os.EX_TEMPFAIL, "make room there"),
        (errno.EDQUOT, os.EX_TEMPFAIL, "make room there"),
    ],
)
def test_a_system_error_is_one_line_with_the_file_and_the_remedy(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
    remedy: str,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr("nextstate.store.Store", refuse)
    assert main(["turns", "--config", str(config)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nextstate: [Errno")
    assert "'/some/file'; " + remedy in line


@pytest.mark.parametrize(
    "given",
    [
        ["feedback", "caf\udce9", "--score", "1"],
        ["feedback", "--session", "caf\udce9", "--score", "1"],
        ["feedback", "turn_0", "--score", "1", "--hint", "caf\udce9"],
        ["versions", "--lineage", "caf\udce9"],
        ["versions", "0", "--lineage", "caf\udce9"],
        ["rollback", "0", "--lineage", "caf\udce9"],
        ["resume", "--lineage", "caf\udce9"],
    ],
)
def test_an_argument_in_another_encoding_is_a_message(
    config: Path, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    """ "café" in Latin-1, as Python passes it on where UTF-8 is expected."""
    assert main([*given, "--config", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nextstate: ")


@pytest.mark.parametrize("given", ["-1", "9" * 30, "1e3", "", "٣"])
def test_an_invalid_number_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    for arguments in (["turns", f"--limit={given}"], ["demo", f"--updates={given}"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "is not a number from 0 to" in capsys.readouterr().err
    assert main(["turns", "--limit", "3", "--config", str(config)]) == 0


def test_a_folder_that_cannot_hold_a_demo_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "thesis.txt"
    file.touch()
    for out in (file, file / "below", tmp_path / ("n" * 300)):
        assert main(["demo", "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"nextstate: --out {str(out)!r} cannot hold a demo: ")
