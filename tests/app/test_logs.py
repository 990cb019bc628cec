"""Log files stay short while processes write to them, and only their end is read."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from nextstate.app.log_files import rotate, tail
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
