"""Log files stay short while processes write to them, and only their end is read."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.log_files import Follower, last_lines, rotate, tail
from nextstate.app.supervisor import Child, Supervisor, Timing
from tests.app.test_supervisor import until

WRITES = """
for number in range(10**9):
    print(f"line {number:09d}", flush=True)
"""


def test_a_long_log_is_moved_and_its_writer_continues(tmp_path: Path) -> None:
    file = tmp_path / "part.log"
    with file.open("ab", buffering=0) as writer:  # as the supervisor opens it
        for turn in range(6):
            writer.write(b"%d" % turn * 100)
            assert rotate(file, 99)
            assert not rotate(file, 99)
        writer.write(b"last")
    kept = {path.name: path.read_bytes()[:1] for path in tmp_path.iterdir()}
    assert kept == {"part.log": b"l", "part.log.1": b"5", "part.log.2": b"4", "part.log.3": b"3"}


def test_no_line_is_lost_that_was_written_between_two_looks_or_while_a_log_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "part.log"
    move = Path.replace

    def moved_while_written(path: Path, target: Path) -> Path:
        with file.open("ab") as writer:
            writer.write(b"meanwhile\n")
        return move(path, target)

    monkeypatch.setattr(Path, "replace", moved_while_written)
    for _ in range(2):
        written = b"".join(b"line %d\n" % number for number in range(20))
        file.write_bytes(written)
        assert rotate(file, len(written) // 2 + 1)
        kept = (tmp_path / "part.log.1").read_bytes()
        assert kept.removesuffix(b"meanwhile\n") in (written, written + b"meanwhile\n")
        assert kept.endswith(b"meanwhile\n")
        assert file.read_bytes() == b""


def test_of_a_log_that_grows_too_fast_the_newest_whole_lines_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "part.log"
    file.write_bytes(b"old\n" * 1000 + b"a longer one\n" + b"new\n" * 14)
    assert rotate(file, 30)
    assert (tmp_path / "part.log.1").read_bytes() == b"new\n" * 14
    assert not rotate(tmp_path / "none.log", 30)


def test_a_log_is_truncated_even_without_room_for_a_copy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "part.log"
    file.write_bytes(b"x" * 100)
    (tmp_path / "part.log.draft").symlink_to("/dev/full")
    assert rotate(file, 50)
    assert file.stat().st_size == 0
    assert [path.name for path in tmp_path.iterdir()] == ["part.log"]
    assert "no copy could be made: [Errno 28]" in caplog.text


def test_the_tail_of_a_long_log_is_short(tmp_path: Path) -> None:
    file = tmp_path / "part.log"
    file.write_bytes(b"earlier\n" + b"x" * (5 << 20) + b"\nlast words")
    assert tail(file).endswith("last words")
    assert len(tail(file)) <= 256 << 10
    assert tail(file, file.stat().st_size - 5) == "words"
    assert tail(file, 10**9).endswith("last words")  # rotated meanwhile


def test_a_child_that_writes_without_end_fills_no_disk(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "part.log"

    async def run() -> None:
        child = Child("part", [sys.executable, "-c", WRITES], file)
        timing = Timing(rotate_s=0.01, max_log_bytes=50_000)
        keeper = Supervisor([child], timing=timing)
        running = asyncio.create_task(keeper.run())
        await until((tmp_path / "logs" / "part.log.3").exists)
        keeper.stopping.set()
        await running

    asyncio.run(run())
    names = [f"part.log.{number}" for number in (3, 2, 1)]
    assert sorted(os.listdir(file.parent)) == ["part.log", *sorted(names)]
    assert all((file.parent / name).stat().st_size <= 3 * 50_000 for name in names)
    kept = b"".join((file.parent / name).read_bytes() for name in names).split(b"\n")
    numbers = [int(line[5:]) for line in kept[1:-1] if len(line) == 14]
    assert numbers == sorted(numbers)


def write(file: Path, text: str) -> None:
    with file.open("a") as writer:
        writer.write(text)


def move(file: Path) -> None:
    """Rotates a log with every line that it has."""
    assert rotate(file, file.stat().st_size - 1)


def test_the_newest_lines_come_from_a_log_and_its_older_copies(tmp_path: Path) -> None:
    file = tmp_path / "part.log"
    for number in range(6):
        write(file, f"line {number}\n")
        if number % 2:
            move(file)
    write(file, "line 6\nhalf")
    assert last_lines(file, 2) == ["line 6", "half"]
    assert last_lines(file, 5) == ["line 3", "line 4", "line 5", "line 6", "half"]
    assert len(last_lines(file, 100)) == 8
    assert last_lines(file, 0) == last_lines(tmp_path / "none.log", 3) == []


def test_a_follower_misses_no_line_of_a_log_that_is_rotated(tmp_path: Path) -> None:
    file = tmp_path / "part.log"
    write(file, "old\n")
    follower = Follower(file)
    assert follower.lines() == []
    write(file, "first\nsec")
    assert follower.lines() == ["first"]
    write(file, "ond\nthird\n")
    move(file)
    write(file, "a line that is longer than everything before the rotation\n")
    assert follower.lines() == [
        *("second", "third", "a line that is longer than everything before the rotation")
    ]
    move(file)
    assert follower.lines() == []
    write(file, "last\n")
    assert follower.lines() == ["last"]


def test_a_follower_waits_for_a_log_and_goes_on_after_two_rotations(tmp_path: Path) -> None:
    file = tmp_path / "part.log"
    follower = Follower(file)
    assert follower.lines() == []
    write(file, "one\n")
    assert follower.lines() == ["one"]
    for text in ("two\n", "three\n"):  # the first of them is in the second older copy by now
        write(file, text)
        move(file)
    write(file, "four\n")
    assert follower.lines() == ["four"]


def test_a_long_line_without_an_end_is_handed_out(tmp_path: Path) -> None:
    file = tmp_path / "part.log"
    follower = Follower(file)
    write(file, "x" * 100_000)
    assert follower.lines() == ["x" * 100_000]
    assert last_lines(file, 3) == ["x" * (64 << 10)]


def test_logs_shows_the_parts_and_follows_one_across_a_rotation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    arguments = ["logs", "--config", str(config)]
    assert main(arguments) == 2
    assert "there are no logs in" in capsys.readouterr().err
    folder = tmp_path / "state" / "logs"
    folder.mkdir(parents=True)
    write(folder / "proxy.log", "a\n\x1b[31mb\x1b[0m\x07\n")
    write(folder / "judge.log", "c\n")
    assert main([*arguments, "--lines", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["judge | c", "proxy | b"]
    assert main([*arguments, "proxy"]) == 0
    assert capsys.readouterr().out.splitlines() == ["a", "b"]
    assert main([*arguments, "prox"]) == 2
    assert "there is no log of 'prox'; known: judge, proxy" in capsys.readouterr().err
    argv = [sys.executable, "-P", "-m", "nextstate", *arguments, "proxy", "--follow", "--lines=1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "b\n"  # it follows by now
            write(folder / "proxy.log", "d\n")
            move(folder / "proxy.log")
            write(folder / "proxy.log", "e\n")
            assert [process.stdout.readline() for _ in range(2)] == ["d\n", "e\n"]
        finally:
            process.terminate()
