"""Child processes that stay up: started, watched, restarted with back-off, and ended together.

Each part has its own process group, so that ending it ends the workers it left behind, and dies
with the supervisor even when that is killed. One that says that only a person can help it rests
until something about its cause has changed: the configuration, the engine, or time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nextstate import logs
from nextstate.errors import StartError
from nextstate.private_files import make_folder

log = logging.getLogger(__name__)

EXIT_USAGE = 2
"""What a part exits with when only a person can help: before all was ready, that ends the rest."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0
"""A part that ran this long starts over with the shortest pause."""
RESTS_S = 600.0, 6 * 3600.0
"""First and longest rest of a part that only a person can help: loading a model again for the same
refusal takes minutes from everybody else."""
SHORT_RESTS_S = LONGEST_PAUSE_S, LONGEST_PAUSE_S
"""Of a part that agents wait for."""
_LOOK_S = 1.0
"""Between two looks at whether the cause of a rest is gone."""
GRACE_S = 15.0
LOOK_AT_LOGS_S = 2.0
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Part:
    """One child process and what is known about it."""

    name: str
    argv: Sequence[str]
    log_file: Path
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    must_become_ready: bool = False
    """True for a part whose death of any kind before it was ready ends everything."""
    explain: Callable[[str], str] | None = None
    """Turns the log of a failed start into one sentence; a later end is told by its code."""
    was_ready: bool = False
    """Once True, no end of the part ends the others: it is restarted, or rests."""
    watched: Sequence[Path] = ()
    """Files that may hold the cause of a refusal: it rests no longer once one of them changes."""
    follows: Sequence[str] = ()
    """Other parts that may be the cause of a refusal: it rests until one of them starts anew."""
    rests_s: tuple[float, float] = RESTS_S
    restarts: int = 0
    starts: int = 0
    state: str = "not started"
    """What `nextstate status` shows."""
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.returncode is None


class Supervisor:
    """Runs parts until `stop`; give them in the order in which they should end."""

    def __init__(self, parts: Sequence[Part], tell: Callable[[], None] = lambda: None) -> None:
        """`tell` is called after each change of a part's state."""
        self.parts = parts
        self.stopping = asyncio.Event()
        self._tell = tell

    async def run(self) -> None:
        """Returns when stopped; raises StartError when a part cannot start at all."""
        keepers = [asyncio.create_task(self._keep(part)) for part in self.parts]
        stopped = asyncio.create_task(self.stopping.wait())
        rotating = asyncio.create_task(self._rotate_logs())
        try:
            await asyncio.wait({stopped, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.stopping.set()
            stopped.cancel()
            for part in self.parts:
                await end(part)
            rotating.cancel()
            results = await asyncio.gather(*keepers, return_exceptions=True)
            await asyncio.gather(rotating, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _rotate_logs(self) -> None:
        while True:
            for part in self.parts:
                try:
                    await asyncio.to_thread(logs.rotate, part.log_file)
                except OSError as error:
                    log.warning("the log of %s cannot be rotated: %s", part.name, error)
            await asyncio.sleep(LOOK_AT_LOGS_S)

    def stop(self) -> None:
        """Asks `run` to end every part and return."""
        self.stopping.set()

    async def _keep(self, part: Part) -> None:
        pause, rest = FIRST_PAUSE_S, part.rests_s[0]
        while not self.stopping.is_set():
            started, signs = time.monotonic(), self._signs(part)
            code, last_words = await self._run_once(part)
            if self.stopping.is_set():
                return
            if not part.was_ready and (code == EXIT_USAGE or part.must_become_ready):
                raise StartError(last_words)
            ran_s = time.monotonic() - started
            part.restarts += 1
            if code == EXIT_USAGE:
                rest = part.rests_s[0] if ran_s > rest else rest
                log.error("%s stopped, the others go on: %s", part.name, last_words)
                self._say(part, f"stopped: {last_words}; {_comes_back(part, rest)}")
                await self._rest(part, signs, rest)
                rest = min(2 * rest, part.rests_s[1])
                continue
            if ran_s > STEADY_S:
                pause = FIRST_PAUSE_S
            log.warning("%s ended, restarting in %.0f s: %s", part.name, pause, last_words)
            self._say(part, f"restarting: {last_words}")
            await self._wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _run_once(self, part: Part) -> tuple[int, str]:
        """How the part's process ended, and its last words; also where none could be started."""
        log_start = part.log_file.stat().st_size if part.log_file.exists() else 0
        try:
            await start(part)
        except OSError as error:  # no room for its log, no process or file to be had
            if not part.was_ready:
                raise StartError(f"{part.name} cannot be started: {error}") from error
            return os.EX_OSERR, f"{part.name} cannot be started: {error}"
        self._say(part, "up")
        assert part.process is not None
        code = await part.process.wait()
        _kill_group(part.process.pid)  # workers that outlived their leader
        return code, _obituary(part, code, logs.tail(part.log_file, log_start))

    async def _rest(self, part: Part, signs: object, rest_s: float) -> None:
        """Returns once the cause of a refusal may be gone, after `rest_s`, or when stopping.

        `signs` are those that the part was started with.
        """
        until = time.monotonic() + rest_s
        while not self.stopping.is_set() and self._signs(part) == signs:
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            await self._wait(min(left_s, _LOOK_S))

    def _signs(self, part: Part) -> object:
        """What changes when somebody has done something about a part's refusal."""
        files = [_written(file) for file in part.watched]
        others = [other for other in self.parts if other.name in part.follows]
        # A first start is nothing new: all parts start together.
        return files, [max(1, other.starts) for other in others]

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    def _say(self, part: Part, state: str) -> None:
        part.state = state
        self._tell()


async def start(part: Part) -> None:
    """Starts the part's process in its own group, its output appended to its log."""
    make_folder(part.log_file.parent)
    with part.log_file.open("ab") as output:
        part.process = await asyncio.create_subprocess_exec(
            *part.argv,
            env=part.env,
            cwd=part.cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    part.starts += 1


async def end(part: Part, grace_s: float = GRACE_S) -> None:
    """Ends the part's whole process group: politely, then by force."""
    process = part.process
    if process is None:
        return
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            log.warning("%s did not end within %.0f s and is killed", part.name, grace_s)
    _kill_group(process.pid)
    await process.wait()


def _kill_group(pgid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _written(path: Path) -> int | None:
    """When a file was last written; None without one."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _comes_back(part: Part, rest_s: float) -> str:
    """When a part that rests is started again."""
    causes = [f"{file} changes" for file in part.watched]
    causes += [f"the {name} restarts" for name in part.follows]
    return f"tried again {''.join(f'when {cause}, ' for cause in causes)}or in {rest_s / 60:g} min"


def _obituary(part: Part, code: int, text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    explain = None if part.was_ready else part.explain
    if explain is None and code == EXIT_USAGE and lines:
        return lines[-1].removeprefix("nextstate: ")
    cause = explain(text) if explain else f"{part.name} ended with code {code}"
    return f"{cause}; the whole log is {part.log_file}"
