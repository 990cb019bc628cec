"""Episodes on many machines: one actor of Ray on each node of a cluster.

The runner stays where it is, and `Nodes` is its player: it gives each episode to the node that
plays the fewest. Nothing comes back. The actor plays through the proxy, like a runner, and the
proxy is asked how the episode ended. So a lost actor needs no agreement with anybody: its episode
is closed as aborted, unless it has ended, and the runner opens another. If the actor still plays
somewhere, beyond a cut network, all that it asks for the old episode is refused.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nextstate.egress import guard
from nextstate.episodes import EpisodeStatus
from nextstate.errors import NextStateError, RefusedError, RolloutError
from nextstate.hooks import load_plugin
from nextstate.records import Json
from rollout.attempt import Attempt
from rollout.player import Here
from rollout.proxy import Opened, ProxyClient
from rollout.tasks import Task

log = logging.getLogger(__name__)

_LOOK_S = 2.0
"""Between two looks which nodes there are."""
_NO_NODE_S = 300.0
"""How long an episode waits for a node that plays. Ray needs a minute to start on a busy machine,
and some more to notice that a node is gone."""
_AGAIN_S = 1.0
_EXTRA_S = 180.0
"""Beyond the deadlines of an episode and of its outcome, after which it counts as lost."""
_STOP_S = 60.0
"""An actor that has not ended an episode by then counts as lost."""


@dataclass(frozen=True, slots=True)
class Work:
    """What an actor needs to know, besides its episodes."""

    environment: str
    """The plugin: `terminal`, or `module:function`."""
    url: str
    """The proxy's, as the nodes reach it."""
    key: str | None
    model: str
    max_calls: int
    deadline_s: float
    hosts: Collection[str]
    """That the actor may reach besides its machine and the proxy's."""


class Actor:
    """The worker on a node: it plays what it is given, as many at once as are given."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._here: Here | None = None
        self._playing: dict[str, asyncio.Task[Any]] = {}
        """By episode."""

    async def ready(self) -> None:
        """Raises NextStateError if the environment cannot be played here."""
        import aiohttp

        work = self._work
        guard([*work.hosts, host_of(work.url)])
        kind = load_plugin("environments", work.environment, None)
        await kind.check_machine()
        http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        proxy = ProxyClient(http, work.url, work.key, work.model, work.deadline_s)
        await proxy.check()
        self._here = Here(kind, proxy, work.max_calls, work.deadline_s)

    async def play(self, opened: Opened, task: Task, seed: int) -> None:
        """Plays and closes one episode."""
        assert self._here is not None
        playing = asyncio.ensure_future(self._here.play(opened, task, seed))
        self._playing[opened.episode] = playing
        try:
            await asyncio.wait({playing})
        finally:
            del self._playing[opened.episode]

    async def stop(self, episode: str) -> None:
        """Ends one episode, if it is still played."""
        if (playing := self._playing.get(episode)) is not None:
            playing.cancel()
            await asyncio.wait({playing})

    async def end(self) -> None:
        """Ends its episodes as aborted, with all that their environments run."""
        await asyncio.gather(*map(self.stop, [*self._playing]))
        if self._here is not None:
            await self._here.release()


@dataclass(slots=True, eq=False)
class _Node:
    """An actor on its node."""

    address: str
    actor: Any
    ready: bool = False
    playing: int = 0


class Nodes:
    """Plays on all nodes of a cluster, also on those that come later."""

    def __init__(self, ray: Any, work: Work, proxy: ProxyClient) -> None:
        """`ray` is what `nextstate.ray_cluster.connect` returned."""
        self._ray, self._work, self._proxy = ray, work, proxy
        self._nodes: dict[str, _Node] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._trouble = "no node is alive"

    async def play(self, opened: Opened, task: Task, seed: int) -> Attempt:
        """Plays one episode on some node; aborted if that was lost. Raises RolloutError."""
        if not self._tasks:
            self._begin(self._look())
        lost = ""
        node = await self._pick()
        node.playing += 1
        try:
            async with asyncio.timeout(2 * self._work.deadline_s + _EXTRA_S):
                await node.actor.play.remote(opened, task, seed)
        except self._ray.exceptions.RayError as error:
            lost = f"node {node.address} was lost: {type(error).__name__}"
            self._drop(node)
        except TimeoutError:
            lost = f"node {node.address} did not end it"
            await self._stop(node, opened.episode)
        except BaseException:
            await self._proxy.give_up(opened, EpisodeStatus.ABORTED)
            raise
        finally:
            node.playing -= 1
        attempt = await self._ended(opened, task, lost)
        if lost:
            log.warning("%s episode=%s ended as %s", lost, opened.episode, attempt.status)
        return attempt

    async def release(self) -> None:
        """Ends all actors and what they play, and leaves the cluster."""
        for task in self._tasks:
            task.cancel()
        nodes = [*self._nodes.values()]
        ends = [asyncio.ensure_future(_wait(node.actor.end.remote())) for node in nodes]
        if ends:
            await asyncio.wait(ends, timeout=30)
        await asyncio.to_thread(self._ray.shutdown)

    async def _stop(self, node: _Node, episode: str) -> None:
        """Ends one episode and leaves the node's others; a node that cannot do so is dropped."""
        try:
            async with asyncio.timeout(_STOP_S):
                await node.actor.stop.remote(episode)
        except (self._ray.exceptions.RayError, TimeoutError):
            self._drop(node)

    async def _ended(self, opened: Opened, task: Task, lost: str) -> Attempt:
        """How it ended by the proxy's word. If it did not, it is ended now."""
        status = EpisodeStatus.ABORTED if lost else EpisodeStatus.FAILED
        deadline = time.monotonic() + self._work.deadline_s
        while True:
            try:
                found = await self._proxy.ended(opened, status)
            except RolloutError as error:
                refused = isinstance(error, RefusedError) and error.status < 500
                if refused or time.monotonic() > deadline:
                    return Attempt(opened.episode, task, reason=str(error))
                await asyncio.sleep(_AGAIN_S)
            else:
                break
        status = EpisodeStatus(found["status"])
        reason = (lost or "see the log of its node") if found["outcome"] is None else None
        attempt = Attempt(opened.episode, task, status, found["outcome"], reason=reason)
        attempt.calls = found["calls"]
        return attempt

    async def _pick(self) -> _Node:
        """The node that plays the fewest episodes, once there is one."""
        try:
            async with asyncio.timeout(_NO_NODE_S), self._changed:
                await self._changed.wait_for(self._ready)
        except TimeoutError:
            raise RolloutError(f"no node plays: {self._trouble}") from None
        return min(self._ready(), key=lambda node: node.playing)

    def _ready(self) -> list[_Node]:
        return [node for node in self._nodes.values() if node.ready]

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look(self) -> None:
        """Puts an actor on each node that is alive and has none."""
        while True:
            found: list[Json] = []
            try:
                found = await asyncio.to_thread(self._ray.nodes)
            except Exception as error:  # Ray has several, also of gRPC
                self._trouble = f"Ray does not say which nodes there are: {type(error).__name__}"
                log.warning("%s", self._trouble)
            alive: dict[str, str] = {
                one["NodeID"]: one["NodeManagerAddress"] for one in found if one["Alive"]
            }
            for name, address in alive.items():
                if name not in self._nodes:
                    self._nodes[name] = node = _Node(address, self._make(name))
                    self._begin(self._greet(node))
            for name in self._nodes.keys() - alive.keys() if found else ():
                self._drop(self._nodes[name])
            await asyncio.sleep(_LOOK_S)

    def _make(self, name: str) -> Any:
        pinned = importlib.import_module("ray.util.scheduling_strategies")
        where = pinned.NodeAffinitySchedulingStrategy(name, soft=False)
        made = self._ray.remote(num_cpus=0, max_concurrency=1000, scheduling_strategy=where)(Actor)
        return made.remote(self._work)

    async def _greet(self, node: _Node) -> None:
        try:
            await node.actor.ready.remote()
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if not isinstance(cause, NextStateError):
                self._drop(node)  # it died: the next look makes another
                cause = type(error).__name__
            self._trouble = f"node {node.address} cannot play: {cause}"
            log.warning("%s", self._trouble)
            return
        log.info("node %s plays", node.address)
        node.ready = True
        async with self._changed:
            self._changed.notify_all()

    def _drop(self, node: _Node) -> None:
        """Forgets an actor and ends it, if it can still be reached."""
        for name, known in [*self._nodes.items()]:
            if known is node:
                del self._nodes[name]
                with suppress(Exception):  # of Ray: it is gone
                    self._ray.kill(node.actor, no_restart=True)


async def _wait(answer: Any) -> None:
    with suppress(Exception):  # of Ray: the actor has died
        await answer


def host_of(url: str) -> str:
    """The host of a proxy's address.

    >>> host_of("http://10.0.0.1:8080"), host_of("http://[::1]:8080")
    ('10.0.0.1', '::1')
    """
    return url.partition("://")[2].rpartition(":")[0].strip("[]")
