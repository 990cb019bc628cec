"""One command within a sandbox: files come in as an archive and go out as one.

This machine never unpacks an archive that an agent could write.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from nextstate.errors import RolloutError
from plugins.sandboxes.protocol import MOST_COMMAND_BYTES, Limits, Ran

_READY = b"ready\n"
_ARCHIVE_EXTRA = 16 << 20
"""What an archive may have beyond the size of its folder: a head of 512 bytes for each file."""

INSIDE = r"""
echo 1000 2>/dev/null >/proc/self/oom_score_adj
ulimit -c 0 -n 256 -t "$cpu_s" -v "$memory_kb" -f "$file_kb"
[ -z "$processes" ] || ulimit -u "$processes"
exec {archive}>&"$out" {shown}>&2
[ "$out" -lt 3 ] || exec {out}>&-
exec >/dev/null 2>&1
printf 'ready\n' >&"$archive"
tar --extract --preserve-permissions --ignore-zeros --file=- --directory="$work" 2>&"$shown"
unset cpu_s memory_kb file_kb processes
env --unset=out --unset=wall_s --unset=work timeout --kill-after=1 "$wall_s" bash -c "$1" \
  </dev/null >&"$shown" 2>&1 {archive}>&- {shown}>&-
code=$?
kill -KILL -1
cd "$work"
shopt -s dotglob nullglob
set -- ./*
[ $# = 0 ] || printf '%s\0' "$@" | tar --create --format=posix --sparse --file=- \
  --null --verbatim-files-from --files-from=- >&"$archive"
[ $# != 0 ] || tar --create --file=- --files-from=/dev/null >&"$archive"
exit "$code"
"""
"""Runs the command ($1) between unpacking and packing. `kill -1` ends all that it left running.
`out` is the descriptor for the archive; the output goes to standard error. The folder itself is
not in the archive: in a container it belongs to root, who alone could give it its mode again."""


def checked(command: str) -> bytes:
    """A command as bash gets it. Raises ValueError if no shell could get it."""
    given = command.encode(errors="replace")
    if b"\0" in given or len(given) > MOST_COMMAND_BYTES:
        raise ValueError("a command with NUL or of more than 64 KiB")
    return given


def variables_of(limits: Limits, work: str, out: int, processes: str) -> dict[str, str]:
    """The variables that `INSIDE` needs."""
    return {
        "work": work,
        "out": str(out),
        "wall_s": str(limits.wall_s),
        "cpu_s": str(limits.cpu_s),
        "memory_kb": str(limits.memory_mb << 10),
        "file_kb": str(limits.file_mb << 10),
        "processes": processes,
    }


class Pipe:
    """A pipe that a program writes to; it is read up to a bound and then closed."""

    def __init__(self) -> None:
        read_end, self.write_end = os.pipe()
        self._file = os.fdopen(read_end, "rb", 0)
        self.data = bytearray()
        self.cut = False

    async def read(self, most: int, *, end: bool = False) -> None:
        """Keeps the first `most` bytes, then stops; with `end`, reads all and keeps the last."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._file
        )
        try:
            while not self.cut and (chunk := await reader.read(1 << 16)):
                self.data += chunk
                if end:
                    del self.data[:-most]
                self.cut = len(self.data) > most
        finally:
            transport.close()
        del self.data[most:]

    def close(self) -> None:
        """Closes the end that is read, also twice."""
        self._file.close()


async def finish(
    name: str,
    process: asyncio.subprocess.Process,
    output: Pipe,
    archive: Pipe,
    files: bytes,
    limits: Limits,
) -> Ran:
    """Feeds and reads a sandbox until it ends. Raises RolloutError if it did not begin."""
    most = (limits.folder_mb << 20) + _ARCHIVE_EXTRA
    ended = False
    try:
        async with asyncio.timeout(limits.wall_s + limits.grace_s):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_feed(process, files))
                tasks.create_task(output.read(limits.output_bytes))
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
                process.kill()
            await process.wait()
    if not archive.data.startswith(_READY):
        told = bytes(output.data[:300]).decode(errors="replace")
        raise RolloutError(f"{name} made no sandbox: {told!r}")
    whole = ended and len(archive.data) > len(_READY) and not archive.cut
    code = process.returncode
    assert code is not None
    return Ran(
        code if code >= 0 else 128 - code,
        bytes(output.data),
        output.cut,
        bytes(archive.data[len(_READY) :]) if whole else None,
    )


async def _feed(process: asyncio.subprocess.Process, files: bytes) -> None:
    """Sends the archive; a sandbox that has ended takes no more of it."""
    assert process.stdin is not None
    with suppress(ConnectionError):
        process.stdin.write(files or bytes(10240))  # tar's empty archive
        await process.stdin.drain()
    process.stdin.close()
    with suppress(ConnectionError):
        await process.stdin.wait_closed()
