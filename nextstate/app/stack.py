"""The whole loop on one machine: engine and stages under one supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import aiohttp

from nextstate.app.child_states import child_states_file, write_child_states
from nextstate.app.cores import shared_cores
from nextstate.app.engine_access import engine_file, write_engine_file
from nextstate.app.own_key import remove_own_key, write_own_key
from nextstate.app.part_environment import part_environment
from nextstate.app.settings import Settings
from nextstate.app.stages import check_port, require_key, stage_process
from nextstate.app.supervisor import Child, Supervisor
from nextstate.app.tls import certificate, proxy_connector
from nextstate.engine import process as vllm
from nextstate.engine.adapter_files import remove_all_served
from nextstate.errors import StartError
from nextstate.keys import new_key
from nextstate.private_files import make_folder, make_state_folder
from nextstate.process_lock import ProcessLock
from nextstate.records import Json
from nextstate.store import Store
from nextstate.wire import json_object

log = logging.getLogger(__name__)

POLL_S = 0.2
STAGES = ("rollout", "proxy", "judge", "learner")
"""In the order in which they end; the engine ends last. Without `[rollout]` there is no first."""
_ENGINE_PAUSES_S = 30.0, 30.0
"""Pauses of the engine after an exit with code 2: agents wait for it."""


class Stack:
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
        self.children = {name: stage_process(settings, name, name) for name in stages}
        self.children["proxy"].argv = [*self.children["proxy"].argv, "--under-up"]
        for number, port in enumerate(ports):
            name = settings.engine.parts[number]
            self.children[name] = self._engine(name, number, port, self._key or "")
        self.supervisor = Supervisor(list(self.children.values()), self._write_states)

    def check(self) -> None:
        """Raises StartError for what would only fail after minutes of starting."""
        certificate(self.settings.proxy)
        if self.managed:
            vllm.check_package()
            vllm.check_replicas(self.settings.engine)
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
            own_key = new_key()
            remove_all_served(self.dir)  # an earlier one was killed
            write_own_key(self.settings, own_key)
            write_engine_file(self.settings, self.engine_urls, self._key)
            task = asyncio.create_task(self.supervisor.run())
            try:
                yield task
            finally:
                self.supervisor.stopping.set()
                await asyncio.gather(task, return_exceptions=True)
                engine_file(self.settings).unlink(missing_ok=True)
                remove_own_key(self.settings, own_key)
                child_states_file(self.dir).unlink(missing_ok=True)
                remove_all_served(self.dir)

    async def wait_ready(self, task: asyncio.Task[None]) -> None:
        """Returns when the proxy answers and lets requests through. Raises StartError."""
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

    async def health(self) -> Json:
        """The proxy's answer to /healthz; {} while it does not answer."""
        async with aiohttp.ClientSession(connector=proxy_connector(self.settings.proxy)) as session:
            return await _healthz(session, self.settings.proxy.url)

    def states(self) -> dict[str, str]:
        """The state of each process, the engine first."""
        return {name: self.children[name].state for name in sorted(self.children, key=_order)}

    async def _ready(self) -> None:
        url = self.settings.proxy.url
        async with aiohttp.ClientSession(connector=proxy_connector(self.settings.proxy)) as session:
            while (health := await _healthz(session, url)).get("engine") != "up":
                if problem := health.get("engine_problem"):
                    where = ", ".join(self.engine_urls)
                    raise StartError(f"[engine] url = {where!r}: {problem}")
                await asyncio.sleep(POLL_S)
        for child in self.children.values():
            child.was_ready = True

    def _write_states(self) -> None:
        try:
            write_child_states(self.dir, self.states())
        except OSError as error:
            log.warning("`nextstate status` does not show the processes' states: %s", error)

    def _engine(self, name: str, number: int, port: int, key: str) -> Child:
        folder = self.dir / "engine"
        make_state_folder(self.dir)
        make_folder(folder)  # an empty working folder: no file in it shadows a module
        cores = shared_cores(self.settings)
        return Child(
            name,
            vllm.command(
                self.settings.engine,
                port,
                self.settings.learner.lora_rank,
                len(self.settings.all_lineages) + self.settings.judge.uses_base,
            ),
            self.dir / "logs" / f"{name}.log",
            env=vllm.server_environment(
                vllm.of_replica(self.settings.engine, number),
                key,
                part_environment(self.settings, "engine", os.environ),
            ),
            cwd=folder,
            cpus=cores.of_replica(number, self.settings.engine.replicas) if cores else None,
            pauses_s=_ENGINE_PAUSES_S,
            explain=lambda log: (
                f"vLLM ended before it could serve: {vllm.cause_of_death(log)}; check [engine] "
                "model and args"
            ),
        )


def _order(name: str) -> int:
    """The place of a process in what people see: as a request goes through them."""
    return ("engine", *STAGES).index(name.partition("-")[0])


async def _healthz(session: aiohttp.ClientSession, proxy_url: str) -> Json:
    """The proxy's answer to /healthz; {} while it does not answer."""
    try:
        timeout = aiohttp.ClientTimeout(total=2)
        async with session.get(
            f"{proxy_url}/healthz", timeout=timeout, allow_redirects=False
        ) as answer:
            return json_object(await answer.read()) or {}
    except (aiohttp.ClientError, TimeoutError, OSError):
        return {}
