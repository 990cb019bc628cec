"""The whole loop on one machine: engine and stages under one supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

import aiohttp

from nextstate.app.child_states import child_states_file, write_child_states
from nextstate.app.engine_access import engine_file, write_engine_file
from nextstate.app.engine_children import VersionEngines, check_versions, engine_process
from nextstate.app.engine_pool import POLL_S
from nextstate.app.own_key import own_key_of, remove_own_key, write_own_key
from nextstate.app.settings import Settings
from nextstate.app.stages import check_port, require_key, stage_process
from nextstate.app.supervisor import Child, Supervisor
from nextstate.app.tls import certificate, proxy_connector
from nextstate.engine import process as vllm
from nextstate.engine.adapter_files import remove_all_served
from nextstate.engine.whole import engines_folder
from nextstate.errors import StartError
from nextstate.private_files import make_state_folder
from nextstate.process_lock import ProcessLock
from nextstate.records import Json
from nextstate.store import Store
from nextstate.wire import json_object

log = logging.getLogger(__name__)

STAGES = ("rollout", "proxy", "judge", "learner")
"""In the order in which they end; the engine ends last. Without `[rollout]` there is no first."""


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
        base = self.children.get(settings.engine.parts[0])
        self._versions = base and VersionEngines(settings, base, self._write_states)

    def check(self) -> None:
        """Raises StartError for what would only fail after minutes of starting."""
        certificate(self.settings.proxy)
        if self.managed:
            vllm.check_package()
            vllm.check_system(self.settings.engine)
            vllm.check_replicas(self.settings.engine)
        check_versions(self.settings)
        vllm.check_model(self.settings.engine)
        check_port(self.settings)
        if not self.settings.proxy.loopback:
            store = Store(self.settings.store)
            require_key(self.settings, store)
            store.close()

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
            own_key = own_key_of(self.settings)  # a proxy on another machine may have it
            remove_all_served(self.dir)  # an earlier one was killed
            write_own_key(self.settings, own_key)
            write_engine_file(self.settings, self.engine_urls, self._key)
            shutil.rmtree(engines_folder(self.dir), ignore_errors=True)  # of an earlier one
            task = asyncio.create_task(self.supervisor.run())
            ended = asyncio.Event()
            pool = asyncio.create_task(self._versions.run(ended)) if self._versions else None
            try:
                yield task
            finally:
                self.supervisor.stopping.set()
                await asyncio.gather(task, return_exceptions=True)
                ended.set()  # after the proxy, whose requests have ended
                if pool is not None:
                    await asyncio.gather(pool, return_exceptions=True)
                engine_file(self.settings).unlink(missing_ok=True)
                remove_own_key(self.settings, own_key)
                child_states_file(self.dir).unlink(missing_ok=True)
                remove_all_served(self.dir)

    def states(self) -> dict[str, str]:
        """The state of each process, the engine first."""
        own = self._versions.children if self._versions else []
        children = self.children | {child.name: child for child in own}
        return {name: children[name].state for name in sorted(children, key=order)}

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


def stage_under_up(settings: Settings, name: str, *arguments: str) -> Child:
    """The process of a stage, which has somebody who writes the key of our commands."""
    return stage_process(settings, name, name, *["--under-up"] * (name == "proxy"), *arguments)


def order(name: str) -> int:
    """The place of a process in what people see: as a request goes through them."""
    return ("engine", *STAGES).index(name.partition("-")[0])


def is_up(health: Json, engine_urls: Sequence[str]) -> bool:
    """Whether the proxy lets requests through. Raises StartError if its engine is unusable."""
    if health.get("engine") != "up" and (problem := health.get("engine_problem")):
        raise StartError(f"[engine] url = {', '.join(engine_urls)!r}: {problem}")
    return health.get("engine") == "up"
