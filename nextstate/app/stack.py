"""The whole loop on one machine: engine, proxy, judge and learner under one supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import aiohttp

from nextstate.app.parts import parts_file, write_parts
from nextstate.app.settings import Settings
from nextstate.app.stages import engine_file, leave_engine, stage_part
from nextstate.app.supervisor import SHORT_RESTS_S, Part, Supervisor
from nextstate.engine import process as vllm
from nextstate.errors import StartError
from nextstate.private_files import make_folder, make_state_folder
from nextstate.process_lock import ProcessLock
from nextstate.records import Json
from nextstate.wire import json_object

log = logging.getLogger(__name__)

POLL_S = 0.2
STAGES = ("proxy", "judge", "learner")
"""In the order in which they end; the engine ends last."""


class Stack:
    """The processes of one state folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.dir = settings.store.path
        self.managed = settings.engine.mode == "managed"
        port = vllm.free_port() if self.managed else 0
        self.engine_url = f"http://{vllm.HOST}:{port}" if self.managed else settings.engine.url
        self._key = vllm.managed_key(settings.engine) if self.managed else None
        self.parts = {name: stage_part(settings, name, name) for name in STAGES}
        if self._key is not None:
            self.parts["engine"] = self._engine(port, self._key)
        self.supervisor = Supervisor(list(self.parts.values()), self._tell)

    def check(self) -> None:
        """Raises StartError for what would only fail after minutes of starting."""
        if self.managed:
            vllm.check_package()
        vllm.check_model(self.settings.engine)
        proxy = self.settings.proxy
        if not vllm.port_is_free(proxy.host, proxy.port):
            raise StartError(
                f"[proxy] port = {proxy.port} on {proxy.host} is in use: end the program that "
                "listens there, or set another [proxy] port"
            )

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[asyncio.Task[None]]:
        """Runs everything inside the block; the task ends when a part cannot go on."""
        self.check()
        make_state_folder(self.dir)
        taken = f"[store] dir = {str(self.dir)!r} is in use"
        with ProcessLock(self.dir / "lock", taken, "end it, or set another [store] dir"):
            if self.managed and (left_out := vllm.not_passed(self.settings.engine, os.environ)):
                log.warning(
                    "vLLM does not get %s of your environment: what it should get belongs into "
                    "[engine] env",
                    ", ".join(left_out),
                )
            leave_engine(self.settings, self.engine_url, self._key)
            task = asyncio.create_task(self.supervisor.run())
            try:
                yield task
            finally:
                self.supervisor.stop()
                await asyncio.gather(task, return_exceptions=True)
                engine_file(self.settings).unlink(missing_ok=True)
                parts_file(self.dir).unlink(missing_ok=True)

    async def wait_ready(self, task: asyncio.Task[None]) -> None:
        """Returns when the proxy answers and lets requests through. Raises StartError."""
        timeout_s = self.settings.engine.start_timeout_s
        ready = asyncio.create_task(self._ready())
        try:
            await asyncio.wait({ready, task}, timeout=timeout_s, return_when="FIRST_COMPLETED")
            if task.done():
                task.result()
                raise StartError("stopped before it was ready")
            if ready.done():
                ready.result()
            else:
                raise StartError(
                    f"the engine was not ready within [engine] start_timeout_s = {timeout_s:.0f}: "
                    f"see {self.dir / 'logs'}, or raise the key"
                )
        finally:
            ready.cancel()
            with suppress(asyncio.CancelledError):
                await ready

    async def _ready(self) -> None:
        async with aiohttp.ClientSession() as session:
            while (health := await _healthz(session, self.settings.proxy.url)).get(
                "engine"
            ) != "up":
                if problem := health.get("engine_problem"):
                    raise StartError(f"[engine] url = {self.engine_url!r}: {problem}")
                await asyncio.sleep(POLL_S)
        for part in self.parts.values():
            part.was_ready = True

    def _tell(self) -> None:
        states = {name: part.state for name, part in self.parts.items()}
        try:
            write_parts(self.dir, states)
        except OSError as error:
            log.warning("what the parts do is not shown by `nextstate status`: %s", error)

    def _engine(self, port: int, key: str) -> Part:
        folder = self.dir / "engine"
        make_state_folder(self.dir)
        make_folder(folder)  # neutral: nothing to import there
        return Part(
            "engine",
            vllm.command(self.settings.engine, port),
            self.dir / "logs" / "engine.log",
            env=vllm.server_environment(self.settings.engine, key),
            cwd=folder,
            must_become_ready=True,
            rests_s=SHORT_RESTS_S,
            explain=lambda log: (
                f"vLLM ended before it could serve: {vllm.cause_of_death(log)}; check [engine] "
                "model and args"
            ),
        )


async def _healthz(session: aiohttp.ClientSession, proxy_url: str) -> Json:
    """What the proxy says of itself and the engine; {} while it does not answer."""
    try:
        timeout = aiohttp.ClientTimeout(total=2)
        async with session.get(f"{proxy_url}/healthz", timeout=timeout) as answer:
            return json_object(await answer.read()) or {}
    except (aiohttp.ClientError, TimeoutError, OSError):
        return {}
