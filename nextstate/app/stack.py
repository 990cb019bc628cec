"""The whole loop on one machine: engine and stages under one supervisor."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import aiohttp

from nextstate import sealed_files
from nextstate.app.child_states import child_states_file, write_child_states
from nextstate.app.cores import shared_cores
from nextstate.app.engine_access import engine_clients, engine_file, write_engine_file
from nextstate.app.engine_pool import POLL_S, EnginePool
from nextstate.app.own_key import remove_own_key, write_own_key
from nextstate.app.part_environment import part_environment
from nextstate.app.settings import Settings
from nextstate.app.stages import check_port, require_key, stage_process
from nextstate.app.supervisor import Child, Supervisor
from nextstate.app.tls import certificate, proxy_connector
from nextstate.config import EngineConfig
from nextstate.engine import process as vllm
from nextstate.engine.adapter_files import MODEL_FILE, remove_all_served
from nextstate.engine.client import EngineClient
from nextstate.engine.whole import WholeEngine, engines_folder
from nextstate.errors import EngineError, StartError
from nextstate.free_memory import free_ram, held_by
from nextstate.keys import new_key
from nextstate.private_files import make_folder, make_state_folder
from nextstate.process_lock import ProcessLock
from nextstate.records import Json
from nextstate.store import Store
from nextstate.store.waiting import Patience
from nextstate.wire import json_object

log = logging.getLogger(__name__)

STAGES = ("rollout", "proxy", "judge", "learner")
"""In the order in which they end; the engine ends last. Without `[rollout]` there is no first."""
_LARGEST_SHARE = 0.3
"""Of a GPU for each engine: there are up to three while a version changes."""
_ENGINE_PAUSES_S = 30.0, 30.0
"""Pauses of the engine after an exit with code 2: agents wait for it."""


class Parts(Protocol):
    """What runs the parts of one state folder."""

    settings: Settings
    dir: Path

    async def wait_ready(self, task: asyncio.Task[None]) -> None:
        """Returns when the proxy answers and lets requests through.

        Raises StartError if `task` has ended before, and after minutes.
        """
        timeout_s = vllm.START_TIMEOUT_S
        ready = asyncio.create_task(self._ready())
        try:
            await asyncio.wait({ready, task}, timeout=timeout_s, return_when="FIRST_COMPLETED")
            if task.done():
                task.result()
                raise StartError("stopped before it was ready")
            if not ready.done():
                raise StartError(
                    f"the engine was not ready within {timeout_s:.0f} s: see {self.dir / 'logs'}"
                )
            ready.result()
        finally:
            ready.cancel()
            with suppress(asyncio.CancelledError):
                await ready

    async def _ready(self) -> None: ...

    async def health(self) -> Json:
        """The proxy's answer to /healthz; {} while it does not answer."""
        proxy, limit = self.settings.proxy, aiohttp.ClientTimeout(total=2)
        try:
            async with (
                aiohttp.ClientSession(connector=proxy_connector(proxy)) as session,
                session.get(f"{proxy.url}/healthz", timeout=limit, allow_redirects=False) as answer,
            ):
                return json_object(await answer.read()) or {}
        except (aiohttp.ClientError, TimeoutError, OSError):
            return {}


class Stack(Parts):
    """The processes of one state folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.dir = settings.store.path
        self.managed = settings.engine.mode == "managed"
        ports = vllm.free_ports(settings.engine.replicas) if self.managed else []
        self.engine_urls = [f"http://{vllm.HOST}:{port}" for port in ports]
        self.engine_urls += [] if self.managed else settings.engine.urls
        self._key = vllm.managed_key(settings.engine) if self.managed else None
        stages = STAGES if settings.rollout.environment else STAGES[1:]
        self.children = {name: stage_under_up(settings, name) for name in stages}
        for number, port in enumerate(ports):
            name = settings.engine.parts[number]
            self.children[name] = engine_process(settings, name, number, port, self._key or "")
        self.supervisor = Supervisor(list(self.children.values()), self._write_states)
        self.stopping = self.supervisor.stopping
        self._pool: EnginePool | None = None
        """The engines of versions that are whole models."""

    def check(self) -> None:
        """Raises StartError for what would only fail after minutes of starting."""
        certificate(self.settings.proxy)
        if self.managed:
            vllm.check_package()
            vllm.check_system(self.settings.engine)
            vllm.check_replicas(self.settings.engine)
        if self.settings.learner.trains_all:
            self._check_whole_models()
        elif any(self.dir.glob(f"versions/*/v*/{MODEL_FILE}")):
            self._check_adapters()
        vllm.check_model(self.settings.engine)
        check_port(self.settings)
        if not self.settings.proxy.loopback:
            store = Store(self.settings.store)
            require_key(self.settings, store)
            store.close()

    def _check_whole_models(self) -> None:
        """Raises StartError where versions that are whole models could not serve."""
        share = vllm.gpu_share(self.settings.engine, {})
        if not vllm.on_cpu() and share > _LARGEST_SHARE:
            raise StartError(
                "[learner] lora_rank = 0: the base, what serves and the next version have an "
                f"engine each, and each takes {share:g} of its GPU: set "
                f'"--gpu-memory-utilization" in [engine] args to at most {_LARGEST_SHARE:g}'
            )
        store = Store(self.settings.store)
        encrypted = sealed_files.is_encrypted(self.dir / "versions")
        store.close()
        if encrypted:
            raise StartError(
                "[learner] lora_rank = 0 writes versions that cannot be encrypted yet, and this "
                "store is: set lora_rank to 1 or more, or run `nextstate encrypt --off`"
            )

    def _check_adapters(self) -> None:
        """Raises StartError if a whole model serves, which no engine for adapters loads."""
        store = Store(self.settings.store)
        serving = store.versions.serving_of(self.settings.all_lineages).values()
        store.close()
        for version in serving:
            if version.is_whole_model:
                raise StartError(
                    f"version {version.number} serves and is a whole model: set [learner] "
                    "lora_rank = 0, or return to the base with `nextstate rollback 0` while that "
                    "is set"
                )

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[asyncio.Task[None]]:
        """Runs everything inside the block; the task ends when a child cannot go on."""
        self.check()
        make_state_folder(self.dir)
        taken = f"[store] dir = {str(self.dir)!r} is in use"
        with ProcessLock(self.dir / "lock", taken, "end it, or set another [store] dir"):
            if self.managed and (left_out := vllm.not_passed(self.settings.engine, os.environ)):
                log.warning(
                    "vLLM does not get %s of your environment: set in [engine] env what it needs",
                    ", ".join(left_out),
                )
            own_key = new_key()
            remove_all_served(self.dir)  # an earlier one was killed
            write_own_key(self.settings, own_key)
            write_engine_file(self.settings, self.engine_urls, self._key)
            shutil.rmtree(engines_folder(self.dir), ignore_errors=True)  # of an earlier one
            task = asyncio.create_task(self.supervisor.run())
            ended = asyncio.Event()
            pool = asyncio.create_task(self._run_pool(ended))
            try:
                yield task
            finally:
                self.supervisor.stopping.set()
                await asyncio.gather(task, return_exceptions=True)
                ended.set()  # after the proxy, whose requests have ended
                await asyncio.gather(pool, return_exceptions=True)
                engine_file(self.settings).unlink(missing_ok=True)
                remove_own_key(self.settings, own_key)
                child_states_file(self.dir).unlink(missing_ok=True)
                remove_all_served(self.dir)

    def states(self) -> dict[str, str]:
        """The state of each process, the engine first."""
        pool = self._pool.children if self._pool else []
        children = self.children | {child.name: child for child in pool}
        return {name: children[name].state for name in sorted(children, key=order)}

    async def _run_pool(self, ended: asyncio.Event) -> None:
        """Runs the engines of versions that are whole models, if versions are that."""
        if not self.settings.learner.trains_all:
            return
        store = await asyncio.to_thread(Store, self.settings.store, patience=Patience(math.inf))
        async with engine_clients(self.settings) as clients:
            exact = self.settings.engine.dtype == "float32"
            make, room = self._engine_of_version, self._room
            if not vllm.on_cpu():  # each measures the GPU's memory while it starts
                await self._base_is_up(clients[0], ended)
            self._pool = EnginePool(store, clients[0], make, room, self._write_states, exact=exact)
            await self._pool.run(ended)
        store.close()

    async def _base_is_up(self, base: EngineClient, ended: asyncio.Event) -> None:
        while not ended.is_set():
            with suppress(EngineError):
                if await base.healthy():
                    return
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), POLL_S)

    def _engine_of_version(self, engine: WholeEngine) -> tuple[Child, str]:
        """A version's own engine, with the base's settings, and its address."""
        config = replace(self.settings.engine, model=engine.path, served_model_name=engine.name)
        port = vllm.free_port()
        name, key = f"engine-v{engine.number:06d}", self._key or ""
        child = engine_process(self.settings, name, 0, port, key, version=config)
        return child, f"http://{vllm.HOST}:{port}"

    def _room(self) -> str | None:
        """Why no further engine fits into the machine's memory, or None. A GPU counts its own."""
        base = self.children[self.settings.engine.parts[0]].process
        free = free_ram()
        if not vllm.on_cpu() or base is None or free is None:
            return None
        needed = held_by(base.pid)
        if needed <= free:
            return None
        return (
            f"a further engine needs {needed / 1e9:.2f} GB of RAM, as the base's holds now, and "
            f"{free / 1e9:.2f} GB are free: make room, or set VLLM_CPU_KVCACHE_SPACE in [engine] "
            "env lower"
        )

    async def _ready(self) -> None:
        while not is_up(await self.health(), self.engine_urls):
            await asyncio.sleep(POLL_S)
        for child in self.children.values():
            child.was_ready = True

    def _write_states(self) -> None:
        try:
            write_child_states(self.dir, self.states())
        except OSError as error:
            log.warning("`nextstate status` does not show the processes' states: %s", error)


def stage_under_up(settings: Settings, name: str) -> Child:
    """The process of a stage, which has somebody who writes the key of our commands."""
    return stage_process(settings, name, name, *["--under-up"] * (name == "proxy"))


def engine_process(
    settings: Settings,
    name: str,
    number: int,
    port: int,
    key: str,
    *,
    host: str = vllm.HOST,
    version: EngineConfig | None = None,
) -> Child:
    """vLLM with the base, or with the whole model of a version, on a port of `host`."""
    state = settings.store.path
    folder = state / "engine"
    make_state_folder(state)
    make_folder(folder)  # an empty working folder: no file in it shadows a module
    cores = shared_cores(settings)
    return Child(
        name,
        vllm.command(
            version or settings.engine,
            port,
            settings.learner.lora_rank if version is None else None,
            len(settings.all_lineages) + settings.judge.uses_base,
            host,
        ),
        state / "logs" / f"{name}.log",
        env=vllm.server_environment(
            vllm.of_replica(settings.engine, number),
            key,
            part_environment(settings, "engine", os.environ),
        ),
        cwd=folder,
        cpus=cores.of_replica(number, settings.engine.replicas) if cores else None,
        pauses_s=_ENGINE_PAUSES_S,
        explain=lambda log: (
            f"vLLM ended before it could serve: {vllm.cause_of_death(log)}; check [engine] "
            "model and args"
        ),
    )


def order(name: str) -> int:
    """The place of a process in what people see: as a request goes through them."""
    return ("engine", *STAGES).index(name.partition("-")[0])


def is_up(health: Json, engine_urls: Sequence[str]) -> bool:
    """Whether the proxy lets requests through. Raises StartError if its engine is unusable."""
    if health.get("engine") != "up" and (problem := health.get("engine_problem")):
        raise StartError(f"[engine] url = {', '.join(engine_urls)!r}: {problem}")
    return health.get("engine") == "up"
