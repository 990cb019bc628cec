"""Child processes that are kept running: started, watched, restarted and ended together.

Each child has its own process group, so that ending it also ends its workers, and it is killed when
the supervisor dies. A child that exits with code 2 needs a person: it is paused until its
configuration changes, the engine restarts, or some time has passed.
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
from functools import partial
from pathlib import Path

from nextstate.app import log_files
from nextstate.errors import EXIT_USAGE, StartError
from nextstate.private_files import make_folder

log = logging.getLogger(__name__)

GRACE_S = 15.0
"""Between the request to end and the kill."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a supervisor waits, in seconds; restart pauses double up to the longest."""

    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    steady_s: float = 60.0
    """A child that ran this long is restarted after the first pause again."""
    poll_s: float = 1.0
    """Between two checks of whether the cause of a pause is gone."""
    rotate_s: float = 2.0
    """Between two checks of the log files."""
    max_log_bytes: int = log_files.MAX_BYTES


@dataclass(slots=True)
class Child:
    """One child process and what is known about it."""

    name: str
    argv: Sequence[str]
    log_file: Path
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    cpus: frozenset[int] | None = None
    """The logical CPUs that it may use (Linux only); None: all of ours."""
    explain: Callable[[str], str] | None = None
    """Explains the log of a failed start. If such a child dies before it is ready, all end."""
    was_ready: bool = False
    """Once True, the child's death no longer ends the others."""
    death_signal: int = signal.SIGTERM
    """What it gets when its supervisor dies."""
    retry_on_change: Sequence[Path] = ()
    """Files that may cause an exit with code 2: a change ends the pause."""
    retry_with: Sequence[str] = ()
    """Other children that may cause an exit with code 2: their restart ends the pause."""
    pauses_s: tuple[float, float] = (600.0, 6 * 3600.0)
    """First and longest pause after code 2. Loading a model again takes time from the others."""
    starts: int = 0
    state: str = "not started"
    """What `nextstate status` shows."""
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)


class Backoff:
    """Pauses that double up to the longest; a long run starts them over."""

    def __init__(self, first_s: float, longest_s: float, steady_s: float | None = None) -> None:
        """A run is long if it took more than `steady_s`; None: more than the coming pause."""
        self._first_s, self._longest_s, self._steady_s = first_s, longest_s, steady_s
        self._next_s = first_s

    def pause_s(self, ran_s: float) -> float:
        """The pause after a run of `ran_s` seconds."""
        if ran_s > (self._next_s if self._steady_s is None else self._steady_s):
            self._next_s = self._first_s
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, self._longest_s)
        return pause_s


class Supervisor:
    """Runs children until `stopping` is set; they are ended in the order of the list."""

    def __init__(
        self,
        children: Sequence[Child],
        on_change: Callable[[], None] = lambda: None,
        *,
        stopping: asyncio.Event | None = None,
        timing: Timing | None = None,
    ) -> None:
        """`on_change` is called after each change of a child's state."""
        self.children = children
        self.stopping = stopping or asyncio.Event()
        self._on_change = on_change
        self._timing = timing or Timing()

    async def run(self) -> None:
        """Returns when stopped. Raises StartError when a child cannot start at all."""
        keepers = [asyncio.create_task(self._keep(child)) for child in self.children]
        stopped = asyncio.create_task(self.stopping.wait())
        rotating = asyncio.create_task(self._rotate_logs())
        try:
            await asyncio.wait({stopped, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.stopping.set()
            for child in self.children:
                await end(child)
            rotating.cancel()
            results = await asyncio.gather(*keepers, return_exceptions=True)
            await asyncio.gather(stopped, rotating, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _rotate_logs(self) -> None:
        while True:
            for child in self.children:
                try:
                    limit = self._timing.max_log_bytes
                    await asyncio.to_thread(log_files.rotate, child.log_file, limit)
                except OSError as error:
                    log.warning("the log of %s cannot be rotated: %s", child.name, error)
            await asyncio.sleep(self._timing.rotate_s)

    async def _keep(self, child: Child) -> None:
        timing = self._timing
        restarts = Backoff(timing.first_pause_s, timing.longest_pause_s, timing.steady_s)
        refusals = Backoff(*child.pauses_s)
        while not self.stopping.is_set():
            started, causes = time.monotonic(), self._causes(child)
            code, reason = await self._run_once(child)
            if self.stopping.is_set():
                return
            if not child.was_ready and (code == EXIT_USAGE or child.explain):
                raise StartError(reason)
            ran_s = time.monotonic() - started
            if code == EXIT_USAGE:
                pause_s = refusals.pause_s(ran_s)
                log.error("%s stopped, the others go on: %s", child.name, reason)
                self._set_state(child, f"stopped: {reason}; {_next_try(child, pause_s)}")
                await self._pause(child, causes, pause_s)
            else:
                child.was_ready = True  # it could start, so from now on it ends nobody else
                pause_s = restarts.pause_s(ran_s)
                log.warning("%s ended, restarting in %.0f s: %s", child.name, pause_s, reason)
                self._set_state(child, f"restarting: {reason}")
                await self._wait(pause_s)

    async def _run_once(self, child: Child) -> tuple[int, str]:
        """The child's exit code and the reason, also if no process could be started."""
        log_start = child.log_file.stat().st_size if child.log_file.exists() else 0
        try:
            process = await start(child)
        except OSError as error:  # no room for its log, or no process or file descriptor left
            reason = f"{child.name} cannot be started: {error}"
            if not child.was_ready:
                raise StartError(reason) from error
            return os.EX_OSERR, reason
        self._set_state(child, "up")
        code = await process.wait()
        _kill_group(process.pid)  # workers that outlived their leader
        return code, _reason(child, code, log_files.tail(child.log_file, log_start))

    async def _pause(self, child: Child, causes: object, pause_s: float) -> None:
        """Returns after `pause_s`, when `causes` have changed since the start, or when stopping."""
        until = time.monotonic() + pause_s
        while not self.stopping.is_set() and self._causes(child) == causes:
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            await self._wait(min(left_s, self._timing.poll_s))

    def _causes(self, child: Child) -> object:
        """What may have made a child exit with code 2, as values that change when it changes."""
        others = [other for other in self.children if other.name in child.retry_with]
        # All start together: another child's first start is no change.
        return [
            *(_modified_ns(file) for file in child.retry_on_change),
            *(max(1, other.starts) for other in others),
        ]

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    def _set_state(self, child: Child, state: str) -> None:
        child.state = state
        self._on_change()


async def start(child: Child) -> asyncio.subprocess.Process:
    """Starts the child in its own process group; its output is appended to its log."""
    make_folder(child.log_file.parent)
    with child.log_file.open("ab") as output:
        child.process = await asyncio.create_subprocess_exec(
            *child.argv,
            env=child.env,
            cwd=child.cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=partial(_prepare, child) if sys.platform == "linux" else None,
        )
    child.starts += 1
    return child.process


async def end(child: Child, grace_s: float = GRACE_S) -> None:
    """Ends the child's whole process group: SIGTERM first, SIGKILL after `grace_s`."""
    process = child.process
    if process is None:
        return
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            log.warning("%s did not end within %.0f s and is killed", child.name, grace_s)
    _kill_group(process.pid)
    await process.wait()


def _kill_group(pgid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)


def _prepare(child: Child) -> None:
    """Runs in the child before its program: it dies with its parent and keeps to its CPUs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, child.death_signal)
    if child.cpus is not None:
        os.sched_setaffinity(0, child.cpus)


def _modified_ns(path: Path) -> int | None:
    """When a file was last written; None if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _next_try(child: Child, pause_s: float) -> str:
    """When a paused child is started again, for `nextstate status`."""
    events = [f"{file} changes" for file in child.retry_on_change]
    events += [f"the {name} restarts" for name in child.retry_with]
    return f"tried again {''.join(f'when {event}, ' for event in events)}or in {pause_s / 60:g} min"


def _reason(child: Child, code: int, log_text: str) -> str:
    """Why a child ended: its last line after code 2, else an explanation and its log's path."""
    lines = [line for line in log_text.splitlines() if line.strip()]
    explain = None if child.was_ready else child.explain
    if explain is None and code == EXIT_USAGE and lines:
        return lines[-1].removeprefix("nextstate: ")
    cause = explain(log_text) if explain else f"{child.name} ended with code {code}"
    return f"{cause}; the whole log is {child.log_file}"
