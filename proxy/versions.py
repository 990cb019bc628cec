"""Which version serves new requests, when an old one is unloaded, and if the engine can serve.

A learner publishes by changing its lineage's serving version in the store. New requests use it,
running ones end on theirs, and an adapter is unloaded when its last request has ended in every
worker. After a restart of the engine the serving adapters are loaded before any request is sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from nextstate.engine.abilities import look
from nextstate.engine.adapter_files import served_folder
from nextstate.engine.client import WARM_UP_ADAPTER, EngineClient, ensure_loaded, withdraw
from nextstate.errors import AdapterError, EngineError, StoreError, WaitError, WrongEngineError
from nextstate.records import BASE_VERSION, PolicyVersion, VersionState, names_adapter
from nextstate.store import Store
from nextstate.store.versions import base_version
from proxy.answers import Refused
from proxy.intervals import INTERVALS, Intervals

log = logging.getLogger(__name__)

_PINNED_S = 60.0
"""Seconds for which an adapter that only episodes ask for stays loaded after a call."""


class Versions:
    """The serving version of every lineage and the engine's state; `run` must be running."""

    def __init__(
        self,
        store: Store,
        engine: EngineClient,
        lineages: Sequence[str],
        zero_adapter: Path,
        worker: str = "",
        intervals: Intervals = INTERVALS,
    ) -> None:
        self.engine = engine
        self.serving: dict[str, PolicyVersion] = {
            name: store.versions.serving(name) for name in lineages
        }
        self.running: Counter[str] = Counter()
        """Running requests by adapter name. A name stays, with 0, until its adapter is unloaded."""
        self._store = store
        self._zero_adapter = zero_adapter
        self._worker = worker
        self._intervals = intervals
        self._pinned_until: dict[str, float] = {}
        """Until when the adapters of episodes that name their version stay loaded, on the monotonic
        clock."""
        self._unload_at = 0.0
        """When adapters may be unloaded again after a failure, on the monotonic clock."""
        self.wrong: str | None = None
        """Why no request can be sent to this server until a person changes something, or None."""
        self.trouble = ""
        """What was the matter when the engine was last looked at; "" if it serves."""
        self._up = asyncio.Event()
        self._known = asyncio.Event()
        """Set if requests can be sent or refused at once."""
        self._failed = asyncio.Event()
        self._logged = ""
        """What was logged last about the engine."""
        self._look_at = 0.0
        self._asking: asyncio.Task[bool] | None = None

    @property
    def up(self) -> bool:
        """Whether requests are sent to the engine."""
        return self._up.is_set()

    async def wait_up(self) -> None:
        """Returns when the engine serves."""
        await self._up.wait()

    async def wait_admitted(self, timeout_s: float) -> None:
        """Like `wait_up`. Raises TimeoutError, and WrongEngineError if only a person can help."""
        async with asyncio.timeout(timeout_s):
            while not self.up:
                if self.wrong is not None:
                    raise WrongEngineError(self.wrong)
                await self._known.wait()

    async def is_well(self) -> bool:
        """Whether the engine can serve, after a request failed. If not, further ones are held.

        All callers at one time share one question to the engine.
        """
        if self.up:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._is_healthy())
            with suppress(WrongEngineError):  # by now it is known to be down
                if not await asyncio.shield(self._asking):
                    self.engine_failed()
        return self.up

    async def _is_healthy(self) -> bool:
        """What the engine says; if it cannot be asked, what was known before.

        Raises WrongEngineError once it is known to be down.
        """
        try:
            return await self.engine.healthy()
        except WrongEngineError:
            if self.up:
                return False
            raise
        except EngineError as error:
            log.warning("%s", error)
            return self.up

    def engine_failed(self) -> None:
        """Holds requests until the engine is back and the serving versions are loaded."""
        self._set(up=False)
        self._failed.set()

    def _set(self, *, up: bool, wrong: str | None = None, trouble: str = "") -> None:
        self.wrong = wrong
        self.trouble = trouble
        if up:
            self._up.set()
        else:
            self._up.clear()
        if up or wrong is not None:
            self._known.set()
        else:
            self._known.clear()

    def engine_refuses_additions(self) -> None:
        """Remembers that the engine accepts no requests with our additions."""
        known = self.engine.abilities
        self.engine.abilities = replace(known, additions=False)

    def serves(self, lineage: str) -> PolicyVersion:
        """The version of new requests: the base if the engine loads no adapters."""
        version = self.serving[lineage]
        loads = version.adapter_name is None or self.engine.abilities.adapters
        return version if loads else base_version(lineage, version.state)

    async def pinned(self, lineage: str, number: int) -> PolicyVersion:
        """A version that an episode asks for, whether it serves or not. Raises Refused.

        The engine's 404 for an adapter that is not loaded makes the call load it. It stays loaded
        for some time after its last call.
        """
        version = await asyncio.to_thread(self._store.versions.get, lineage, number)
        if version is None or not version.can_serve:
            raise Refused(409, f"Version {number} of lineage {lineage!r} is not there any more.")
        if version.adapter_name is not None and not self.engine.abilities.adapters:
            raise Refused(503, f"The engine loads no adapters, so version {number} cannot serve.")
        self._pinned_until[self._name(version)] = time.monotonic() + _PINNED_S
        return version

    @contextmanager
    def hold(self, lineage: str, version: PolicyVersion | None = None) -> Generator[PolicyVersion]:
        """The version, kept loaded for as long as the request runs; None: what serves."""
        version = version or self.serves(lineage)
        name = self._name(version)
        self.running[name] += 1
        try:
            yield version
        finally:
            self.running[name] -= 1

    def number_of(self, served: str | None, version: PolicyVersion) -> int | None:
        """The version that the engine's answer names: `version`, the base, or None for another."""
        if served == self.engine.model:
            return BASE_VERSION
        return version.number if served == version.adapter_name else None

    def is_adapter(self, name: str) -> bool:
        """Whether `name` is that of a version's adapter or of the warm-up adapter."""
        return name == WARM_UP_ADAPTER or names_adapter(name)

    async def restored(self, version: PolicyVersion) -> bool:
        """Loads an adapter that the engine has lost; False if that fails."""
        if version.adapter_name is None:
            return False
        try:
            await ensure_loaded(self.engine, version)
        except AdapterError as error:
            log.error("version=%d cannot be restored: %s", version.number, error)
            if version.number == self.serving[version.lineage].number:
                self.engine_failed()  # requests wait until another version serves
            return False
        except EngineError as error:
            log.warning("version=%d cannot be restored: %s", version.number, error)
            return False
        return True

    async def run(self) -> None:
        """Follows the store and the engine until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_store())
            tasks.create_task(self._watch_engine())

    async def _watch_store(self) -> None:
        database = self._store.database
        while True:
            if database.tells_changes:
                await asyncio.to_thread(database.wait_for_change, self._intervals.told_poll_s)
            else:
                await asyncio.sleep(self._intervals.store_poll_s)
            try:
                found = await asyncio.to_thread(self._store.versions.serving_of, list(self.serving))
                for lineage, version in found.items():
                    old = self.serving[lineage]
                    if version.number != old.number:
                        log.info("version=%d serves lineage=%s", version.number, lineage)
                        self.running[self._name(old)] += 0  # so that it is unloaded once drained
                        self.serving[lineage] = version
                        self._look_at = 0.0  # whether a server takes adapters may count now
                await self._unload_drained()
            except WaitError:
                continue  # the store has logged why
            except Exception:
                log.exception("following the serving versions failed; trying again")

    async def _unload_drained(self) -> None:
        if not self.up or time.monotonic() < self._unload_at:
            return
        needed = self._needed()
        idle = [name for name, count in self.running.items() if not count and name not in needed]
        if not idle:
            return
        elsewhere = await self._in_use_elsewhere()
        for name in idle:
            if name in elsewhere or self.running[name]:
                continue
            if self.is_adapter(name) and not await self._unload(name):
                self._unload_at = time.monotonic() + self._intervals.unload_again_s
            elif not self.running[name]:  # it may have come back into service meanwhile
                del self.running[name]

    def in_use(self) -> list[str]:
        """The adapters that other workers must leave loaded."""
        return sorted(self._needed() | {name for name, count in self.running.items() if count})

    async def _in_use_elsewhere(self) -> set[str]:
        others = await asyncio.to_thread(self._store.workers.others, self._worker)
        return {name for adapters, _ in others for name in adapters}

    def _needed(self) -> set[str]:
        now = time.monotonic()
        pinned = {name for name, until in self._pinned_until.items() if until > now}
        return {self._name(version) for version in self.serving.values()} | pinned

    def _name(self, version: PolicyVersion) -> str:
        return version.adapter_name or self.engine.model

    async def _unload(self, name: str) -> bool:
        """Unloads an adapter. False if it stays loaded."""
        try:
            await self.engine.unload_adapter(name)
        except EngineError as error:
            try:
                if not await self.engine.has_model(name):  # another worker was first
                    return True
            except EngineError:
                pass  # the first error says more
            log.warning("adapter %s stays loaded for now: %s", name, error)
            return False
        return True

    async def _watch_engine(self) -> None:
        pause = self._intervals.down_poll_s
        quiet_until = time.monotonic() + self._intervals.quiet_start_s
        while True:
            self._failed.clear()
            healthy = False
            try:
                healthy = await self._is_healthy()
                if not healthy:
                    why = self.engine.trouble
                    self._set(up=False, trouble=why)
                    if self._logged or time.monotonic() > quiet_until:
                        self._log_new(f"the engine is not there, requests wait: {why}")
                elif not self.up:
                    await self._prepare()
                    self._set(up=True)
                    self._log_new(self._found())
                elif self.engine.abilities.lacks and time.monotonic() > self._look_at:
                    await self._look_again()
            except WrongEngineError as error:
                self._set(up=False, wrong=str(error))
                self._log_new(f"no request is let through: {error}")
            except EngineError as error:
                self._set(up=False, trouble=str(error))
                self._log_new(f"the engine is there, but cannot serve yet: {error}")
            except Exception:
                self._set(up=False)
                log.exception("getting the engine ready failed; trying again")
            if self.up:
                pause = self._intervals.health_poll_s
            elif not healthy or pause == self._intervals.health_poll_s:
                pause = self._intervals.down_poll_s
            else:
                pause = min(2 * pause, self._intervals.slowest_poll_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), pause)

    def _log_new(self, what: str) -> None:
        """Logs a message about the engine, unless it was the last one."""
        if what != self._logged:
            self._logged = what
            level = logging.INFO if self.up and not self.engine.abilities.lacks else logging.WARNING
            log.log(level, "%s (%s)", what, self.engine.url)

    def _found(self) -> str:
        lacks = self.engine.abilities.lacks
        if not lacks:
            return "the engine serves"
        stand_ins = [name for name in self.serving if self.serves(name) != self.serving[name]]
        base = f"; the base model serves in place of the versions of {', '.join(stand_ins)}"
        return (
            f"the engine serves and turns are recorded, but learning lacks {'; '.join(lacks)}"
            f"{base if stand_ins else ''}"
        )

    async def _look_again(self) -> None:
        """Looks if an engine that serves has got what it lacked."""
        try:
            await self._prepare()
        except EngineError as error:
            log.info("the engine could not be looked at again: %s", error)
        self._log_new(self._found())

    async def _prepare(self) -> None:
        """Finds out what the engine can do and loads the serving versions."""
        needed = any(version.adapter_name for version in self.serving.values())
        found = await look(self.engine, self._zero_adapter, adapters=needed)
        if found.adapters:
            for version in list(self.serving.values()):
                await self._load(version)
            await self._forget_retired()
        self.engine.abilities = found
        self._look_at = time.monotonic() + self._intervals.look_again_s

    async def _load(self, version: PolicyVersion) -> None:
        """Loads a serving version, or withdraws it if its adapter has changed on disk."""
        try:
            await ensure_loaded(self.engine, version)
        except AdapterError as error:
            log.error("version=%d cannot serve: %s", version.number, error)
            rejected = replace(version, reason=str(error))
            serving = await withdraw(self._store, self.engine, rejected)
            self.serving[version.lineage] = serving
            await self._load(serving)

    async def _forget_retired(self) -> None:
        """Unloads adapters that an earlier proxy left in the engine, whatever their names.

        They stay if the store cannot be read.
        """
        try:
            versions = await asyncio.to_thread(self._store.versions.all)
            elsewhere = await self._in_use_elsewhere()
        except (StoreError, OSError) as error:
            log.warning("what an earlier proxy left in the engine stays there: %s", error)
            return
        states = {version.adapter_name: version.state for version in versions}
        paths = {version.path for version in versions} - {None}
        ours = paths | {*map(served_folder, filter(None, paths))}
        for model in await self.engine.models():
            over = states.get(model.id) in (VersionState.RETIRED, VersionState.REJECTED)
            over |= model.root in ours and model.id not in states
            if over and not self.running[model.id] and model.id not in elsewhere:
                await self._unload(model.id)
