"""The environment `terminal`: the agent runs bash in a sandbox until it submits.

A task has these fields beside its id:

    instruction   what the agent is asked to do
    check         a command of bash that exits with 0 if the task is solved
    files         the files that lie in /task at the beginning: path to text (optional)
    setup         a command that runs before the agent, such as a generator of files (optional)
    check_files   files that are added for the check, in the place of the agent's: below /task, or
                  in one of check_folders, as /tests/a.py. The agent never sees them (optional)
    sandbox       bubblewrap, docker:IMAGE or podman:IMAGE (optional; by default bubblewrap)
    work          the folder of the agent, in the place of /task (optional)
    check_folders further folders that the check may write to, empty at first (optional)

`setup` and `check` get the group's seed as $SEED. `check` runs after the agent has ended, in a
sandbox of its own with what the agent left in /task. It runs as the same user as the programs that
it starts, so a check that runs a program of the agent trusts it: let it compare files. A file that
its owner may not read is not kept from one command to the next.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import cast

from nextstate.errors import ConfigError, RolloutError
from nextstate.hooks import Acted, Scored
from nextstate.records import Json
from plugins.environments.laying import laid
from plugins.environments.long_texts import both_ends_of
from plugins.environments.terminal_tasks import numbered
from plugins.sandboxes.choice import DEFAULT, make_sandbox
from plugins.sandboxes.protocol import MOST_COMMAND_BYTES, Folders, Limits, Sandbox

SUBMIT = "submit"
MOST_SHOWN = 4000
"""Characters of an output that the agent sees: its beginning and its end."""
_FIELDS = {
    "instruction": str,
    "check": str,
    "files": dict,
    "setup": str,
    "check_files": dict,
    "sandbox": str,
    "work": str,
    "check_folders": list,
}
_NAMES = {str: "a text", dict: "an object of paths and texts", list: "a list of folders"}
_FOLDER = re.compile(
    r"/(?!(?:usr|bin|lib|lib64|etc|proc|sys|dev|tmp)(?:/|$))[\w-]{1,40}(?:/[\w-]{1,40}){0,4}"
)
"""A folder of a sandbox that is not part of its system."""
_NEEDED = ("instruction", "check")
_MOST_FILES_CHARS = 4 << 20
_MOST_CHECK_BYTES = MOST_COMMAND_BYTES // 2
"""What lays the check's files comes before it."""
_FENCE = "```"
_LANGUAGES = ("", "bash", "sh", "shell")
_ESCAPES = re.compile(r"\x1b\[[0-?]{0,32}[ -/]{0,8}[@-~]")
"""Colours and cursor movements of a terminal."""
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}
_HOW = """\
You work in a bash shell in the folder {work}. Answer with one command, or several lines, in a
block:

```bash
ls
```

You get its exit code and output. Each command begins in {work}; only files in {work} are kept.
There is no network. When the task is done, answer with the block:

```bash
submit
```
"""


class Terminal:
    """One episode in a shell."""

    def __init__(self, limits: Limits | None) -> None:
        self._limits = limits
        self._sandbox: Sandbox = make_sandbox(DEFAULT, limits)
        self._task: Json = {}
        self._variables: Mapping[str, str] = {}
        self.files = b""
        """What /task holds, as tar archives in a row."""

    async def reset(self, task: Json, seed: int) -> str:
        self._task, self._variables = task, {"SEED": str(seed)}
        work = task.get("work", "/task")
        self._sandbox = self._made(Folders(work))
        self.files = archive_of(task.get("files", {}))
        if "setup" in task:
            ran = await self._sandbox.run(task["setup"], self.files, self._variables)
            if ran.exit_code or ran.files is None:
                raise RolloutError(
                    f"setup of the task ended with exit code {ran.exit_code}: "
                    f"{readable(ran.output)[-200:]!r}"
                )
            self.files = ran.files
        return opening(task)

    async def step(self, action: str) -> Acted:
        command = command_of(action)
        if command is None:
            return Acted(
                f"Expected exactly one block that begins with {_FENCE}bash and ends with {_FENCE}, "
                f"with a command of at most {MOST_COMMAND_BYTES} bytes in it.",
                -1.0,
                False,
            )
        return await self.run(command)

    async def run(self, command: str) -> Acted:
        """Runs a command, which Bubblewrap takes; `submit` ends the episode."""
        if command == SUBMIT:
            return Acted("Submitted.", None, True)
        ran = await self._sandbox.run(command, self.files)
        lines = [f"exit code {ran.exit_code}"]
        if ran.exit_code == 124:
            lines.append(f"(a command is ended after {self._sandbox.limits.wall_s:g} seconds)")
        if ran.files is None:
            lines.append("(the command broke the sandbox: /task is as it was before)")
        else:
            self.files = ran.files
        lines += [readable(ran.output)] * bool(ran.output)
        if ran.cut:
            lines.append(f"(cut after {self._sandbox.limits.output_bytes} bytes)")
        return Acted("\n".join(lines), -1.0 if ran.exit_code else 0.0, False)

    async def score(self) -> Scored:
        fresh = tuple(self._task.get("check_folders", ()))
        added, check = laid(self._task.get("check_files", {}), self._task["check"], fresh)
        sandbox = self._made(Folders(self._task.get("work", "/task"), fresh))
        ran = await sandbox.run(check, self.files + archive_of(added), self._variables)
        shown = f"check: exit code {ran.exit_code}\n{readable(ran.output)}".strip()
        return Scored(float(ran.exit_code == 0), shown)

    async def close(self) -> None:
        """Nothing is left: each command's sandbox ended with it."""

    def _made(self, folders: Folders) -> Sandbox:
        return make_sandbox(self._task.get("sandbox", DEFAULT), self._limits, folders)


class TerminalKind:
    """Makes terminals, whose commands have the same limits."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits
        self._needed: set[str] = set()
        """The sandboxes of the tasks that were checked."""

    def check_task(self, task: Json) -> None:
        for name, value in task.items():
            if name not in _FIELDS:
                raise ConfigError(f"unknown field {name!r:.80}: known are {', '.join(_FIELDS)}")
            if not isinstance(value, _FIELDS[name]):
                raise ConfigError(f"{name} = {value!r:.80}: expected {_NAMES[_FIELDS[name]]}")
        for name in _NEEDED:
            if not task.get(name, "").strip():
                raise ConfigError(f"{name} is missing: expected a text")
        for name in ("check", "setup"):
            command = task.get(name, "").encode(errors="replace")
            if b"\0" in command or len(command) > _MOST_CHECK_BYTES:
                raise ConfigError(f"{name}: expected at most {_MOST_CHECK_BYTES} bytes, none of 0")
        for folder in (task.get("work", "/task"), *task.get("check_folders", [])):
            if not isinstance(folder, str) or not _FOLDER.fullmatch(folder):
                raise ConfigError(f"work or check_folders: {folder!r:.80}: expected one as /app")
        check_files("files", task.get("files", {}))
        check_files("check_files", task.get("check_files", {}), task.get("check_folders", []))
        sandbox = task.get("sandbox", DEFAULT)
        make_sandbox(sandbox)
        self._needed.add(sandbox)

    async def check_machine(self) -> None:
        for name in sorted(self._needed or {DEFAULT}):
            await make_sandbox(name).check_machine()

    def make(self) -> Terminal:
        return Terminal(self._limits)

    def generate(self, split: str, number: int) -> Json:
        return numbered(split, number)


def create(settings: object) -> TerminalKind:
    return TerminalKind(settings if isinstance(settings, Limits) else None)


def opening(task: Json) -> str:
    """What the agent of a task sees first."""
    return f"{task['instruction']}\n\n{_HOW.format(work=task.get('work', '/task'))}"


def command_of(reply: str) -> str | None:
    """The command in the one fenced block of a reply; None if there is not exactly one.

    >>> command_of("I look.\\n```bash\\nls -l\\n```")
    'ls -l'
    >>> command_of("ls -l") is None
    True
    """
    blocks: list[list[str]] = []
    inside = False
    for line in reply.split("\n"):
        mark = line.strip()
        if inside and mark == _FENCE:
            inside = False
        elif inside:
            blocks[-1].append(line)
        elif mark.startswith(_FENCE):
            if mark[len(_FENCE) :].strip().lower() not in _LANGUAGES:
                return None
            blocks.append([])
            inside = True
    if inside or len(blocks) != 1:
        return None
    command = "\n".join(blocks[0]).strip()
    raw = command.encode(errors="replace")
    return command if raw and b"\0" not in raw and len(raw) <= MOST_COMMAND_BYTES else None


def readable(output: bytes) -> str:
    """An output as text without control characters; of a long one its beginning and its end.

    >>> readable(b"\\x1b[31mred\\x1b[0m\\x07\\n")
    'red\\\\x07'
    """
    text = _ESCAPES.sub("", output.decode(errors="replace").replace("\r\n", "\n"))
    return both_ends_of(text.translate(_CONTROLS).strip("\n"), MOST_SHOWN)


def check_files(name: str, files: Mapping[object, object], folders: Sequence[str] = ()) -> None:
    """Checks a field of paths and texts, perhaps in one of the folders. Raises ConfigError."""
    size = 0
    for path, text in files.items():
        named = cast(str, path)
        parts = PurePosixPath(named).parts
        outside = named.startswith("/") and not named.startswith(tuple(f"{f}/" for f in folders))
        if not parts or outside or ".." in parts or "\0" in named or named.endswith("/"):
            raise ConfigError(f"{name}: {path!r:.80}: expected a path below /task, as src/a.py")
        if not isinstance(text, str):
            raise ConfigError(f"{name}: {path!r:.80} = {text!r:.80}: expected a text")
        size += len(text)
    if size > _MOST_FILES_CHARS:
        raise ConfigError(f"{name} has {size} characters: expected at most {_MOST_FILES_CHARS}")


def archive_of(files: Mapping[str, str]) -> bytes:
    """A tar archive of text files, the same bytes for the same files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, text in sorted(files.items()):
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
