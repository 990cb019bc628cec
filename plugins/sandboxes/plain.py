"""No sandbox: a command in a folder of this machine, with the rights of its user.

Only for tests of what runs in a sandbox. A task cannot choose it.
"""

from __future__ import annotations

import asyncio
import io
import tarfile
import tempfile
from collections.abc import Mapping

from nextstate.errors import RolloutError
from plugins.sandboxes.protocol import Limits, Ran


class Plain:
    """Runs commands without protection. It unpacks archives that a command could write."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    async def check_machine(self) -> None:
        """Nothing is needed."""

    async def run(
        self, command: str, files: bytes, variables: Mapping[str, str] | None = None
    ) -> Ran:
        with tempfile.TemporaryDirectory(prefix="nextstate-") as folder:
            _unpack(files, folder)
            process = await asyncio.create_subprocess_exec(
                *("timeout", str(self.limits.wall_s), "bash", "-c", command),
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", **(variables or {})},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await process.communicate()
            code = process.returncode
            assert code is not None
            cut = len(output) > self.limits.output_bytes
            return Ran(code, output[: self.limits.output_bytes], cut, _pack(folder))


def _unpack(files: bytes, folder: str) -> None:
    if not files:
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(files), ignore_zeros=True) as archive:
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, OSError) as error:
        raise RolloutError(f"the files cannot be unpacked: {error}") from error


def _pack(folder: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, ".")
    return packed.getvalue()
