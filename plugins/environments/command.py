"""The environment `command`: any agent program, which calls the model itself.

A task has these fields beside its id:

    command       a command of bash that runs the agent
    instruction   what the agent is asked to do, as $NEXTSTATE_INSTRUCTION (optional)
    files         the files in its folder at the beginning: path to text (optional)
    variables     further variables of its environment (optional)
    check         a command of bash that says afterwards how well it ended (optional)
    check_files   files that are added for the check, in the place of the agent's (optional)
    sandbox       a list of folders that it may read, perhaps empty: the program runs in
                  bubblewrap, in /task, and reaches nothing but the model (optional)

The program finds the model by OPENAI_BASE_URL and OPENAI_API_KEY, or ANTHROPIC_BASE_URL and
ANTHROPIC_API_KEY, and $NEXTSTATE_MODEL. Exit code 0 is the outcome 1, any other 0. If the program
writes a file $NEXTSTATE_REWARD_FILE, that says more (plugins/environments/reward_file.py). With a
`check` it is the check's exit code or reward file that counts, and the program cannot write one.
A program that bash cannot run is no fault of the agent; a check that it cannot run is its failure,
since the check may be a program that the agent was to write.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import secrets
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from nextstate.errors import ConfigError, LateError, RolloutError, StartError
from nextstate.hooks import ModelAccess, Scored
from nextstate.records import Json
from plugins.environments.laying import laid
from plugins.environments.process_group import run_group
from plugins.environments.reward_file import MOST_BYTES, read_reward
from plugins.environments.terminal import archive_of, check_files, readable
from plugins.sandboxes import bridge
from plugins.sandboxes.bubblewrap import Bubblewrap
from plugins.sandboxes.model_socket import model_socket
from plugins.sandboxes.protocol import MOST_COMMAND_BYTES, Limits

_FIELDS = {
    "command": str,
    "instruction": str,
    "files": dict,
    "variables": dict,
    "check": str,
    "check_files": dict,
    "sandbox": list,
}
_KINDS = {str: "a text", dict: "an object of texts", list: "a list of folders"}
_READABLE = re.compile(r"/(?!(?:task|tmp|proc|dev)/?$)[^/\0][^\0]*")
"""A folder that does not cover one of the sandbox."""
_NOT_THERE = (126, 127)
"""Exit codes of bash for a program that cannot be run."""
_MOST_BYTES = MOST_COMMAND_BYTES // 2
"""Of a command: what lays the check's files, or leads to the model, comes before it."""
_CUT = (124, 137)
"""Those of a program that a sandbox ended."""
_PORT, _SOCKET = "8080", "/tmp/model"
_BEFORE_DEADLINE = 0.9
"""A sandbox ends its program at this share of the deadline, so that its files are kept."""


class _Ended(NamedTuple):
    exit_code: int
    shown: str
    late: bool = False
    """Whether its time was over."""


class _Place(Protocol):
    """Where the program runs, and after it the check."""

    reward_file: str
    """Whose name the agent does not know, unless it is told."""

    async def run(
        self, command: str, variables: Mapping[str, str], access: ModelAccess | None
    ) -> _Ended: ...

    async def add(self, files: Mapping[str, str]) -> None: ...

    async def read_reward(self) -> bytes | None: ...

    async def close(self) -> None: ...


class Folder:
    """A new folder of this machine. The program may do what its user may."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="nextstate-"))
        self._work = self._root / "work"
        self._work.mkdir()
        self.reward_file = str(self._root / _reward_name())

    async def run(
        self, command: str, variables: Mapping[str, str], access: ModelAccess | None
    ) -> _Ended:
        if access is None and not await asyncio.to_thread(self._work.is_dir):
            return _Ended(1, "the agent has removed its folder")
        given = {**variables, **(_addresses(access.base_url, access.api_key) if access else {})}
        ended = await run_group(command, self._work, given)
        return _Ended(ended.exit_code, readable(ended.output))

    async def add(self, files: Mapping[str, str]) -> None:
        await asyncio.to_thread(self._write, files)

    async def read_reward(self) -> bytes | None:
        return await asyncio.to_thread(self._read)

    async def close(self) -> None:
        await asyncio.to_thread(partial(shutil.rmtree, self._root, ignore_errors=True))

    def _write(self, files: Mapping[str, str]) -> None:
        for name, text in files.items():
            path = self._work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode(errors="replace"))

    def _read(self) -> bytes | None:
        try:
            file = os.open(self.reward_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with os.fdopen(file, "rb") as opened:
            is_file = stat.S_ISREG(os.fstat(opened.fileno()).st_mode)
            return opened.read(MOST_BYTES + 1) if is_file else b""


class Sandboxed:
    """Sandboxes of bubblewrap, from which only the model can be reached."""

    def __init__(self, readable_folders: list[str]) -> None:
        self.reward_file = f"/task/{_reward_name()}"
        self._readable = readable_folders
        self._files = b""

    async def run(
        self, command: str, variables: Mapping[str, str], access: ModelAccess | None
    ) -> _Ended:
        if access is None:
            return await self._run(Bubblewrap(Limits(), None, self._readable), command, variables)
        seconds = access.deadline_s * _BEFORE_DEADLINE
        limits = Limits(
            wall_s=seconds,
            cpu_s=math.ceil(seconds),
            memory_mb=4096,
            processes=256,
            file_mb=64,
            folder_mb=256,
            output_bytes=4 << 20,
        )
        async with model_socket(access.base_url, access.api_key) as socket:
            sandbox = Bubblewrap(limits, None, self._readable, {_SOCKET: socket})
            source = await asyncio.to_thread(Path(bridge.__file__).read_text)
            argv = ("python3", "-I", "-c", source, _PORT, _SOCKET, "bash", "-c", command)
            given = {**variables, **_addresses(f"http://127.0.0.1:{_PORT}/v1", "sandbox")}
            began = time.monotonic()
            ended = await self._run(sandbox, shlex.join(argv), given)
            over = ended.exit_code in _CUT and time.monotonic() - began >= seconds
            return ended._replace(late=over)

    async def add(self, files: Mapping[str, str]) -> None:
        self._files += archive_of(files)

    async def read_reward(self) -> bytes | None:
        show = f"[ -f {self.reward_file} ] && head -c {MOST_BYTES + 1} {self.reward_file}"
        ran = await Bubblewrap(Limits()).run(show, self._files)
        return None if ran.exit_code else ran.output

    async def close(self) -> None:
        """Each sandbox ended with its command."""

    async def _run(self, sandbox: Bubblewrap, command: str, variables: Mapping[str, str]) -> _Ended:
        ran = await sandbox.run(command, self._files, variables)
        self._files = ran.files or self._files
        return _Ended(ran.exit_code, readable(ran.output))


class Command:
    """One episode of a program."""

    def __init__(self) -> None:
        self._place: _Place | None = None
        self._ended: _Ended | None = None

    async def play(self, task: Json, seed: int, access: ModelAccess) -> str:
        self._task = task
        self._variables = {
            **task.get("variables", {}),
            "NEXTSTATE_SEED": str(seed),
            "NEXTSTATE_MODEL": access.model,
            "NEXTSTATE_INSTRUCTION": task.get("instruction", ""),
        }
        place = self._place = Sandboxed(task["sandbox"]) if "sandbox" in task else Folder()
        try:
            await place.add(task.get("files", {}))
        except OSError as error:
            raise RolloutError(f"a file cannot be written: {error}") from error
        given = dict(self._variables)
        if "check" not in task:
            given["NEXTSTATE_REWARD_FILE"] = place.reward_file
        ended = self._ended = _there(await place.run(task["command"], given, access))
        shown = f"exit code {ended.exit_code}\n{ended.shown}".strip()
        if ended.late:
            raise LateError(shown)
        return shown

    async def score(self) -> Scored:
        place, ended = self._place, self._ended
        assert place is not None
        told = ""
        if "check" in self._task:
            added, check = laid(self._task.get("check_files", {}), self._task["check"])
            try:
                await place.add(added)
            except OSError as error:  # the agent has taken the folder or its rights away
                return Scored(0.0, f"a file of the check cannot be written: {error.strerror}")
            given = {**self._variables, "NEXTSTATE_REWARD_FILE": place.reward_file}
            ended = await place.run(check, given, None)
            told = f"check: exit code {ended.exit_code}\n{ended.shown}".strip()
        data = await place.read_reward()
        if data is None:
            return Scored(float(ended is not None and ended.exit_code == 0), told)
        scored = read_reward(data)
        return Scored(
            scored.outcome, "\n".join(filter(None, (told, scored.observation))), scored.steps
        )

    async def close(self) -> None:
        if self._place is not None:
            await self._place.close()


class CommandKind:
    """Makes runs of programs."""

    def __init__(self) -> None:
        self._sandboxed = False

    def check_task(self, task: Json) -> None:
        for name, value in task.items():
            if name not in _FIELDS:
                raise ConfigError(f"unknown field {name!r:.80}: known are {', '.join(_FIELDS)}")
            if not isinstance(value, _FIELDS[name]):
                raise ConfigError(f"{name} = {value!r:.80}: expected {_KINDS[_FIELDS[name]]}")
        if not task.get("command", "").strip():
            raise ConfigError("command is missing: expected a text, as `python agent.py`")
        if "check_files" in task and "check" not in task:
            raise ConfigError("check_files are there without a check: expected both")
        for name in ("command", "check", "instruction"):
            text = task.get(name, "").encode(errors="replace")
            if b"\0" in text or len(text) > _MOST_BYTES:
                raise ConfigError(f"{name}: expected at most {_MOST_BYTES} bytes, none of 0")
        for name in ("files", "check_files"):
            check_files(name, task.get(name, {}))
        for name, value in task.get("variables", {}).items():
            if not isinstance(value, str) or "\0" in name + value or "=" in name or not name:
                raise ConfigError(f"variables: {name!r:.80} = {value!r:.80}: expected a text")
        for folder in task.get("sandbox", []):
            if not isinstance(folder, str) or not _READABLE.fullmatch(folder):
                raise ConfigError(f"sandbox: {folder!r:.80}: expected a folder, as /opt/agent")
            if not Path(folder).is_dir():
                raise ConfigError(f"sandbox: {folder!r:.80}: there is no such folder")
        self._sandboxed |= "sandbox" in task

    async def check_machine(self) -> None:
        if self._sandboxed:
            await Bubblewrap().check_machine()
            if not await asyncio.to_thread(Path("/usr/bin/python3").exists):
                raise StartError("/usr/bin/python3 not found: a task with `sandbox` needs it there")

    def make(self) -> Command:
        return Command()


def create(settings: object) -> CommandKind:
    return CommandKind()


def _addresses(base_url: str, key: str) -> dict[str, str]:
    """How the usual libraries find the model."""
    return {
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_BASE": base_url,
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": base_url.removesuffix("/v1"),
        "ANTHROPIC_API_KEY": key,
    }


def _reward_name() -> str:
    return f".reward-{secrets.token_hex(16)}.json"


def _there(ended: _Ended) -> _Ended:
    """Raises RolloutError if bash could not run the program: that is no fault of the agent."""
    if ended.exit_code in _NOT_THERE:
        raise RolloutError(
            f"bash could not run a program (exit code {ended.exit_code}): {ended.shown[-200:]}"
        )
    return ended
