"""plugins/sandboxes/: ways out of a sandbox that its namespaces alone do not close."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from plugins.sandboxes.syscalls import filter_program
from tests.rollout.machine import needs_bubblewrap
from tests.rollout.test_sandbox import SMALL, run

ROOT = Path(__file__).parents[2]
pytestmark = [needs_bubblewrap, pytest.mark.processes]


def python(code: str) -> str:
    """The command that runs code."""
    return f"python3 - <<'EOF'\n{code}\nEOF"


def test_no_process_of_a_sandbox_shows_the_variables_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The program bwrap itself is one of them; a variable may be the key of a provider."""
    monkeypatch.setenv("SECRET", "x")
    read = "cat /proc/[0-9]*/environ | tr '\\0' '\\n' | cut -d= -f1 | sort -u | xargs"
    ran = run(read)
    assert b"PATH" in ran.output
    assert b"SECRET" not in ran.output


MEETS_KEYS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(248, b"user", b"note", b"left here", 9, -3), ctypes.get_errno())
print(libc.syscall(250, 10, -3, b"user", b"secret", 0), ctypes.get_errno())
"""
HAS_KEYS = f"""
import asyncio, ctypes
from plugins.sandboxes.bubblewrap import Bubblewrap
libc = ctypes.CDLL(None)
assert libc.syscall(250, 1, b"session-of-a-test") > 0
assert libc.syscall(248, b"user", b"secret", b"x", 1, -3) > 0
ran = asyncio.run(Bubblewrap().run({python(MEETS_KEYS)!r}, b""))
assert libc.syscall(250, 10, -3, b"user", b"secret", 0) > 0
assert libc.syscall(250, 10, -3, b"user", b"note", 0) < 0
print(ran.output.decode())
"""
"""With the numbers of x86_64 for add_key (248) and keyctl (250): 1 joins a session, 10 searches."""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="it has the numbers of x86_64")
def test_the_keys_of_our_session_are_neither_read_nor_written() -> None:
    """Else an agent could leave notes for the next episode. A session cannot be left again."""
    done = subprocess.run(
        [sys.executable, "-c", HAS_KEYS], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["-1", "1", "-1", "1"]), done.stderr


def test_a_machine_whose_calls_are_not_known_has_no_filter() -> None:
    assert filter_program("riscv64") == b""
    assert len(filter_program("x86_64")) == len(filter_program("aarch64")) == 16 * 8


def test_no_socket_leads_out() -> None:
    """Those with a name in no folder belong to the network too."""
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind("\0of-a-test")
        server.listen()
        ask = "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0of-a-test')"
        assert b"ConnectionRefusedError" in run(python(ask)).output
    for address in ("192.0.2.1", "2001:db8::1"):
        ask = f"import socket\nsocket.create_connection(('{address}', 80), 1)"
        assert b"Network is unreachable" in run(python(ask)).output


def test_very_many_small_files_are_not_kept() -> None:
    """Empty ones need no room in their folder, but in an archive."""
    ran = run("for n in {1..20000}; do > $n; done", limits=replace(SMALL, wall_s=60, cpu_s=60))
    assert (ran.exit_code, ran.files) == (0, None)


def test_an_archive_of_the_agents_own_stays_in_its_sandboxes(tmp_path: Path) -> None:
    """It takes the place of the one that is made, with links and names that lead outside."""
    forge = f"""
import ctypes, io, os, tarfile
packed = io.BytesIO()
with tarfile.open(fileobj=packed, mode="w") as archive:
    link = tarfile.TarInfo("out")
    link.type, link.linkname = tarfile.SYMTYPE, "{tmp_path}"
    archive.addfile(link)
    for name in ("forged", "out/a", "../b", "{tmp_path}/c", "/usr/d"):
        archive.addfile(tarfile.TarInfo(name))
shell = os.pidfd_open(2)
for number in map(int, os.listdir("/proc/2/fd")):
    taken = ctypes.CDLL(None).syscall(438, shell, number, 0)  # pidfd_getfd
    if number > 2 and taken > 0:
        os.write(taken, packed.getvalue())
os.kill(2, 9)
"""
    shown = run(python(forge), "ls -A /task; test -e /usr/d || echo no /usr/d").output
    assert b"forged" in shown, "the next command has its files"
    assert b"no /usr/d" in shown
    assert [*tmp_path.iterdir()] == []
