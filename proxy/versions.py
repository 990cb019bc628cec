"""Which version serves new requests, which engine answers them, when an old one is unloaded.

A learner publishes by changing its lineage's serving version in the store. New requests use it,
running ones end on theirs, and an adapter is unloaded when its last request has ended in every
worker. After a restart of an engine the serving adapters are loaded before any request is sent.

Of several engines only those that have loaded and probed a version get its requests. The others
follow when they have it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nextstate.engine.abilities import look
from nextstate.engine.adapter_files import served_folder
from nextstate.engine.client import WARM_UP_ADAPTER, EngineClient, withdraw
from nextstate.errors import AdapterError, EngineError, StoreError, WaitError, WrongEngineError
from nextstate.records import BASE_VERSION, PolicyVersion, VersionState, names_adapter
from nextstate.store import Store
from nextstate.store.versions import base_version
from proxy.answers import Refused
from proxy.intervals import INTERVALS, Intervals
from proxy.replica import Replica
from proxy.routing import Places, able
from proxy.upstream import Upstream
from proxy.whole_engines import WholeEngines

log = logging.getLogger(__name__)

_PINNED_S = 60.0
"""Seconds for which an adapter that only episodes ask for stays loaded after a call."""


class Held:
    """A request's version, kept loaded for as long as it runs, and the engine that answers it."""

    __slots__ = ("chosen", "key", "replica", "version")

    def __init__(
        self,
        version: PolicyVersion | None,
        replica: Replica,
        key: bytes | None = None,
        *,
        chosen: bool = False,
    ) -> None:
        self.chosen = chosen
        """Whether the request asks for this version, instead of what serves."""
        self.version = version
        """None: the request names no model."""
        self.replica = replica
        self.key = key
        """Of its conversation; None without one."""


class Versions:
    """The serving version of every lineage and the engines' state; `run` must be running."""

    def __init__(
        self,
        store: Store,
        engines: Sequence[EngineClient],
        lineages: Sequence[str],
        zero_adapter: Path,
        worker: str | None = None,
        intervals: Intervals = INTERVALS,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`headers` go with every request that is relayed to an engine."""
        self.replicas = [
            Replica(engine, Upstream(engine.address, headers or {}), intervals, self.changed)
            for engine in engines
        ]
        self.whole = WholeEngines(store.dir, engines[0], headers or {}, intervals, self)
        """The engines of versions that are whole models."""
        self.model = engines[0].model
        """The base model's name in requests; all engines serve the same one."""
        self.moved = 0
        """Requests that went to another engine, because theirs was down, before any answer."""
        self._named = {replica.name: replica for replica in self.replicas}
        self._places = Places(shared=worker is not None)
        self.serving: dict[str, PolicyVersion] = {
            name: store.versions.serving(name) for name in lineages
        }
        self.running: Counter[str] = Counter()
        """Running requests by adapter name. A name stays, with 0, until its adapter is unloaded."""
        self._store = store
        self._zero_adapter = zero_adapter
        self._worker = worker or ""
        self._intervals = intervals
        self._pinned_until: dict[str, float] = {}
        """Until when the adapters of episodes that name their version stay loaded, on the monotonic
        clock."""
        self._unload_at = 0.0
        """When adapters may be unloaded again after a failure, on the monotonic clock."""
        self._up = asyncio.Event()
        self._known = asyncio.Event()
        """Set if requests can be sent or refused at once."""

    @property
    def alone(self) -> bool:
        """Whether there is one engine, so that there is nothing to choose."""
        return len(self.replicas) == 1

    @property
    def up(self) -> bool:
        """Whether requests are sent to an engine."""
        return self._up.is_set()

    @property
    def wrong(self) -> str | None:
        """Why no request can be sent until a person changes something, or None."""
        wrong = [replica.wrong for replica in self.replicas]
        return None if self.up or None in wrong else "; ".join(map(str, wrong))

    @property
    def trouble(self) -> str:
        """What was the matter when the engines were last looked at; "" if they serve."""
        return "; ".join(replica.trouble for replica in self.replicas if replica.trouble)

    @property
    def lacks(self) -> tuple[str, ...]:
        """What learning needs and an engine that is up lacks, as a person reads it."""
        found = self._up_now or self.replicas[:1]
        return tuple(dict.fromkeys(lack for one in found for lack in one.client.abilities.lacks))

    def _serves(self, version: PolicyVersion) -> bool:
        """Whether an engine that is up can answer with a version."""
        return any(replica.serves(version) for replica in self._up_now)

    def add(self, replica: Replica) -> None:
        """Sends requests to one more engine as soon as it is up."""
        self.replicas.append(replica)
        self._named[replica.name] = replica

    def remove(self, replica: Replica) -> None:
        """Sends no more requests to an engine."""
        self.replicas.remove(replica)
        del self._named[replica.name]
        replica.up = False
        self.changed(replica)

    def changed(self, replica: Replica) -> None:
        """Notes that an engine is up or down, or that another version serves."""
        if all(map(self._serves, self.serving.values())):
            self._up.set()
        else:
            self._up.clear()
        if self.up or self.wrong is not None:
            self._known.set()
        else:
            self._known.clear()
        if not replica.up and self.up:
            replica.upstream.drop_unanswered()  # they go to another engine

    async def wait_up(self) -> None:
        """Returns when an engine serves."""
        await self._up.wait()

    async def wait_admitted(self, timeout_s: float) -> None:
        """Like `wait_up`. Raises TimeoutError, and WrongEngineError if only a person can help."""
        async with asyncio.timeout(timeout_s):
            while not self.up:
                if self.wrong is not None:
                    raise WrongEngineError(self.wrong)
                await self._known.wait()

    @property
    def _loads_adapters(self) -> bool:
        found = self._up_now or self.replicas[:1]
        return any(replica.client.abilities.adapters for replica in found)

    @property
    def _up_now(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.up]

    def serves(self, lineage: str) -> PolicyVersion:
        """The version of new requests: the base if no engine loads adapters."""
        version = self.serving[lineage]
        whole = version.adapter_name is None or version.is_whole_model
        loads = whole or self._loads_adapters
        return version if loads else base_version(lineage, version.state)

    async def pinned(self, lineage: str, number: int) -> PolicyVersion:
        """A version that an episode asks for, whether it serves or not. Raises Refused.

        The engine's 404 for an adapter that is not loaded makes the call load it. It stays loaded
        for some time after its last call.
        """
        version = await asyncio.to_thread(self._store.versions.get, lineage, number)
        if version is None or not version.can_serve:
            raise Refused(409, f"Version {number} of lineage {lineage!r} is not there any more.")
        if version.is_whole_model and not self._serves(version):
            raise Refused(409, f"Version {number} of lineage {lineage!r} has no engine now.")
        loads = version.adapter_name is None or version.is_whole_model or self._loads_adapters
        if not loads:
            raise Refused(503, f"The engine loads no adapters, so version {number} cannot serve.")
        self._pinned_until[self._name(version)] = time.monotonic() + _PINNED_S
        return version

    @contextmanager
    def hold(
        self, lineage: str, version: PolicyVersion | None = None, key: bytes | None = None
    ) -> Generator[Held]:
        """The version, kept loaded for as long as the request runs; None: what serves.

        `key` is the conversation's, which stays on its engine.
        """
        chosen = version is not None
        version = version or self.serves(lineage)
        name = self._name(version)
        held = Held(version, self._placed(key, version), key, chosen=chosen)
        self.running[name] += 1
        held.replica.running += 1
        try:
            yield held
        finally:
            self.running[name] -= 1
            held.replica.running -= 1

    def unheld(self) -> Held:
        """An engine for a request that names no model."""
        return Held(None, self._placed(None, None))

    def place_again(self, held: Held) -> None:
        """Takes a request that has got no answer to another engine if its own is down.

        If no other one has its version, what serves now answers it.
        """
        version = held.version
        has_it = version is None or held.replica.serves(version)
        if has_it and (held.replica.up or self.alone):
            return
        if version is not None and not (held.chosen or self._serves(version)):
            held.version = self.serves(version.lineage)
        replica = self._placed(held.key, held.version)
        if replica is not held.replica:
            self.moved += 1
            if held.version is not None:
                held.replica.running -= 1
                replica.running += 1
            held.replica = replica

    def _placed(self, key: bytes | None, version: PolicyVersion | None) -> Replica:
        if self.alone and (version is None or self.replicas[0].serves(version)):
            return self.replicas[0]
        asked = version or base_version("", VersionState.SERVING)
        up = self._up_now or self.replicas
        engines = [replica for replica in up if replica.serves(asked)] or up
        adapter = None if version is None or version.is_whole_model else version.adapter_name
        serving = version is not None and version.number == self.serving[version.lineage].number
        found = able(engines, adapter, serving=serving)
        running = {replica.name: replica.running for replica in found}
        return self._named[self._places.place(key, running, time.monotonic())]

    def number_of(self, served: str | None, version: PolicyVersion) -> int | None:
        """The version that the engine's answer names: `version`, the base, or None for another."""
        if served == self.model:
            return BASE_VERSION
        return version.number if served == version.adapter_name else None

    def is_adapter(self, name: str) -> bool:
        """Whether `name` is that of a version's adapter or of the warm-up adapter."""
        return name == WARM_UP_ADAPTER or names_adapter(name)

    async def restored(self, replica: Replica, version: PolicyVersion) -> bool:
        """Loads an adapter that an engine has lost; False if that fails."""
        if version.adapter_name is None or version.is_whole_model:
            return False
        try:
            await replica.load(version)
        except AdapterError as error:
            log.error("version=%d cannot be restored: %s", version.number, error)
            if version.number == self.serving[version.lineage].number:
                replica.failed()  # requests wait until another version serves
            return False
        except EngineError as error:
            log.warning("version=%d cannot be restored: %s", version.number, error)
            return False
        return True

    async def run(self) -> None:
        """Follows the store and the engines until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for replica in self.replicas:
                tasks.create_task(replica.watch(self))
            self.whole.start(tasks)
            tasks.create_task(self._watch_store())

    async def _watch_store(self) -> None:
        database = self._store.database
        while True:
            if database.tells_changes:
                await asyncio.to_thread(database.wait_for_change, self._intervals.told_poll_s)
            else:
                await asyncio.sleep(self._intervals.store_poll_s)
            try:
                found = await asyncio.to_thread(self._store.versions.serving_of, list(self.serving))
                await self.whole.follow([*found.values(), *self.serving.values()])
                async with asyncio.TaskGroup() as flips:  # none waits for another's engines
                    for lineage, version in found.items():
                        if version.number != self.serving[lineage].number:
                            flips.create_task(self._flip(lineage, version))
                await self._unload_drained()
            except WaitError:
                continue  # the store has logged why
            except Exception:
                log.exception("following the serving versions failed; trying again")

    async def _flip(self, lineage: str, version: PolicyVersion) -> None:
        """Gives new requests of a lineage a version, once the engines have had time to load it."""
        if version.is_whole_model and self.up and not self._serves(version):
            return  # the version before serves until its engine is up
        log.info("version=%d serves lineage=%s", version.number, lineage)
        self.running[self._name(self.serving[lineage])] += 0  # so that it is unloaded once drained
        if not self.alone:
            await self._loaded_by_now(version)
        self.serving[lineage] = version
        self.changed(self.replicas[0])
        for replica in self.replicas:
            replica.look_at = 0.0  # whether it takes adapters may count now
            replica.load_at = 0.0
            if not (self.alone or replica.has(version)):
                replica.wake()

    async def _loaded_by_now(self, version: PolicyVersion) -> None:
        """Waits a moment until each engine that is up has loaded and probed a version.

        Whoever published it has loaded it already. The version before serves meanwhile.
        """
        if version.is_whole_model:
            return
        able = [replica for replica in self._up_now if replica.serves(version)]
        loads = [asyncio.create_task(replica.load(version)) for replica in able]
        if loads:
            _, late = await asyncio.wait(loads, timeout=self._intervals.flip_s)
            for load in late:
                load.cancel()
            failed = await asyncio.gather(*loads, return_exceptions=True)
            for error in failed:
                if isinstance(error, EngineError | AdapterError):
                    log.warning("version=%d is left out of an engine: %s", version.number, error)

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
        return version.adapter_name or self.model

    async def _unload(self, name: str) -> bool:
        """Unloads an adapter from every engine that is up. False if it stays loaded in one."""
        able = [replica for replica in self._up_now if replica.whole is None]
        done = [await self._unload_from(replica, name) for replica in able]
        return all(done)

    async def _unload_from(self, replica: Replica, name: str) -> bool:
        replica.loaded.discard(name)
        try:
            await replica.client.unload_adapter(name)
        except EngineError as error:
            try:
                if not await replica.client.has_model(name):  # another worker was first
                    return True
            except EngineError:
                pass  # the first error says more
            log.warning("adapter %s stays loaded for now: %s", name, error)
            return False
        return True

    def found(self, replica: Replica) -> str:
        """See `Keeper`."""
        lacks = replica.client.abilities.lacks
        missing = [f"{v.number} of {v.lineage}" for v in self._missing(replica)]
        if missing:
            return f"the engine gets no requests for version {', '.join(missing)}, which it lacks"
        if not lacks:
            return "the engine serves"
        stand_ins = [name for name in self.serving if self.serves(name) != self.serving[name]]
        base = f"; the base model serves in place of the versions of {', '.join(stand_ins)}"
        return (
            f"the engine serves and turns are recorded, but learning lacks {'; '.join(lacks)}"
            f"{base if stand_ins else ''}"
        )

    def _missing(self, replica: Replica) -> list[PolicyVersion]:
        """The serving versions that one of several engines has not loaded."""
        if self.alone or not replica.client.abilities.adapters:
            return []
        return [v for v in self.serving.values() if replica.serves(v) and not replica.has(v)]

    async def look_again(self, replica: Replica) -> bool:
        """See `Keeper`."""
        if replica.client.abilities.lacks and time.monotonic() > replica.look_at:
            await self.prepare(replica)
            return True
        missing = self._missing(replica)
        if not missing or time.monotonic() < replica.load_at:
            return False
        replica.load_at = time.monotonic() + self._intervals.slowest_poll_s
        for version in missing:
            await replica.load(version)
        return True

    async def prepare(self, replica: Replica) -> None:
        """See `Keeper`."""
        if replica.whole is not None:
            return await self.whole.prepare(replica)
        versions = [version for version in self.serving.values() if replica.serves(version)]
        needed = any(version.adapter_name for version in versions)
        found = await look(replica.client, self._zero_adapter, adapters=needed)
        if found.adapters:
            for version in versions:
                await self._load(replica, version)
            await self._forget_retired(replica)
        replica.client.abilities = found
        replica.look_at = time.monotonic() + self._intervals.look_again_s

    async def _load(self, replica: Replica, version: PolicyVersion) -> None:
        """Loads a serving version, or withdraws it if its adapter has changed on disk."""
        try:
            await replica.load(version)
        except AdapterError as error:
            log.error("version=%d cannot serve: %s", version.number, error)
            rejected = replace(version, reason=str(error))
            others = [one.client for one in self._up_now if one is not replica]
            serving = await withdraw(self._store, [replica.client, *others], rejected)
            self.serving[version.lineage] = serving
            await self._load(replica, serving)

    async def _forget_retired(self, replica: Replica) -> None:
        """Unloads adapters that an earlier proxy left in an engine, whatever their names.

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
        for model in await replica.client.models():
            over = states.get(model.id) in (VersionState.RETIRED, VersionState.REJECTED)
            over |= model.root in ours and model.id not in states
            if over and not self.running[model.id] and model.id not in elsewhere:
                await self._unload_from(replica, model.id)
