"""A program of this machine in a process group of its own, which is ended as a whole.

It is no sandbox: the program may do what its user may.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from nextstate.errors import RolloutError
from plugins.sandboxes.one_command import Pipe

_MOST_OUTPUT_BYTES = 64 << 10
_PATIENCE_S = 5.0
"""Between asking a group to end and killing it, so that agents can remove what they started."""
_LAST_OUTPUT_S = 1.0
"""A process that has left the group may hold the pipe of the output open for ever."""
_KEPT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR")
"""Variables that a program gets of ours; others may be secrets."""


class Ended(NamedTuple):
    """What a program did."""

    exit_code: int
    """As bash tells it: 128 and more for a signal."""
    output: bytes
    """The end of both streams, in the order of their writes."""


async def run_group(command: str, folder: Path, variables: Mapping[str, str]) -> Ended:
    """Runs a command of bash in a folder; when it ends or is cancelled, its whole group ends.

    Raises RolloutError if it cannot be started.
    """
    output = Pipe()
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                *("bash", "-c", command.encode(errors="replace")),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output.write_end,
                stderr=output.write_end,
                cwd=folder,
                env={name: os.environ[name] for name in _KEPT if name in os.environ}
                | dict(variables),
                start_new_session=True,
            )
        finally:
            os.close(output.write_end)
        reading = asyncio.create_task(output.read(_MOST_OUTPUT_BYTES, end=True))
        try:
            code = await process.wait()
        finally:
            await _end(process)
            await asyncio.wait({reading}, timeout=_LAST_OUTPUT_S)
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
    except OSError as error:
        raise RolloutError(f"the program does not start: {error.strerror}") from error
    finally:
        output.close()
    return Ended(code if code >= 0 else 128 - code, bytes(output.data))


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends all of the group: what is cancelled gets time to end by itself."""
    try:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    await process.wait()
    except ProcessLookupError:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
