"""vLLM as child processes: with the base, and beside it with versions that are whole models."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace

from nextstate import sealed_files
from nextstate.app.cores import shared_cores
from nextstate.app.engine_access import engine_access, engine_clients
from nextstate.app.engine_pool import POLL_S, EnginePool
from nextstate.app.part_environment import part_environment
from nextstate.app.settings import Settings
from nextstate.app.supervisor import Child
from nextstate.config import EngineConfig
from nextstate.engine import process as vllm
from nextstate.engine.adapter_files import MODEL_FILE
from nextstate.engine.client import EngineClient
from nextstate.engine.whole import WholeEngine
from nextstate.errors import EngineError, StartError
from nextstate.free_memory import free_ram, held_by
from nextstate.private_files import make_folder, make_state_folder
from nextstate.store import Store
from nextstate.store.waiting import Patience

log = logging.getLogger(__name__)

_LARGEST_SHARE = 0.3
"""Of a GPU for each engine: there are up to three while a version changes."""
_AGAIN_S = 5.0
_PAUSES_S = 30.0, 30.0
"""Pauses of an engine after an exit with code 2: agents wait for it."""


def check_versions(settings: Settings) -> None:
    """Raises StartError where versions could not serve: whole models, or adapters after them."""
    if settings.learner.trains_all:
        _check_whole_models(settings)
    elif any(settings.store.path.glob(f"versions/*/v*/{MODEL_FILE}")):
        _check_adapters(settings)


def _check_whole_models(settings: Settings) -> None:
    share = vllm.gpu_share(settings.engine, settings.engine.env)
    if not vllm.on_cpu() and share > _LARGEST_SHARE:
        raise StartError(
            "[learner] lora_rank = 0: the base, what serves and the next version have an "
            f"engine each, and each takes {share:g} of its GPU: set "
            f'"--gpu-memory-utilization" in [engine] args to at most {_LARGEST_SHARE:g}'
        )
    store = Store(settings.store)
    encrypted = sealed_files.is_encrypted(settings.store.path / "versions")
    store.close()
    if encrypted:
        raise StartError(
            "[learner] lora_rank = 0 writes versions that cannot be encrypted yet, and this "
            "store is: set lora_rank to 1 or more, or run `nextstate encrypt --off`"
        )


def _check_adapters(settings: Settings) -> None:
    """Raises StartError if a whole model serves, which no engine for adapters loads."""
    store = Store(settings.store)
    serving = store.versions.serving_of(settings.all_lineages).values()
    store.close()
    for version in serving:
        if version.is_whole_model:
            raise StartError(
                f"version {version.number} serves and is a whole model: set [learner] "
                "lora_rank = 0, or return to the base with `nextstate rollback 0` while that "
                "is set"
            )


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
        pauses_s=_PAUSES_S,
        explain=lambda log: (
            f"vLLM ended before it could serve: {vllm.cause_of_death(log)}; check [engine] "
            "model and args"
        ),
    )


def engine_url(host: str, port: int) -> str:
    """The address of an engine."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class VersionEngines:
    """The engines of versions that are whole models, on the base's machine."""

    def __init__(
        self,
        settings: Settings,
        base: Child,
        on_change: Callable[[], None] = lambda: None,
        *,
        host: str = vllm.HOST,
        prepare: Callable[[Child], None] = lambda child: None,
    ) -> None:
        """They listen at `host`; `prepare` changes each process before it is started."""
        self._settings = settings
        self._base = base
        self._on_change = on_change
        self._host = host
        self._prepare = prepare
        self._pool: EnginePool | None = None

    @property
    def children(self) -> list[Child]:
        """Their processes."""
        return self._pool.children if self._pool else []

    async def run(self, ended: asyncio.Event) -> None:
        """Runs them until `ended` is set, if versions are whole models."""
        settings = self._settings
        if not settings.learner.trains_all:
            return
        while not ended.is_set():
            try:
                await self._run_pool(ended)
            except Exception:
                log.exception("the engines of versions cannot be kept; trying again")
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), _AGAIN_S)

    async def _run_pool(self, ended: asyncio.Event) -> None:
        settings = self._settings
        store = await asyncio.to_thread(Store, settings.store, patience=Patience(math.inf))
        with closing(store):
            async with engine_clients(settings) as clients:
                exact = settings.engine.dtype == "float32"
                if not vllm.on_cpu():  # each measures the GPU's memory while it starts
                    await _is_up(clients[0], ended)
                self._pool = EnginePool(
                    store, clients[0], self._make, self._room, self._on_change, exact=exact
                )
                await self._pool.run(ended)

    def _make(self, engine: WholeEngine) -> tuple[Child, str]:
        """A version's own engine, with the base's settings, and its address."""
        settings = self._settings
        config = replace(settings.engine, model=engine.path, served_model_name=engine.name)
        port, key = vllm.free_port(self._host), engine_access(settings)[1] or ""
        name, host = f"engine-v{engine.number:06d}", self._host
        child = engine_process(settings, name, 0, port, key, host=host, version=config)
        self._prepare(child)
        return child, engine_url(host, port)

    def _room(self) -> str | None:
        """Why no further engine fits into the machine's memory, or None. A GPU counts its own."""
        base, free = self._base.process, free_ram()
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


async def _is_up(base: EngineClient, ended: asyncio.Event) -> None:
    """Returns once the base's engine is up, or when `ended` is set."""
    while not ended.is_set():
        with suppress(EngineError):
            if await base.healthy():
                return
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), POLL_S)
