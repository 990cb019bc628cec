"""A sandbox for one command at a time in a container of an image, by docker or podman.

It keeps the same rules as the one of bubblewrap: no network, a read-only system, the folders
/task and /tmp in memory, the same limits. Memory and processes are limited for the container as a
whole. At most `MOST_AT_ONCE` run at once. The image needs bash, tar, timeout and sha256sum.

A killed runner leaves a container behind for at most the seconds of one command.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from nextstate.errors import RolloutError, StartError
from plugins.sandboxes.one_command import INSIDE, Pipe, checked, finish, variables_of
from plugins.sandboxes.protocol import Folders, Limits, Ran

PROGRAMS = ("docker", "podman")
MOST_AT_ONCE = 16
"""Containers of this process; more commands wait. Each may use a gigabyte and more."""
_USER = "65534:65534"
_REMOVE_S = 30.0
_places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
"""Those in which containers run, of each event loop."""


class Container:
    """Runs commands, each in a container of its own."""

    def __init__(
        self,
        program: str,
        image: str,
        limits: Limits | None = None,
        folders: Folders | None = None,
    ) -> None:
        """`program` is one of `PROGRAMS`."""
        self.limits = limits or Limits()
        self._folders = folders or Folders()
        self._program, self._image = program, image

    async def check_machine(self) -> None:
        """Raises StartError unless a container of the image works here."""
        if shutil.which(self._program) is None:
            raise StartError(
                f"{self._program} not found: install it, or use the sandbox bubblewrap, which "
                "needs no image"
            )
        try:
            ran = await self.run(": > a && sha256sum a && exit 7", b"")
        except RolloutError as error:
            raise StartError(
                f"{error}; does `{self._program} run {self._image} bash` work, with bash, tar, "
                "timeout and sha256sum in the image?"
            ) from error
        if ran.exit_code != 7 or ran.files is None:
            raise StartError(f"a container of {self._image} does not work: {ran.output[:300]!r}")

    async def run(
        self, command: str, files: bytes, variables: Mapping[str, str] | None = None
    ) -> Ran:
        """Runs a command of bash. Raises RolloutError if there was no container."""
        given = checked(command)
        loop = asyncio.get_running_loop()
        async with _places.setdefault(loop, asyncio.Semaphore(MOST_AT_ONCE)):
            return await self._run(given, files, variables or {})

    async def _run(self, command: bytes, files: bytes, variables: Mapping[str, str]) -> Ran:
        name = f"nextstate-{secrets.token_hex(8)}"
        output, archive = Pipe(), Pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *self.argv(name, command, variables),
                stdin=asyncio.subprocess.PIPE,
                stdout=archive.write_end,
                stderr=output.write_end,
                start_new_session=True,
            )
        except BaseException as error:
            output.close()
            archive.close()
            if isinstance(error, OSError):
                raise RolloutError(f"{self._program} does not start: {error.strerror}") from error
            raise
        finally:
            for pipe in (output, archive):
                os.close(pipe.write_end)
        ended = False
        try:
            ran = await finish(self._program, process, output, archive, files, self.limits)
            ended = ran.files is not None
        finally:
            if not ended:
                await self._remove(name)
        return ran

    def argv(self, name: str, command: bytes, variables: Mapping[str, str]) -> list[str | bytes]:
        """The command line of one container; public so that a test can read it."""
        limits = self.limits
        folder = f"rw,exec,nosuid,nodev,mode=1777,size={limits.folder_mb}m"
        if self._program == "podman":
            folder += ",notmpcopyup"  # else the folder of the image decides who may write
        environment = {
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            **variables,
            **variables_of(limits, self._folders.work, 1, ""),
        }
        writable = (self._folders.work, "/tmp", *self._folders.others)
        memory = str(limits.memory_mb * 2 + limits.folder_mb * len(writable))
        return [
            *(self._program, "run", "--rm", "--interactive", "--name", name, "--pull", "never"),
            *("--network", "none", "--read-only", "--user", _USER, "--cap-drop", "ALL"),
            *("--security-opt", "no-new-privileges", "--hostname", "sandbox"),
            *("--pids-limit", str(limits.processes + 8), "--memory", f"{memory}m"),
            *(part for at in writable for part in ("--tmpfs", f"{at}:{folder}")),
            *("--workdir", self._folders.work),
            *(part for item in environment.items() for part in ("--env", "=".join(item))),
            *("--entrypoint", "bash", self._image, "-c", INSIDE, "sandbox", command),
        ]

    async def _remove(self, name: str) -> None:
        """Ends a container that outlived its client."""
        try:
            async with asyncio.timeout(_REMOVE_S):
                process = await asyncio.create_subprocess_exec(
                    *(self._program, "rm", "--force", name),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                )
                await process.wait()
        except (OSError, TimeoutError):
            pass  # it ends by itself after the seconds of its command
