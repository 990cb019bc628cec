"""plugins/sandboxes/bubblewrap.py: commands that try to get out, or to use more than they may."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from nextstate.errors import RolloutError, StartError
from plugins.sandboxes.bubblewrap import MOST_COMMAND_BYTES, Bubblewrap, Limits, Ran
from tests.rollout.machine import needs_bubblewrap

pytestmark = [needs_bubblewrap, pytest.mark.processes]
SMALL = Limits(wall_s=2, cpu_s=2, memory_mb=256, processes=24, file_mb=1, folder_mb=4)


def run(*commands: str, limits: Limits = SMALL, **variables: str) -> Ran:
    """The last of several commands, each with the files that the one before left."""

    async def one_after_the_other() -> Ran:
        files = b""
        for command in commands:
            ran = await Bubblewrap(limits).run(command, files, variables)
            files = ran.files or files
        return ran

    return asyncio.run(one_after_the_other())


def test_files_modes_and_links_stay_from_command_to_command() -> None:
    made = "mkdir d; echo hi > d/a; chmod 777 d/a; mkfifo d/f; touch -d @1.5 d; ln -s d/a link"
    made += "; touch /tmp/lost; exit 3"
    assert run(made).exit_code == 3
    ran = run(made, "cat link; stat -c %a d/a; stat -c %.1Y d; ls -F d /tmp | xargs")
    assert (ran.exit_code, ran.output, ran.cut) == (0, b"hi\n777\n1.5\n/tmp: d: a* f|\n", False)


def test_a_command_sees_its_variables_and_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    ran = run("echo $SEED $SECRET; env | cut -d= -f1 | sort | xargs", SEED="7")
    assert ran.output == b"7\nHOME LANG PATH PWD SEED SHLVL _\n"


def test_nothing_of_this_machine_but_usr_is_there_or_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    assert run(f"cat {tmp_path}/secret /etc/passwd {Path(__file__)}").exit_code == 1
    assert run("ls -A / | xargs").output == b"bin dev etc lib lib64 proc task tmp usr\n"
    for place in ("/usr/x", "/x", "/dev/x", "/dev/shm/x", "/etc/x", "/proc/sys/kernel/hostname"):
        assert run(f"echo x > {place}").exit_code == 1, place


def test_there_is_no_network() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert run(f"echo > /dev/tcp/127.0.0.1/{port}").exit_code == 1
    assert run("tail -n +3 /proc/net/dev | cut -d: -f1 | xargs").output == b"lo\n"


def test_there_are_no_other_processes_and_no_privileges() -> None:
    ran = run("cat /proc/[0-9]*/comm | sort | uniq | xargs; grep CapEff /proc/self/status")
    assert str(os.getpid()).encode() not in run("ls /proc").output.split()
    assert ran.output.split()[-1] == b"0000000000000000"
    assert run("unshare --user true").exit_code == 1
    assert run("mount -t tmpfs x /tmp").exit_code != 0


def test_a_fork_bomb_ends_with_its_command() -> None:
    bomb = "mkfifo /tmp/p; f() { f | f & }; f 2>/dev/null; read -t 1 <> /tmp/p; echo still here > a"
    ran = run(bomb, "cat a", limits=replace(SMALL, wall_s=30))
    assert ran.output == b"still here\n"


def test_what_a_command_leaves_running_is_ended() -> None:
    ran = run("(while :; do echo x >> a; done) & sleep 0.1", "cat /proc/[0-9]*/comm | sort -u")
    assert b"sleep" not in ran.output
    assert ran.files is not None


def test_endless_output_is_cut_and_the_files_stay() -> None:
    ran = run("echo hi > a; yes")
    assert (len(ran.output), ran.cut, ran.exit_code) == (SMALL.output_bytes, True, 141)
    assert run("echo hi > a; yes", "cat a").output == b"hi\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("echo hi > a; sleep 60", 124),
        ("echo hi > a; trap '' TERM; while :; do sleep 60; done", 137),
    ],
)
def test_a_command_is_ended_after_its_seconds(command: str, code: int) -> None:
    assert run(command).exit_code == code
    assert run(command, "cat a").output == b"hi\n"


def test_memory_files_and_folders_are_limited() -> None:
    assert b"MemoryError" in run("python3 -c 'bytearray(1 << 29)'").output
    assert run("head -c 2000000 /dev/zero > a").exit_code != 0
    full = "for i in $(seq 9); do head -c 1000000 /dev/zero > f$i; done"
    ran = run(full, "stat -c %s f* | awk '{ n += $1 } END { print n }'")
    assert 3 << 20 < int(ran.output) <= 4 << 20
    assert run("head -c 1000000 /dev/zero | tee /tmp/{1..9} > /dev/null").exit_code != 0


def test_sparse_files_do_not_make_a_large_archive() -> None:
    ran = run("truncate -s 1M f{1..200}")
    assert ran.files is not None
    assert len(ran.files) < 1 << 20


def test_a_command_that_ends_its_sandbox_leaves_no_files() -> None:
    """One signal to all: ended alone, `timeout` could wake the shell that packs."""
    ran = run("echo hi > a; kill -9 -1")
    assert (ran.exit_code, ran.files) == (137, None)


def test_a_sandbox_that_does_not_end_is_killed() -> None:
    """The shell that would end and pack everything is stopped; it is the second process."""
    ran = run("kill -STOP 2; yes & sleep 60", limits=replace(SMALL, grace_s=1))
    assert (ran.exit_code, ran.files, ran.cut) == (137, None, True)


def test_an_archive_that_is_none_is_the_next_commands_trouble() -> None:
    ran = asyncio.run(Bubblewrap(SMALL).run("echo goes on", b"no archive"))
    assert ran.exit_code == 0
    assert ran.output.endswith(b"goes on\n")


def test_a_command_that_no_shell_could_get_is_refused() -> None:
    for command in ("a\0b", "x" * (MOST_COMMAND_BYTES + 1)):
        with pytest.raises(ValueError, match="NUL"):
            run(command)


def test_a_cancelled_command_is_gone(tmp_path: Path) -> None:
    async def cancelled() -> None:
        sandbox = Bubblewrap(Limits(wall_s=60))
        task = asyncio.create_task(sandbox.run("exec -a marked-sleep sleep 55", b""))
        while not _running("marked-sleep"):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while _running("marked-sleep"):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(cancelled(), 30))


def _running(name: str) -> bool:
    """Whether a process has this name as its first argument."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(name.encode()):
                return True
        except OSError:
            continue
    return False


def test_a_machine_without_bubblewrap_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asyncio.run(Bubblewrap().check_machine())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartError, match=r"bwrap and bash .* not found: .*apt install bubblewrap"):
        asyncio.run(Bubblewrap().check_machine())
    with pytest.raises(RolloutError, match="bwrap does not start"):
        run("true")


def test_a_bubblewrap_that_may_make_no_namespace_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # root runs it as another user
        (Path(folder) / "bwrap").write_text("#!/bin/sh\necho bwrap: No permissions\nexit 1\n")
        (Path(folder) / "bwrap").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        with pytest.raises(StartError, match=r"No permissions.*are user namespaces allowed"):
            asyncio.run(Bubblewrap().check_machine())
