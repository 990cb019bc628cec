"""The engines of versions that are whole models: started, watched and ended beside the base's.

The version that serves always has an engine, and one that somebody wants to put into service gets
one (`nextstate/engine/whole.py`). What served before keeps its engine until another one needs the
place and its requests have ended, so a return to it takes no start. Before a start the memory is
counted; if it is too small for another engine, the start is refused and everything else goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nextstate.app import log_files
from nextstate.app.supervisor import Backoff, Child, end, start
from nextstate.engine.adapter_files import verify_adapter
from nextstate.engine.client import EngineClient
from nextstate.engine.process import cause_of_death
from nextstate.engine.whole import (
    START_TIMEOUT_S,
    UP,
    WANTED,
    WholeEngine,
    engine_of,
    failed,
    forget_engine,
    read_engines,
    write_engine,
)
from nextstate.errors import AdapterError, EngineError
from nextstate.records import MAIN_LINEAGE, PolicyVersion
from nextstate.store import Store

log = logging.getLogger(__name__)

POLL_S = 0.2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
"""Before the engine of the version that serves is started again."""
_LOG_EVERY_S = 60.0
_DRAIN_S = 600.0
"""How long an engine may go on with requests of a version that no longer serves, if its place is
needed."""


@dataclass(slots=True)
class _Running:
    engine: WholeEngine
    child: Child
    client: EngineClient
    log_start: int
    started: float
    retired: float | None = None
    """When its version was first seen not to serve, on the monotonic clock."""

    @property
    def code(self) -> int | None:
        """The process's exit code; None while it runs."""
        return self.child.process.returncode if self.child.process else -1


class EnginePool:
    """The engines of one state folder; `run` must be running."""

    def __init__(
        self,
        store: Store,
        base: EngineClient,
        make: Callable[[WholeEngine], tuple[Child, str]],
        room: Callable[[], str | None],
        on_change: Callable[[], None] = lambda: None,
        *,
        exact: bool = False,
        poll_s: float = POLL_S,
    ) -> None:
        """`base` is a client of the base's engine.

        `make` returns a process for a version's engine and the address where it will be; `room`
        says why no further engine fits now, or None. `exact`: they compute in float32.
        """
        self._store = store
        self._base = base
        self._make = make
        self._room = room
        self._on_change = on_change
        self._exact = exact
        self._poll_s = poll_s
        self._running: dict[str, _Running] = {}
        self._restarts = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, 60.0)
        self._again_at = 0.0
        """When the serving version's engine may be started again, on the monotonic clock."""
        self._tight = False
        """Whether the serving version's engine ended before it was up: it may lack memory."""

    @property
    def children(self) -> list[Child]:
        """The processes."""
        return [one.child for one in self._running.values()]

    async def run(self, stopping: asyncio.Event) -> None:
        """Returns when `stopping` is set and all its engines have ended."""
        quiet_until = 0.0
        try:
            while not stopping.is_set():
                try:
                    await self._look()
                except Exception:
                    if time.monotonic() >= quiet_until:
                        log.exception("following the versions' engines failed; trying again")
                        quiet_until = time.monotonic() + _LOG_EVERY_S
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), self._poll_s)
        finally:
            for name in [*self._running]:
                await self._end(name)

    async def _look(self) -> None:
        serving = await asyncio.to_thread(self._store.versions.serving, MAIN_LINEAGE)
        told = await asyncio.to_thread(read_engines, self._store.dir)
        for name in [n for n, one in told.items() if one.state == UP and n not in self._running]:
            forget_engine(self._store.dir, name)  # its pool was killed
            del told[name]
        for name, one in [*self._running.items()]:
            await asyncio.to_thread(log_files.rotate, one.child.log_file)
            await self._follow(one, told.get(name), serving)
        wanted = [e for e in told.values() if e.state == WANTED and e.name not in self._running]
        name = serving.adapter_name
        if serving.is_whole_model and name not in self._running:
            wanted = [e for e in wanted if e.name != name]
            if time.monotonic() >= self._again_at:
                try:
                    wanted.insert(0, engine_of(serving))
                except AdapterError as error:
                    await self._withdraw(serving, str(error))
        for engine in wanted:
            await self._start(engine, serving)

    async def _follow(
        self, one: _Running, told: WholeEngine | None, serving: PolicyVersion
    ) -> None:
        """Notes what has become of an engine."""
        name, serves = one.engine.name, one.engine.name == serving.adapter_name
        late = one.engine.state != UP and time.monotonic() > one.started + START_TIMEOUT_S
        if one.code is not None or late:
            said = log_files.tail(one.child.log_file, one.log_start)
            why = "it was not ready in time" if late else f"it ended with code {one.code}"
            if one.engine.state != UP and not late:
                why = f"vLLM ended before it could serve: {cause_of_death(said)}"
            why += f"; the whole log is {one.child.log_file}"
            log.warning("version=%d its engine is gone: %s", one.engine.number, why)
            await self._end(name)
            if serves:
                self._tight = one.engine.state != UP
                self._again_at = time.monotonic() + self._restarts.pause_s(
                    time.monotonic() - one.started
                )
            elif one.engine.state != UP:
                write_engine(self._store.dir, failed(one.engine, why))
            return
        if one.engine.state != UP and await one.client.healthy():
            one.engine = replace(one.engine, state=UP, exact=self._exact)
            one.child.was_ready = True
            log.info("version=%d its engine is up", one.engine.number)
            self._on_change()
        if one.engine.state == UP and told != one.engine:  # also one that is wanted again
            write_engine(self._store.dir, one.engine)
        one.retired = None if serves else one.retired or time.monotonic()

    async def _start(self, engine: WholeEngine, serving: PolicyVersion) -> None:
        serves = engine.name == serving.adapter_name
        try:
            await asyncio.to_thread(verify_adapter, Path(engine.path), engine.sha256)
        except AdapterError as error:
            if serves:
                return await self._withdraw(serving, str(error))
            return write_engine(self._store.dir, failed(engine, str(error)))
        except EngineError as error:  # it cannot be read for now
            log.warning("version=%d its engine cannot start: %s", engine.number, error)
            if serves:
                self._again_at = time.monotonic() + _FIRST_PAUSE_S
                return None
            return write_engine(self._store.dir, failed(engine, str(error)))
        drain: list[bool | None] = []
        if await self._needs_places(serving):
            drain = [await self._may_end(one) for one in [*self._running.values()]]
        why = await asyncio.to_thread(self._room)
        if why is not None:
            if False in drain:
                return  # until their requests have ended
            if serves:
                log.error("version=%d its engine cannot start: %s", engine.number, why)
                self._again_at = time.monotonic() + _LONGEST_PAUSE_S
            else:
                write_engine(self._store.dir, failed(engine, why))
            return
        child, url = self._make(engine)
        child.state = "up"
        begins = child.log_file.stat().st_size if child.log_file.exists() else 0
        client = self._base.twin(url, engine.name)
        one = _Running(replace(engine, url=url), child, client, begins, time.monotonic())
        try:
            await start(child)
        except OSError as error:
            await client.close()
            write_engine(self._store.dir, failed(engine, f"it cannot be started: {error}"))
            return
        self._running[engine.name] = one
        self._on_change()

    async def _needs_places(self, serving: PolicyVersion) -> bool:
        """Whether engines that nothing needs may be ended for another one.

        Until the serving version's engine is up, the one before it answers, if there is room.
        """
        engines = [one.engine for one in self._running.values()]
        is_up = any(one.name == serving.adapter_name and one.state == UP for one in engines)
        if is_up or not serving.is_whole_model or self._tight:
            return True
        return await asyncio.to_thread(self._room) is not None

    async def _may_end(self, one: _Running) -> bool | None:
        """Ends an engine that nothing needs. False if requests run on it, None if it is needed."""
        if one.retired is None or one.engine.state != UP:
            return None
        if time.monotonic() < one.retired + _DRAIN_S:
            try:
                if await one.client.live_requests():
                    return False
            except EngineError as error:
                log.info("version=%d its engine is ended: %s", one.engine.number, error)
        serving = await asyncio.to_thread(self._store.versions.serving, MAIN_LINEAGE)
        if one.engine.name == serving.adapter_name:  # somebody returned to it meanwhile
            return None
        await self._end(one.engine.name)
        return True

    async def _withdraw(self, version: PolicyVersion, reason: str) -> None:
        """Puts the nearest ancestor whose weights are intact into the place of what serves."""
        log.error("version=%d cannot serve: %s", version.number, reason)
        rejected, stored = replace(version, reason=reason), self._store.versions
        decisions = await asyncio.to_thread(stored.decisions, version.lineage)
        for ancestor in await asyncio.to_thread(stored.ancestors, rejected):
            if ancestor.is_whole_model:
                try:
                    engine = engine_of(ancestor)
                    await asyncio.to_thread(verify_adapter, Path(engine.path), engine.sha256)
                except AdapterError as error:
                    log.error("version=%d cannot be used: %s", ancestor.number, error)
                    continue
            await asyncio.to_thread(
                stored.replace_serving, rejected, ancestor.number, decisions.choices
            )
            return

    async def _end(self, name: str) -> None:
        one = self._running.pop(name)
        forget_engine(self._store.dir, name)
        await end(one.child)
        await one.client.close()
        self._on_change()
