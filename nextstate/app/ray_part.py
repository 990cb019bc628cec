"""A part of the loop on a node of Ray: an actor that keeps one child process running there.

The actor gets a file's name and the part's, and no secret: keys are in the environment of its node
and in the state folder. Everything begins in its constructor, because that is all that Ray calls
when it starts the actor again, on this node or another one. The child dies with its actor. The
actor ends when its node's raylet has died, and when it has not reached the cluster's head for a
while: then Ray starts another one elsewhere. What both write meanwhile, the store takes from one.

Where an engine listens is known once it has a node. It writes that into the engine file, and the
stages start their processes when it is there, and again when it has changed.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nextstate.app.engine_access import engine_access, engine_file, write_engine_file
from nextstate.app.engine_children import VersionEngines, engine_process, engine_url
from nextstate.app.settings import Settings
from nextstate.app.stack import stage_under_up
from nextstate.app.supervisor import Child, Supervisor, end
from nextstate.engine import process as vllm
from nextstate.engine.whole import engines_folder
from nextstate.errors import NextStateError
from nextstate.offline import SWITCHES
from nextstate.private_files import only_for_owner
from nextstate.ray_cluster import is_of_cluster, own_address

log = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Between two looks at the engine file."""
_BEAT_S, _BEAT_TIMEOUT_S = 5.0, 5.0
"""Between two questions to the cluster's head, and for its answer."""
LOST_S = 30.0
"""How long the head may be out of reach. By itself Ray ends what is cut off after minutes."""
_FROM_RAY = "OMP_NUM_THREADS"
"""Ray sets it to 1 for an actor; what the node's own environment says stays."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What an actor says of its part."""

    state: str
    address: str
    """Of its node."""
    refused: str | None
    """Why it cannot start, which needs a person."""
    versions: Mapping[str, str]
    """The states of the engines of versions that are whole models."""


class Part:
    """The actor of a part. Ray calls its methods in threads."""

    def __init__(self, file: str, name: str, several: bool, folder: str) -> None:
        """`several`: parts may be on other nodes, so an engine listens for them.

        Relative paths of the configuration are in `folder`, if this node has it.
        """
        only_for_owner()
        with suppress(OSError):
            os.chdir(folder)
        ray = importlib.import_module("ray")
        self._again: bool = ray.get_runtime_context().was_current_actor_reconstructed
        self._address = own_address(ray)
        self._host = self._address if several else vllm.HOST
        self._file, self._name = Path(file), name
        self._child: Child | None = None
        self._versions: VersionEngines | None = None
        self._refused: str | None = None
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()
        threading.Thread(target=self._stay, args=[ray], daemon=True).start()

    def seen(self) -> Seen:
        """What `nextstate status` shows, and why it cannot start."""
        state = self._refused or (self._child.state if self._child else "waits")
        own = self._versions.children if self._versions else []
        return Seen(state, self._address, self._refused, {one.name: one.state for one in own})

    def end(self) -> None:
        """Ends the child; returns when it has ended."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._keep())
        except NextStateError as error:
            log.error("%s cannot start: %s", self._name, error)
            self._refused = str(error)
        except BaseException:
            log.exception("the actor of %s failed", self._name)
            os._exit(1)  # Ray starts it again

    def _stay(self, ray: Any) -> None:
        """Ends this process, and with it the child, when its node is no longer of the cluster."""
        raylet, missed_s = os.getppid(), 0.0
        while missed_s < LOST_S and os.getppid() == raylet:
            time.sleep(_BEAT_S)
            began = time.monotonic()
            if is_of_cluster(ray, _BEAT_TIMEOUT_S):
                missed_s = 0.0
            else:  # no more than that, if the machine slept
                missed_s += min(_BEAT_S + time.monotonic() - began, _BEAT_S + _BEAT_TIMEOUT_S)
        log.error("this node is no longer of the cluster: %s ends here", self._name)
        os._exit(1)

    async def _keep(self) -> None:
        settings = Settings.read(self._file)
        settings = replace(settings, engine=vllm.without_gpus(settings.engine))
        is_engine = self._name in settings.engine.parts
        if is_engine or self._name == "learner":
            vllm.check_model(settings.engine)
        if is_engine:
            await self._keep_engine(settings)
        elif await self._engines_known(settings):
            await self._keep_stage(settings)

    async def _keep_engine(self, settings: Settings) -> None:
        """Keeps the base's engine, and beside it those of versions that are whole models."""
        child, url = self._engine(settings)
        self._made(child)
        self._versions = VersionEngines(settings, child, host=self._host, prepare=_prepare)
        own = asyncio.create_task(self._versions.run(self._stopping))
        known = asyncio.create_task(stay_known(settings, self._name, url))

        def changed() -> None:  # a stage that stopped without it is tried again
            with suppress(OSError):
                os.utime(engine_file(settings))

        try:
            await Supervisor([child], changed, stopping=self._stopping).run()
        finally:
            known.cancel()
            await asyncio.gather(own, return_exceptions=True)

    async def _keep_stage(self, settings: Settings) -> None:
        """Keeps a stage, which starts again when an engine is elsewhere."""
        more = ["--under-ray"] * (self._name == "learner")
        child = stage_under_up(settings, self._name, *more)
        child.retry_on_change = (*child.retry_on_change, engine_file(settings))
        self._made(child)
        following = asyncio.create_task(_follow(settings, child))
        try:
            await Supervisor([child], stopping=self._stopping).run()
        finally:
            following.cancel()

    def _made(self, child: Child) -> None:
        _prepare(child)
        child.was_ready = self._again
        self._child = child

    def _engine(self, settings: Settings) -> tuple[Child, str]:
        """The base's process, on the port that it had if it was here before, and its address."""
        vllm.check_package()
        vllm.check_system(settings.engine)
        number = settings.engine.parts.index(self._name)
        with _engine_file_locked(settings):
            urls, key = engine_access(settings)
            known = urlsplit(urls[number])
            port = known.port if known.hostname == self._host else None
            if port is None or not vllm.port_is_free(self._host, port):
                port = vllm.free_port(self._host)
            urls[number] = engine_url(self._host, port)
            if settings.learner.trains_all:  # what ran beside an earlier one is gone
                shutil.rmtree(engines_folder(settings.store.path), ignore_errors=True)
            write_engine_file(settings, urls, key)
        child = engine_process(settings, self._name, number, port, key or "", host=self._host)
        return child, urls[number]

    async def _engines_known(self, settings: Settings) -> bool:
        """Returns True when each engine has an address, and False when stopping."""
        while not self._stopping.is_set():
            with suppress(NextStateError):
                if all(engine_access(settings)[0]):
                    return True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _LOOK_S)
        return False


async def _follow(settings: Settings, child: Child) -> None:
    """Ends the child, which is started again, whenever an engine is elsewhere."""
    urls = engine_access(settings)[0]
    while True:
        await asyncio.sleep(_LOOK_S)
        found = urls
        with suppress(NextStateError):
            found = engine_access(settings)[0]
        if found != urls:
            log.warning("an engine is elsewhere: %s starts again", child.name)
            urls = found
            await end(child)


async def stay_known(settings: Settings, name: str, url: str) -> None:
    """Ends this process once the engine file names another address: the part is elsewhere.

    A node that was cut off may still reach the state folder, and two would answer there.
    """
    known = url
    while known == url:
        await asyncio.sleep(_LOOK_S)
        with suppress(NextStateError):
            known = engine_access(settings)[0][settings.engine.parts.index(name)]
    log.error("another actor has this part by now: %s ends here", name)
    os._exit(1)


def _prepare(child: Child) -> None:
    """Makes a process one of a node of Ray."""
    child.env = without_ray(child.env or os.environ)
    child.death_signal = signal.SIGKILL  # its successor needs its port


def without_ray(env: Mapping[str, str]) -> dict[str, str]:
    """Without what Ray sets for its own processes, and with the switches of `offline`."""
    own = b"\0" + Path("/proc/self/environ").read_bytes()
    threads = _FROM_RAY if f"\0{_FROM_RAY}=".encode() not in own else None
    return {
        name: value
        for name, value in env.items()
        if name in SWITCHES or not (name.startswith("RAY_") or name == threads)
    }


@contextmanager
def _engine_file_locked(settings: Settings) -> Generator[None]:
    """Several engines write the file at once."""
    with (settings.store.path / "engine.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
