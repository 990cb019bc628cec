"""Which version new requests take, when an old one may go, and whether the engine can serve.

A learner publishes by flipping its lineage's serving version in the store. Here new requests follow
it, running ones finish on theirs, and an adapter unloads when its last request has ended, in every
worker. After an engine restart the serving adapters are loaded again before any request is let
through.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from nextstate.engine import WARM_UP_ADAPTER, EngineClient, ensure_loaded, warm_up, withdraw
from nextstate.errors import AdapterError, EngineError
from nextstate.records import BASE_VERSION, PolicyVersion, VersionState
from nextstate.store import Store

log = logging.getLogger(__name__)

STORE_POLL_S = 0.05
HEALTH_POLL_S = 1.0
DOWN_POLL_S = 0.2
UNLOAD_AGAIN_S = 10.0
_ADAPTER = re.compile(r"\A(?P<lineage>.+)-v(?P<number>\d{6})\Z")


class Versions:
    """The serving version of every lineage and the engine's state; `run` must be running."""

    def __init__(
        self,
        store: Store,
        engine: EngineClient,
        lineages: Sequence[str],
        zero_adapter: Path,
        worker: str = "",
    ) -> None:
        self.engine = engine
        self.serving: dict[str, PolicyVersion] = {name: store.serving(name) for name in lineages}
        self.running: Counter[str] = Counter()
        """Requests under way for each adapter name, and those that were: until it is unloaded."""
        self._store = store
        self._zero_adapter = zero_adapter
        self._worker = worker
        self._unload_at = 0.0
        """On the monotonic clock; later than now after a failure."""
        self._up = asyncio.Event()
        self._failed = asyncio.Event()

    @property
    def up(self) -> bool:
        """Whether requests are let through."""
        return self._up.is_set()

    async def wait_up(self) -> None:
        """Returns when the engine serves."""
        await self._up.wait()

    def engine_failed(self) -> None:
        """Tells that a request could not reach the engine: hold further ones until it is back."""
        self._up.clear()
        self._failed.set()

    @asynccontextmanager
    async def hold(self, lineage: str) -> AsyncGenerator[PolicyVersion]:
        """The lineage's serving version, kept loaded for as long as the request runs."""
        version = self.serving[lineage]
        name = version.adapter_name or self.engine.model
        self.running[name] += 1
        try:
            yield version
        finally:
            self.running[name] -= 1

    def number_of(self, served: str | None, lineage: str) -> int | None:
        """The version of `lineage` that an engine's answer names; None if it is none of them."""
        if served == self.engine.model:
            return BASE_VERSION
        match = _ADAPTER.fullmatch(served or "")
        return int(match["number"]) if match is not None and match["lineage"] == lineage else None

    def is_adapter(self, name: str) -> bool:
        """Whether the engine's model `name` is one of our versions."""
        return name == WARM_UP_ADAPTER or _ADAPTER.fullmatch(name) is not None

    async def restored(self, version: PolicyVersion) -> bool:
        """Brings back an adapter that the engine has lost; False when that fails too."""
        if version.adapter_name is None:
            return False
        try:
            await ensure_loaded(self.engine, version)
        except AdapterError as error:
            log.error("version=%d cannot be restored: %s", version.number, error)
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
        while True:
            await asyncio.sleep(STORE_POLL_S)
            try:
                found = await asyncio.to_thread(self._store.serving_versions, list(self.serving))
                for lineage, version in found.items():
                    old = self.serving[lineage]
                    if version.number != old.number:
                        log.info("version=%d serves lineage=%s", version.number, lineage)
                        self.running[self._name(old)] += 0  # so that it is unloaded once drained
                        self.serving[lineage] = version
                await self._unload_drained()
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
                self._unload_at = time.monotonic() + UNLOAD_AGAIN_S
            elif not self.running[name]:  # it may have come back into service meanwhile
                del self.running[name]

    def in_use(self) -> list[str]:
        """The adapters that other workers must leave loaded."""
        return sorted(self._needed() | {name for name, count in self.running.items() if count})

    async def _in_use_elsewhere(self) -> set[str]:
        others = await asyncio.to_thread(self._store.others, self._worker)
        return {name for adapters, _ in others for name in adapters}

    def _needed(self) -> set[str]:
        return {self._name(version) for version in self.serving.values()}

    def _name(self, version: PolicyVersion) -> str:
        return version.adapter_name or self.engine.model

    async def _unload(self, name: str) -> bool:
        """Whether the engine is without the adapter now."""
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
        while True:
            self._failed.clear()
            try:
                healthy = await self.engine.healthy() and (self.up or await self._prepare())
            except Exception:
                healthy = False
                log.exception("getting the engine ready failed; trying again")
            if healthy:
                self._up.set()
            else:
                self._up.clear()
            try:
                pause = HEALTH_POLL_S if healthy else DOWN_POLL_S
                await asyncio.wait_for(self._failed.wait(), pause)
            except TimeoutError:
                continue

    async def _prepare(self) -> bool:
        try:
            await warm_up(self.engine, self._zero_adapter)
            for version in list(self.serving.values()):
                await self._load(version)
            await self._forget_retired()
        except EngineError as error:
            log.warning("the engine is up, but cannot serve yet: %s", error)
            return False
        return True

    async def _load(self, version: PolicyVersion) -> None:
        """Loads a serving version, or withdraws it if its adapter is no longer what it was."""
        try:
            await ensure_loaded(self.engine, version)
        except AdapterError as error:
            log.error("version=%d cannot serve: %s", version.number, error)
            rejected = replace(version, reason=str(error))
            serving = await withdraw(self._store, self.engine, rejected)
            self.serving[version.lineage] = serving
            await self._load(serving)

    async def _forget_retired(self) -> None:
        """Unloads versions that an earlier proxy left behind; without the store they stay."""
        try:
            versions = await asyncio.to_thread(self._store.versions)
            elsewhere = await self._in_use_elsewhere()
        except (SQLAlchemyError, OSError) as error:
            log.warning("what an earlier proxy left in the engine stays there: %s", error)
            return
        states = {version.adapter_name: version.state for version in versions}
        for model in await self.engine.models():
            over = states.get(model.id) in (VersionState.RETIRED, VersionState.REJECTED)
            if over and not self.running[model.id] and model.id not in elsewhere:
                await self._unload(model.id)
