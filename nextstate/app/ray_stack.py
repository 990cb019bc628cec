"""The whole loop on a cluster of Ray: each part is a detached actor, which Ray keeps running.

A placement group reserves each part's resources: the GPUs that it needs, and a resource of its own,
such as `nextstate-proxy`, if a node has that. This process starts the parts, watches them, and ends
them in order when it is told to end. If it is killed, the parts go on, and the next one finds them.

Parts meet in the store. If it is a file, they stay on this node. On several nodes it is a server,
and the state folder is one that all of them share.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nextstate.app.child_states import child_states_file, write_child_states
from nextstate.app.engine_access import engine_access, engine_file, write_engine_file
from nextstate.app.engine_children import check_versions
from nextstate.app.own_key import own_key_of, remove_own_key, write_own_key
from nextstate.app.ray_part import LOST_S, Part, Seen
from nextstate.app.settings import Settings
from nextstate.app.stack import POLL_S, STAGES, Parts, is_up, order
from nextstate.app.stages import require_key
from nextstate.app.supervisor import GRACE_S
from nextstate.app.tls import certificate
from nextstate.engine import process as vllm
from nextstate.engine.adapter_files import remove_all_served
from nextstate.errors import ConfigError, LostNodeError, StartError
from nextstate.private_files import make_state_folder
from nextstate.process_lock import ProcessLock
from nextstate.ray_cluster import is_of_cluster, own_address
from nextstate.records import Json
from nextstate.store import Store

log = logging.getLogger(__name__)

_NAMESPACE = "nextstate"
_LOOK_S = 2.0
_PLACE_S = 120.0
"""How long the cluster may take to find a place for all parts."""
_ANSWER_S = 10.0
"""How long an actor may take to say how its part is."""
_END_S = GRACE_S + 10.0
_SHARE = 0.001
"""Of a CPU and of a named resource: what a part takes of them, only to be placed."""
_ANYWHERE = ("0.0.0.0", "::")


class RayStack(Parts):
    """The parts of one state folder on a cluster."""

    def __init__(self, settings: Settings, ray: Any) -> None:
        """`ray` is what `nextstate.ray_cluster.connect` returned."""
        self.settings = settings
        self.dir = settings.store.path
        self.managed = settings.engine.mode == "managed"
        self.engine_urls = [] if self.managed else [*settings.engine.urls]
        self.stopping = asyncio.Event()
        self._ray = ray
        stages = STAGES if settings.rollout.environment else STAGES[1:]
        self._parts = [*stages, *(settings.engine.parts if self.managed else ())]
        """In the order in which they end."""
        self._name = f"nextstate-{hashlib.sha256(str(self.dir).encode()).hexdigest()[:12]}"
        self._actors: dict[str, Any] = {}
        self._seen: dict[str, Seen] = {}
        self._told: dict[str, dict[str, str]] = {}
        """What is known of each part by now, and of what runs beside it."""
        self._was_ready = False
        self._lost = False
        """Whether the cluster cannot be reached any more; parts may go on there."""

    @property
    def _shared(self) -> bool:
        """Whether the parts may be on several nodes: the store is on a server."""
        return self.settings.store.url.startswith("postgres")

    def check(self) -> None:
        """Raises ConfigError or StartError for what does not go with a cluster."""
        settings = self.settings
        certificate(settings.proxy)
        if self.managed and (gpus := settings.engine.env.get(vllm.VISIBLE)) is not None:
            log.warning(
                "[engine] env: %s = %r is left out, since Ray gives each part its GPUs",
                vllm.VISIBLE,
                gpus,
            )
            settings = replace(settings, engine=vllm.without_gpus(settings.engine))
        nodes = len(self._nodes())
        if nodes > 1 and not self._shared:
            raise ConfigError(
                f"the cluster has {nodes} nodes, and [store] url = {settings.store.url!r} is a "
                "file of one machine: name a PostgreSQL server there, and a [store] dir that all "
                "nodes share (docs/scale.md)"
            )
        if nodes > 1 and not Path(settings.store.dir).expanduser().is_absolute():
            raise ConfigError(
                f"[store] dir = {settings.store.dir!r}: name the whole path of a folder that the "
                f"{nodes} nodes share"
            )
        if nodes > 1 and settings.proxy.loopback:
            raise ConfigError(
                f"[proxy] host = {settings.proxy.host!r} is reachable from its own node only, and "
                f'the cluster has {nodes}: set "0.0.0.0"'
            )
        check_versions(settings)
        store = Store(settings.store)
        require_key(settings, store)
        store.close()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[asyncio.Task[None]]:
        """Runs the parts inside the block; the task ends when one cannot start."""
        try:
            make_state_folder(self.dir)
            await asyncio.to_thread(self.check)
            taken = f"[store] dir = {str(self.dir)!r} is in use"
            with ProcessLock(self.dir / "lock", taken, "end it, or set another [store] dir"):
                task = asyncio.create_task(self._run())
                try:
                    yield task
                finally:
                    self.stopping.set()
                    await asyncio.gather(task, return_exceptions=True)
                    child_states_file(self.dir).unlink(missing_ok=True)
                    if not self._lost:
                        await self._end_all()
                        engine_file(self.settings).unlink(missing_ok=True)
                        remove_own_key(self.settings, own_key_of(self.settings))
                        remove_all_served(self.dir)
        finally:
            await asyncio.to_thread(self._ray.shutdown)

    def states(self) -> dict[str, str]:
        """The state of each part, the engine first."""
        found = dict.fromkeys(self._parts, "not asked yet")
        for told in self._told.values():
            found |= told
        return {name: found[name] for name in sorted(found, key=order)}

    async def _ready(self) -> None:
        while "proxy" not in self._seen or not is_up(await self.health(), self.engine_urls):
            await asyncio.sleep(POLL_S)
        self._was_ready = True

    async def _run(self) -> None:
        """Starts the parts, or finds them, and watches them until all is to end."""
        known = [name for name in self._parts if self._find(name) is not None]
        if known:
            log.warning("%s run already: they go on", ", ".join(known))
        else:
            remove_all_served(self.dir)  # an earlier one was killed
            write_own_key(self.settings, own_key_of(self.settings))
            if self.managed:
                key = vllm.managed_key(self.settings.engine)
                write_engine_file(self.settings, [""] * self.settings.engine.replicas, key)
        group = await self._place()
        for name in self._parts:
            self._actors[name] = await asyncio.to_thread(self._make, name, group)
        try:
            await self._watch()
        finally:
            self.stopping.set()

    async def _watch(self) -> None:
        """Looks at the parts until all is to end."""
        reached = time.monotonic()
        while not self.stopping.is_set():
            now = time.monotonic()
            if await asyncio.to_thread(is_of_cluster, self._ray, _ANSWER_S):
                reached = now
            elif now - reached > LOST_S:
                self._lost = True
                raise LostNodeError(
                    "this node is no longer of the cluster, or its head is gone: parts on other "
                    "nodes go on while they reach it; start Ray here again, then give this command "
                    "again"
                )
            await asyncio.gather(*map(self._look, self._parts))
            if self.managed:
                self.engine_urls = engine_access(self.settings)[0]
            try:
                write_child_states(self.dir, self.states())
            except OSError as error:
                log.warning("`nextstate status` does not show the parts' states: %s", error)
            for name, seen in self._seen.items():
                if seen.refused and not self._was_ready:
                    raise StartError(f"{name} on node {seen.address}: {seen.refused}")
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), _LOOK_S)

    def _nodes(self) -> list[Json]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def placed(self) -> dict[str, dict[str, float]]:
        """What each part needs of a node; the rollout has its place beside the proxy."""
        has = self._ray.cluster_resources()
        learner = self.settings.learner.ranks
        engine = int(self.settings.engine.option("--tensor-parallel-size") or 1)
        needed: dict[str, dict[str, float]] = {}
        for name in self._parts:
            if name == "rollout":
                continue
            kind = name.partition("-")[0]
            bundle = {"CPU": 2 * _SHARE if kind == "proxy" else _SHARE}
            if (own := f"nextstate-{kind}") in has:
                bundle[own] = _SHARE
            if not self._shared:
                bundle[f"node:{own_address(self._ray)}"] = _SHARE
            gpus = {"engine": engine, "learner": learner}.get(kind, 0)
            if gpus and not vllm.on_cpu():
                bundle["GPU"] = gpus
            needed[name] = bundle
        return needed

    async def _place(self) -> Any:
        """The group that reserves a place for each part. Raises StartError if there is none."""
        groups = importlib.import_module("ray.util.placement_group")
        with suppress(ValueError):
            return await asyncio.to_thread(self._ray.util.get_placement_group, self._name)
        needed = self.placed()
        group = groups.placement_group([*needed.values()], name=self._name, lifetime="detached")
        if await asyncio.to_thread(group.wait, _PLACE_S):
            return group
        self._ray.util.remove_placement_group(group)
        raise StartError(
            f"the cluster has no place for {needed}, but in all {self._ray.cluster_resources()}: "
            "add nodes, or end what takes its resources"
        )

    def _find(self, name: str) -> Any:
        """The actor of a part that runs already, or None."""
        try:
            return self._ray.get_actor(f"{self._name}/{name}", namespace=_NAMESPACE)
        except ValueError:
            return None

    def _make(self, name: str, group: Any) -> Any:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        needed = self.placed()
        place = "proxy" if name == "rollout" else name
        made = self._ray.remote(Part).options(
            name=f"{self._name}/{name}",
            namespace=_NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=_SHARE,
            num_gpus=needed[place].get("GPU", 0),
            scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=[*needed].index(place)
            ),
        )
        return made.remote(str(self.settings.file.absolute()), name, self._shared, os.getcwd())

    async def _look(self, name: str) -> None:
        """Asks an actor how its part is."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                seen: Seen = await self._actors[name].seen.remote()
        except TimeoutError:
            self._told[name] = {name: "its node does not answer"}
        except self._ray.exceptions.RayError as error:
            self._told[name] = {name: f"Ray starts it again: {type(error).__name__}"}
        else:
            self._seen[name], self._told[name] = seen, {name: seen.state, **seen.versions}
            if name == "proxy" and self.settings.proxy.host in _ANYWHERE:
                proxy = replace(self.settings.proxy, host=seen.address)
                self.settings = replace(self.settings, proxy=proxy)

    async def _end_all(self) -> None:
        """Ends the parts in order, with their actors."""
        for name in self._parts:
            if (actor := self._actors.get(name)) is None:
                continue
            try:
                async with asyncio.timeout(_END_S):
                    await actor.end.remote()
            except (self._ray.exceptions.RayError, TimeoutError) as error:
                log.warning("%s did not end by itself: %s", name, type(error).__name__)
            with suppress(Exception):  # of Ray: it is gone
                self._ray.kill(actor, no_restart=True)
        with suppress(Exception):  # of Ray: there is none
            group = self._ray.util.get_placement_group(self._name)
            self._ray.util.remove_placement_group(group)
