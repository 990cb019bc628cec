"""The proxy's view of engines that serve one version each, which is a whole model.

The supervisor starts and ends them and says in files where they are (`nextstate/engine/whole.py`).
One gets requests once it has agreed with the learner's log-probs, in this process too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from yarl import URL

from nextstate.engine.abilities import ADAPTERS, look
from nextstate.engine.adapter_files import verify_adapter
from nextstate.engine.client import EngineClient
from nextstate.engine.whole import UP, WholeEngine, agree, read_engines
from nextstate.errors import AdapterError, EngineError
from nextstate.records import PolicyVersion
from proxy.intervals import Intervals
from proxy.replica import Keeper, Replica
from proxy.upstream import Upstream

log = logging.getLogger(__name__)


class Router(Keeper, Protocol):
    """What chooses the engine of each request."""

    def add(self, replica: Replica) -> None:
        """Sends requests to one more engine as soon as it is up."""
        ...

    def remove(self, replica: Replica) -> None:
        """Sends no more requests to an engine."""
        ...

    def changed(self, replica: Replica) -> None:
        """Notes that an engine is up or down."""
        ...


class WholeEngines:
    """Follows the files; between `start` and `close`."""

    def __init__(
        self,
        state_dir: Path,
        base: EngineClient,
        headers: Mapping[str, str],
        intervals: Intervals,
        router: Router,
    ) -> None:
        """`headers` go with every request that is relayed."""
        self._state_dir = state_dir
        self._base = base
        self._headers = headers
        self._intervals = intervals
        self._router = router
        self._tasks: asyncio.TaskGroup
        self._known: dict[str, tuple[Replica, asyncio.Task[None]]] = {}

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """`tasks` watch the engines from now on."""
        self._tasks = tasks

    async def follow(self, versions: Sequence[PolicyVersion]) -> None:
        """Adds engines that are new and leaves those that are gone, if `versions` need any."""
        if not (self._known or any(version.is_whole_model for version in versions)):
            return
        found = await asyncio.to_thread(read_engines, self._state_dir)
        for name, (replica, _) in [*self._known.items()]:
            told = found.get(name)
            assert replica.whole is not None
            if told is None or told.url != replica.whole.url:
                await self._leave(name)
        host = URL(self._base.url).host
        for name, engine in found.items():
            here = URL(engine.url).host == host  # else the base is elsewhere by now
            if engine.state == UP and here and name not in self._known:
                self._add(engine)

    def _add(self, engine: WholeEngine) -> None:
        client = self._base.twin(engine.url, engine.name, f"engine-v{engine.number:06d}")
        upstream = Upstream(client.address, self._headers)
        replica = Replica(client, upstream, self._intervals, self._router.changed, engine)
        self._router.add(replica)
        task = self._tasks.create_task(replica.watch(self._router))
        self._known[engine.name] = replica, task

    async def _leave(self, name: str) -> None:
        replica, task = self._known.pop(name)
        task.cancel()
        self._router.remove(replica)
        # Its process is gone, so no answer can be cut by this.
        await replica.upstream.__aexit__()
        await replica.client.close()

    async def close(self) -> None:
        """Closes all connections."""
        for name in [*self._known]:
            await self._leave(name)

    async def prepare(self, replica: Replica) -> None:
        """Lets an engine serve once it agrees with the learner. Raises EngineError."""
        engine = replica.whole
        assert engine is not None
        found = await look(replica.client)
        try:
            await asyncio.to_thread(verify_adapter, Path(engine.path), engine.sha256)
            nats = await agree(replica.client, engine)
        except AdapterError as error:
            raise EngineError(str(error)) from error
        log.info("version=%d its engine agrees within %.1g nats", engine.number, nats)
        lacks = tuple(lack for lack in found.lacks if lack != ADAPTERS)
        replica.client.abilities = replace(found, adapters=False, lacks=lacks)
