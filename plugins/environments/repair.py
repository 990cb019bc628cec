"""The environment `repair`: a Python package has a bug, and the agent repairs it in a sandbox.

A task has these fields beside its id:

    instruction   what the agent is asked to do
    files         the package: path to text
    visible       cases that the agent sees as tests, in test_visible.py
    hidden        cases that decide the outcome; the agent never sees them

A case is {"call": "shop.prices.total", "args": [[2, 3]], "gives": 5}, or has "raises":
"ValueError" in the place of "gives". After each step, the process reward is by which share of the
visible cases the package became better or worse. The outcome is 1 if all hidden cases hold.
"""

from __future__ import annotations

import builtins
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import cast

from nextstate.errors import ConfigError
from nextstate.hooks import Acted, Scored
from nextstate.records import Json
from plugins.environments.repair_judge import (
    MOST_CALLS_CHARS,
    PYTEST,
    calls_of,
    check_pytest,
    count_right,
    judge,
    render_tests,
)
from plugins.environments.repair_tasks import numbered
from plugins.environments.terminal import SUBMIT, Terminal, archive_of, check_files, command_of
from plugins.sandboxes.bubblewrap import MOST_COMMAND_BYTES, Bubblewrap, Limits

VISIBLE_FILE = "test_visible.py"
_FIELDS = {"instruction": str, "files": dict, "visible": list, "hidden": list}
_CALL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}(\.[A-Za-z_][A-Za-z0-9_]{0,99}){1,8}")
_SHOW = re.compile(r"show (\S{1,200})")
_REPLACE = re.compile(r"replace (\S{1,200}) (\d{1,6})(?:-(\d{1,6}))?")
_EDIT = (
    "import sys; path, first, last, text = sys.argv[1:]; a, b = int(first), int(last);"
    "lines = open(path).read().split(chr(10)); n = len(lines) - (lines[-1] == '');"
    "0 < a <= b <= n or sys.exit(f'{path} has {n} lines');"
    "lines[a - 1:b] = text.split(chr(10)) if text else [];"
    "open(path, 'w').write(chr(10).join(lines))"
)
_FENCE = "```"
_HOW = f"""\
Answer with one of these, and nothing else:

show PATH
test
replace PATH LINE
THE NEW LINE
submit

`show` numbers the lines, `test` runs pytest, `replace` takes a range of lines as 3-5 too. A command
of bash in a block that begins with {_FENCE}bash and ends with {_FENCE} runs in /task, without a
network. Answer with submit when the package is repaired.
"""


class Repair:
    """One episode with a package."""

    def __init__(self, sandbox: Bubblewrap) -> None:
        self._sandbox = sandbox
        self._terminal = Terminal(sandbox.limits)
        self._visible: Sequence[Json] = []
        self._hidden: Sequence[Json] = []
        self._right = 0
        """How many visible cases hold."""

    async def reset(self, task: Json, seed: int) -> str:
        self._visible, self._hidden = task["visible"], task["hidden"]
        files = {**task["files"], VISIBLE_FILE: render_tests(self._visible)}
        self._terminal.files = archive_of(files)
        self._right = await self._count()
        return f"{task['instruction']}\nFiles: {' '.join(sorted(files))}\n\n{_HOW}"

    async def step(self, action: str) -> Acted:
        command = bash_of(action)
        if command is None:
            return Acted(f"This is none of the answers.\n\n{_HOW}", -1.0, False)
        before = self._terminal.files
        acted = await self._terminal.run(command)
        if acted.done:
            return acted
        right = self._right if self._terminal.files == before else await self._count()
        gained, self._right = right - self._right, right
        return Acted(acted.observation, gained / max(1, len(self._visible)), False)

    async def score(self) -> Scored:
        return await judge(self._sandbox, self._terminal.files, self._hidden)

    async def close(self) -> None:
        await self._terminal.close()

    async def _count(self) -> int:
        return await count_right(self._sandbox, self._terminal.files, self._visible)


class RepairKind:
    """Makes repairs, whose commands have the same limits."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._sandbox = Bubblewrap(limits)

    def check_task(self, task: Json) -> None:
        for name in task.keys() - _FIELDS.keys():
            raise ConfigError(f"unknown field {name!r:.80}: known are {', '.join(_FIELDS)}")
        for name, kind in _FIELDS.items():
            if not isinstance(task.get(name), kind):
                what = {str: "a text", dict: "an object of paths and texts", list: "a list"}[kind]
                raise ConfigError(f"{name} = {task.get(name)!r:.80}: expected {what}")
        check_files("files", task["files"])
        for name in ("visible", "hidden"):
            _check_cases(name, task[name], task["files"])

    def generate(self, split: str, number: int) -> Json:
        return numbered(split, number)

    async def check_machine(self) -> None:
        await self._sandbox.check_machine()
        await check_pytest(self._sandbox)

    def make(self) -> Repair:
        return Repair(self._sandbox)


def create(settings: object) -> RepairKind:
    return RepairKind(settings if isinstance(settings, Limits) else None)


def bash_of(reply: str) -> str | None:
    """The command of bash that an answer stands for; None if it is none of them.

    >>> bash_of("show shop/prices.py")
    "grep -n '' shop/prices.py"
    >>> bash_of("Let me think.") is None
    True
    """
    text = reply.strip()
    first, _, rest = text.partition("\n")
    if (found := _REPLACE.fullmatch(first.rstrip())) is not None:
        path, start, end = found[1], found[2], found[3] or found[2]
        command = shlex.join(["python3", "-I", "-c", _EDIT, path, start, end, rest])
        whole = command.encode(errors="replace")
        return command if b"\0" not in whole and len(whole) <= MOST_COMMAND_BYTES else None
    if _FENCE in text:
        return command_of(reply)
    if "\0" in text:
        return None
    if text == "test":
        return f"PYTHONDONTWRITEBYTECODE=1 python3 {PYTEST}"
    if (found := _SHOW.fullmatch(text)) is not None:
        return shlex.join(["grep", "-n", "", found[1]])
    return SUBMIT if text == SUBMIT else None


def _check_cases(name: str, cases: Sequence[object], files: Mapping[str, str]) -> None:
    """Raises ConfigError unless these are cases of modules that are in `files`."""
    if not cases:
        raise ConfigError(f"{name} = []: expected at least one case")
    for case in cases:
        given = cast(Json, case) if isinstance(case, dict) else {}
        call, expected = given.get("call"), given.keys() - {"call", "args"}
        if not isinstance(call, str) or not _CALL.fullmatch(call):
            raise ConfigError(f"{name}: call = {call!r:.80}: expected package.module.function")
        path = call.rpartition(".")[0].replace(".", "/")
        if f"{path}.py" not in files and f"{path}/__init__.py" not in files:
            raise ConfigError(f"{name}: call = {call!r:.80}: {path}.py is not in files")
        if not isinstance(given.get("args"), list):
            raise ConfigError(f"{name}: args = {given.get('args')!r:.80}: expected a list")
        if expected != {"gives"} and expected != {"raises"}:
            raise ConfigError(f"{name}: {call}: expected either gives or raises, and nothing else")
        raised = given.get("raises", "ValueError")
        if not isinstance(raised, str) or not _is_error(raised):
            raise ConfigError(f"{name}: raises = {raised!r:.80}: expected a name as ValueError")
    size = len(calls_of(cast(Sequence[Json], cases)))
    if size > MOST_CALLS_CHARS:
        most = f"expected at most {MOST_CALLS_CHARS}"
        raise ConfigError(f"{name}: its calls have {size} characters of JSON: {most}")


def _is_error(name: str) -> bool:
    """Whether a test may name this exception without an import."""
    found = getattr(builtins, name, None)
    return isinstance(found, type) and issubclass(found, Exception)
