"""A sandbox for one command at a time, made by bubblewrap.

Each command gets new namespaces: no network, no other processes, a read-only /usr, and the two
folders /task and /tmp in memory. What is in /task comes in as a tar archive and goes out as one.
This machine never unpacks an archive that an agent could write, and nothing of a sandbox lies on
its disk: a killed runner leaves nothing behind.

What is limited: seconds, CPU seconds, memory and size of files of each process, processes,
the bytes in each folder, and the bytes of output that are read. Memory is limited for each process
and not for all together; the kernel's out-of-memory killer takes processes of a sandbox first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from nextstate.errors import RolloutError, StartError
from plugins.sandboxes.syscalls import filter_program

_NOBODY = 65534
"""root runs sandboxes as this user: the kernel does not limit the processes of root."""
_FILTER = filter_program(os.uname().machine)
_READY = b"ready\n"
_PROGRAMS = ("bwrap", "bash", "tar", "timeout")
MOST_COMMAND_BYTES = 64 << 10
"""The kernel takes at most 128 KiB for one argument."""
_ARCHIVE_EXTRA = 16 << 20
"""What an archive may have beyond the size of its folder: a head of 512 bytes for each file."""

_INSIDE = r"""
echo 1000 2>/dev/null >/proc/self/oom_score_adj
ulimit -c 0 -n 256 -t "$cpu_s" -v "$memory_kb" -f "$file_kb" -u "$processes"
printf 'ready\n' >&"$out"
exec {shown}>&1 >/dev/null 2>&1
tar --extract --preserve-permissions --ignore-zeros --file=- --directory=/task 2>&"$shown"
unset cpu_s memory_kb file_kb processes
env --unset=out --unset=wall_s timeout --kill-after=1 "$wall_s" bash -c "$1" \
  </dev/null >&"$shown" 2>&1 {out}>&- {shown}>&-
code=$?
kill -KILL -1
tar --create --format=posix --sparse --file=- --directory=/task . >&"$out"
exit "$code"
"""
"""Runs the command ($1) between unpacking and packing. `kill -1` ends all that it left running."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one command may use."""

    wall_s: float = 30.0
    cpu_s: int = 20
    """Of each process."""
    memory_mb: int = 512
    """Of each process."""
    processes: int = 64
    file_mb: int = 16
    """The size of each file."""
    folder_mb: int = 64
    """The size of /task, and of /tmp."""
    output_bytes: int = 256 << 10
    """What is read of the output; the command's next write fails."""
    grace_s: float = 20.0
    """For unpacking, packing and a busy machine; after `wall_s` and this the sandbox is killed."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one command did."""

    exit_code: int
    """As bash tells it: 124 after its seconds, 128 and more for a signal."""
    output: bytes
    """Both streams in the order of their writes."""
    cut: bool
    """Whether there was more output than is read."""
    files: bytes | None
    """What /task holds now; None: the command ended the sandbox itself or left too much."""


class Bubblewrap:
    """Runs commands, each in a sandbox of its own."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    async def check_machine(self) -> None:
        """Raises StartError unless a sandbox works here."""
        missing = [name for name in _PROGRAMS if shutil.which(name) is None]
        if missing:
            raise StartError(
                f"{' and '.join(missing)} not found: install it, for example with "
                "`apt install bubblewrap`"
            )
        try:
            ran = await self.run("exit 7", b"")
        except RolloutError as error:
            raise StartError(f"{error}; are user namespaces allowed on this machine?") from error
        if ran.exit_code != 7 or ran.files is None:
            raise StartError(f"a sandbox does not work here: {ran.output[:300]!r}")

    async def run(
        self, command: str, files: bytes, variables: Mapping[str, str] | None = None
    ) -> Ran:
        """Runs a command of bash in /task. Raises RolloutError if no sandbox could be made.

        A command without NUL, of at most 64 KiB. `files` may be several archives in a row.
        """
        given = command.encode(errors="replace")
        if b"\0" in given or len(given) > MOST_COMMAND_BYTES:
            raise ValueError("a command with NUL or of more than 64 KiB")
        nobody = _NOBODY if os.geteuid() == 0 else None
        output, archive, refused = _Pipe(), _Pipe(), _filter()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv(archive.write_end, refused, given, variables or {}),
                stdin=asyncio.subprocess.PIPE,
                stdout=output.write_end,
                stderr=output.write_end,
                pass_fds=(archive.write_end, refused),
                cwd="/",
                # A sandbox can read in /proc with which variables bwrap itself was started.
                env={"PATH": os.environ.get("PATH", os.defpath)},
                start_new_session=True,
                user=nobody,
                group=nobody,
                extra_groups=None if nobody is None else (),
            )
        except BaseException as error:
            output.close()
            archive.close()
            if isinstance(error, OSError):
                raise RolloutError(f"bwrap does not start: {error.strerror}") from error
            raise
        finally:
            for end in (output.write_end, archive.write_end, refused):
                os.close(end)
        return await self._finish(process, output, archive, files)

    async def _finish(
        self, process: asyncio.subprocess.Process, output: _Pipe, archive: _Pipe, files: bytes
    ) -> Ran:
        """Feeds and reads a sandbox until it ends."""
        most = (self.limits.folder_mb << 20) + _ARCHIVE_EXTRA
        ended = False
        try:
            async with asyncio.timeout(self.limits.wall_s + self.limits.grace_s):
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(_feed(process, files))
                    tasks.create_task(output.read(self.limits.output_bytes))
                    tasks.create_task(archive.read(most))
                await process.wait()
            ended = True
        except TimeoutError:
            pass
        finally:
            output.close()
            archive.close()
            if not ended:
                with suppress(ProcessLookupError):
                    process.kill()  # its sandbox dies with it
                await process.wait()
        if not archive.data.startswith(_READY):
            told = bytes(output.data[:300]).decode(errors="replace")
            raise RolloutError(f"bwrap made no sandbox: {told!r}")
        whole = ended and len(archive.data) > len(_READY) and not archive.cut
        code = process.returncode
        assert code is not None
        return Ran(
            code if code >= 0 else 128 - code,
            bytes(output.data),
            output.cut,
            bytes(archive.data[len(_READY) :]) if whole else None,
        )

    def _argv(
        self, out: int, refused: int, command: bytes, variables: Mapping[str, str]
    ) -> list[str | bytes]:
        limits = self.limits
        size = str(limits.folder_mb << 20)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            **variables,
            "out": str(out),
            "wall_s": str(limits.wall_s),
            "cpu_s": str(limits.cpu_s),
            "memory_kb": str(limits.memory_mb << 10),
            "file_kb": str(limits.file_mb << 10),
            "processes": str(limits.processes),
        }
        return [
            *("bwrap", "--unshare-all", "--unshare-user", "--disable-userns"),
            *(("--seccomp", str(refused)) if _FILTER else ()),
            *("--new-session", "--die-with-parent", "--cap-drop", "ALL", "--hostname", "sandbox"),
            *("--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin"),
            *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
            *("--ro-bind-try", "/etc/alternatives", "/etc/alternatives"),
            *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"),
            *("--proc", "/proc", "--dev", "/dev"),
            *("--size", size, "--tmpfs", "/task", "--size", size, "--tmpfs", "/tmp"),
            *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/task", "--clearenv"),
            *(part for item in environment.items() for part in ("--setenv", *item)),
            *("--", "bash", "-c", _INSIDE, "sandbox", command),
        ]


def _filter() -> int:
    """A descriptor from which the filter of system calls can be read."""
    read_end, write_end = os.pipe()
    os.write(write_end, _FILTER)
    os.close(write_end)
    return read_end


class _Pipe:
    """A pipe that a sandbox writes to; it is read up to a bound and then closed."""

    def __init__(self) -> None:
        read_end, self.write_end = os.pipe()
        self._file = os.fdopen(read_end, "rb", 0)
        self.data = bytearray()
        self.cut = False

    async def read(self, most: int) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._file
        )
        try:
            while not self.cut and (chunk := await reader.read(1 << 16)):
                self.data += chunk
                self.cut = len(self.data) > most
        finally:
            transport.close()
        del self.data[most:]

    def close(self) -> None:
        """Closes the end that is read, also twice."""
        self._file.close()


async def _feed(process: asyncio.subprocess.Process, files: bytes) -> None:
    """Sends the archive; a sandbox that has ended takes no more of it."""
    assert process.stdin is not None
    with suppress(ConnectionError):
        process.stdin.write(files or bytes(10240))  # tar's empty archive
        await process.stdin.drain()
    process.stdin.close()
    with suppress(ConnectionError):
        await process.stdin.wait_closed()
