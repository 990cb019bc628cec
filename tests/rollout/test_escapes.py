"""plugins/sandboxes/: ways out of a sandbox that its namespaces alone do not close."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from nextstate.hooks import ModelAccess, Scored
from nextstate.records import Json
from plugins.environments.command import create as create_command
from plugins.environments.terminal import create as create_terminal
from plugins.sandboxes.bubblewrap import NOBODY
from plugins.sandboxes.model_socket import model_socket
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


def test_the_way_to_the_model_is_for_the_sandbox_alone() -> None:
    """Whoever else could use it would call as this episode, and use its budget."""

    async def modes() -> tuple[int, int, int]:
        async with model_socket("http://127.0.0.1:1/v1", "ep-1") as path:
            found = os.stat(path)
            return found.st_mode & 0o777, found.st_uid, os.stat(Path(path).parent).st_mode & 0o066

    owner = os.geteuid() or NOBODY
    assert asyncio.run(modes()) == (0o600, owner, 0)


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


def scored_after(left: str, check: str, files: dict[str, str], **fields: object) -> Scored:
    """What a terminal's check says of what an agent left."""

    async def episode() -> Scored:
        task: Json = {"instruction": "go", "check": check, "check_files": files, **fields}
        kind = create_terminal(None)
        kind.check_task(task)
        terminal = kind.make()
        await terminal.reset(task, 0)
        acted = await terminal.step(f"```bash\n{left}\n```")
        assert acted.observation == "exit code 0", acted
        return await terminal.score()

    return asyncio.run(episode())


BAD = "echo exit 0 >"
IN_THE_WAY = {
    "a folder without rights": f"mkdir v; {BAD} v/test.sh; chmod 555 v",
    "a link to one": f"mkdir e; {BAD} e/test.sh; chmod 555 e; ln -s e v",
    "a file for the folder": "touch v",
    "a folder for the file": f"mkdir -p v/test.sh/x; {BAD} v/test.sh/x/y; chmod -R 555 v/test.sh/x",
    "a file without rights": f"mkdir v; {BAD} v/test.sh; chmod 0 v/test.sh",
    "another name of a file": f"mkdir v; {BAD} a; ln a v/test.sh; ln -s ../a v/other.sh",
    "one folder by two names": f"mkdir w; ln -s w v; {BAD} w/test.sh",
}


@pytest.mark.parametrize("left", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_nothing_of_the_agent_keeps_the_checks_files_out(left: str) -> None:
    files = {"v/test.sh": "cat v/other.sh; exit 7", "v/other.sh": "ours", "w/test.sh": "exit 0"}
    scored = scored_after(left, "bash v/test.sh", files)
    assert scored == Scored(0.0, "check: exit code 7\nours")


def test_a_full_folder_is_a_failure_of_the_agent() -> None:
    """Nothing is checked without all that the check needs, however much of it there is room for."""
    left = "for n in 1 2 3 4 5; do head -c 15M /dev/zero > $n; done 2>/dev/null; true"
    scored = scored_after(left, "bash test.sh", {"big": "x" * (1 << 20), "test.sh": "exit 0"})
    assert scored.outcome == 0.0
    assert scored.observation.endswith("the files of the check cannot be laid over the agent's")


def test_an_archive_of_the_agents_own_changes_no_file_of_a_check() -> None:
    """A global header would give all files that come after it one name, or a shorter one."""
    for record in ("path=v", "size=1", "GNU.sparse.realsize=1", "linkpath=/etc"):
        forge = f"""
import ctypes, io, os, tarfile
packed = io.BytesIO()
head = {{"{record.partition("=")[0]}": "{record.partition("=")[2]}"}}
with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT, pax_headers=head):
    pass
shell = os.pidfd_open(2)
for number in map(int, os.listdir("/proc/2/fd")):
    taken = ctypes.CDLL(None).syscall(438, shell, number, 0)  # pidfd_getfd
    if number > 2 and taken > 0:
        os.write(taken, packed.getvalue())
os.kill(2, 9)
"""

        async def episode(forge: str) -> Scored:
            task: Json = {"instruction": "go", "check": "bash v", "check_files": {"v": "exit 7\n"}}
            terminal = create_terminal(None).make()
            await terminal.reset(task, 0)
            await terminal.step(f"```bash\n{python(forge)}\n```")
            return await terminal.score()

        scored = asyncio.run(episode(forge))
        assert scored.outcome == 0.0, (record, scored)


@pytest.mark.parametrize("place", [{}, {"sandbox": []}], ids=["folder", "sandbox"])
@pytest.mark.parametrize("left", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_nothing_of_a_program_keeps_the_checks_files_out(left: str, place: Json) -> None:
    files = {"v/test.sh": "cat v/other.sh; exit 7", "v/other.sh": "ours", "w/test.sh": "exit 0"}
    fields = {"command": left, "check": "bash v/test.sh", "check_files": files, **place}
    assert program_scored(fields) == Scored(0.0, "check: exit code 7\nours")


def test_a_check_that_breaks_its_sandbox_leaves_no_reward_of_the_agent() -> None:
    """Then the files are those that the agent left; what it wrote for a reward is not read."""
    left = "echo 1 > .reward.json; for n in {1..60000}; do > $n; done"
    assert program_scored({"command": left, "check": "false", "sandbox": []}).outcome == 0.0


def program_scored(fields: Json) -> Scored:
    """What a check says of what a program left."""

    async def episode() -> Scored:
        kind = create_command(None)
        kind.check_task(fields)
        program = kind.make()
        try:
            shown = await program.play(
                fields, 0, ModelAccess("http://127.0.0.1:1/v1", "ep-1", "m", 60)
            )
            assert shown == "exit code 0"
            return await program.score()
        finally:
            await program.close()

    return asyncio.run(episode())
