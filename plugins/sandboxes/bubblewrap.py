"""A sandbox for one command at a time, made by bubblewrap.

Each command gets new namespaces: no network, no other processes, a read-only /usr, and the two
folders /task and /tmp in memory. Nothing of a sandbox lies on this machine's disk: a killed runner
leaves nothing behind.

What is limited: seconds, CPU seconds, memory and size of files of each process, processes,
the bytes in each folder, and the bytes of output that are read. Memory is limited for each process
and not for all together; the kernel's out-of-memory killer takes processes of a sandbox first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence

from nextstate.errors import RolloutError, StartError
from plugins.sandboxes.one_command import INSIDE, Pipe, checked, finish, variables_of
from plugins.sandboxes.protocol import MOST_COMMAND_BYTES, Folders, Limits, Ran
from plugins.sandboxes.syscalls import filter_program

__all__ = ["MOST_COMMAND_BYTES", "Bubblewrap", "Limits", "Ran", "create"]

NOBODY = 65534
"""root runs sandboxes as this user: the kernel does not limit the processes of root."""
FILTER = filter_program(os.uname().machine)
"""Empty where the machine's system calls are not known."""
_PROGRAMS = ("bwrap", "bash", "tar", "timeout")


class Bubblewrap:
    """Runs commands, each in a sandbox of its own."""

    def __init__(
        self,
        limits: Limits | None = None,
        folders: Folders | None = None,
        readable: Sequence[str] = (),
        sockets: Mapping[str, str] | None = None,
    ) -> None:
        """`readable` are folders beside /usr that commands may read; `sockets` are Unix sockets
        of this machine that they may use: path there to path here."""
        self.limits = limits or Limits()
        self._folders = folders or Folders()
        self._shown = [*zip(readable, readable, strict=True)]
        self._shown += [(here, there) for there, here in (sockets or {}).items()]

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
        """Runs a command of bash. Raises RolloutError if no sandbox could be made.

        A command without NUL, of at most 64 KiB. `files` may be several archives in a row.
        """
        given = checked(command)
        nobody = NOBODY if os.geteuid() == 0 else None
        output, archive, refused = Pipe(), Pipe(), _filter()
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
        # The sandbox dies with the process.
        return await finish("bwrap", process, output, archive, files, self.limits)

    def _argv(
        self, out: int, refused: int, command: bytes, variables: Mapping[str, str]
    ) -> list[str | bytes]:
        size = str(self.limits.folder_mb << 20)
        writable = (self._folders.work, "/tmp", *self._folders.others)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            **variables,
            **variables_of(self.limits, self._folders.work, out, str(self.limits.processes)),
        }
        return [
            *walls(refused),
            *(part for folder in writable for part in ("--size", size, "--tmpfs", folder)),
            *(part for pair in self._shown for part in ("--ro-bind", *pair)),
            *(
                "--remount-ro",
                "/dev",
                "--remount-ro",
                "/",
                "--chdir",
                self._folders.work,
                "--clearenv",
            ),
            *(part for item in environment.items() for part in ("--setenv", *item)),
            *("--", "bash", "-c", INSIDE, "sandbox", command),
        ]


def walls(refused: int) -> list[str]:
    """The beginning of bwrap's command line, with the system and without folders to write to.

    `refused` is a descriptor from which it reads `FILTER`.
    """
    return [
        *("bwrap", "--unshare-all", "--unshare-user", "--disable-userns"),
        *(("--seccomp", str(refused)) if FILTER else ()),
        *("--new-session", "--die-with-parent", "--cap-drop", "ALL", "--hostname", "sandbox"),
        *("--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin"),
        *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
        *("--ro-bind-try", "/etc/alternatives", "/etc/alternatives"),
        *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"),
        *("--proc", "/proc", "--dev", "/dev"),
    ]


def _filter() -> int:
    """A descriptor from which the filter of system calls can be read."""
    read_end, write_end = os.pipe()
    os.write(write_end, FILTER)
    os.close(write_end)
    return read_end


def create(settings: object) -> Bubblewrap:
    return Bubblewrap(settings if isinstance(settings, Limits) else None)
