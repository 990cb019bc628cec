"""One of the engines as the proxy sees it: whether it serves, and which adapters it has loaded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from nextstate.engine.client import EngineClient, ensure_loaded
from nextstate.engine.whole import WholeEngine
from nextstate.errors import AdapterError, EngineError, WrongEngineError
from nextstate.records import Json, PolicyVersion
from proxy.intervals import Intervals
from proxy.upstream import Upstream

log = logging.getLogger(__name__)


class Keeper(Protocol):
    """What decides what an engine must have loaded before requests are sent to it."""

    async def prepare(self, replica: Replica) -> None:
        """Finds out what an engine can do and loads the serving versions. Raises EngineError."""
        ...

    async def look_again(self, replica: Replica) -> bool:
        """Looks if an engine that serves lacks anything. False if there was nothing to look for.

        Raises EngineError if it still lacks a serving version.
        """
        ...

    def found(self, replica: Replica) -> str:
        """What the log says of an engine that serves."""
        ...


class Replica:
    """An engine's state; `watch` must be running."""

    def __init__(
        self,
        client: EngineClient,
        upstream: Upstream,
        intervals: Intervals,
        changed: Callable[[Replica], None],
        whole: WholeEngine | None = None,
    ) -> None:
        """`changed` is called after each change of `up` and `wrong`.

        `whole`: it serves one version, which is a whole model, and nothing else.
        """
        self.whole = whole
        self.client = client
        self.upstream = upstream
        """The connections of relayed requests."""
        self.running = 0
        """Requests of agents that it answers now, or that wait for it."""
        self.sent = 0
        """Requests of agents that were sent to it so far."""
        self.loaded: set[str] = set()
        """Adapters that it has loaded and that have answered a probe."""
        self.up = False
        """Whether requests are sent to it."""
        self.wrong: str | None = None
        """Why no request can be sent to this server until a person changes something, or None."""
        self.trouble = ""
        """What was the matter when it was last looked at; "" if it serves."""
        self.look_at = 0.0
        """When it is looked at again for what it lacked, on the monotonic clock."""
        self.load_at = 0.0
        """When a serving version that it lacks is loaded again, on the monotonic clock."""
        self._intervals = intervals
        self._changed = changed
        self._woken = asyncio.Event()
        self._logged = ""
        """What was logged last about it."""
        self._asking: asyncio.Task[bool] | None = None

    @property
    def name(self) -> str:
        """What people see of it."""
        return self.client.name

    @property
    def takes_adapters(self) -> bool:
        """Whether it loads adapters while it runs, as far as is known."""
        return self.client.abilities.adapters

    def health(self) -> Json:
        """What is told to people who may see the engines' addresses."""
        trouble = self.wrong or self.trouble
        return {"name": self.name, "state": "up" if self.up else "down", "trouble": trouble}

    def has(self, version: PolicyVersion) -> bool:
        """Whether it can answer with a version at once."""
        if self.whole is not None:
            return self.serves(version)
        return version.adapter_name is None or version.adapter_name in self.loaded

    def serves(self, version: PolicyVersion) -> bool:
        """Whether it can answer with a version, perhaps after loading an adapter."""
        if self.whole is not None or version.is_whole_model:
            return self.whole is not None and self.whole.name == version.adapter_name
        return True

    async def load(self, version: PolicyVersion) -> None:
        """Loads a version's adapter and probes it. Raises as `ensure_loaded` does."""
        await ensure_loaded(self.client, version)
        if version.adapter_name is not None:
            self.loaded.add(version.adapter_name)

    async def is_well(self) -> bool:
        """Whether it can serve, after a request failed. If not, it gets no further ones.

        All callers at one time share one question to it.
        """
        if self.up:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._is_healthy())
            with suppress(WrongEngineError):  # by now it is known to be down
                if not await asyncio.shield(self._asking):
                    self.failed()
        return self.up

    async def _is_healthy(self) -> bool:
        """What it says; if it cannot be asked, what was known before.

        Raises WrongEngineError once it is known to be down.
        """
        try:
            return await self.client.healthy()
        except WrongEngineError:
            if self.up:
                return False
            raise
        except EngineError as error:
            log.warning("%s", error)
            return self.up

    def failed(self) -> None:
        """Sends it no requests until it is back and the serving versions are loaded."""
        self._set(up=False)
        self.wake()

    def wake(self) -> None:
        """Lets the watch look at once."""
        self._woken.set()

    def refuses_additions(self) -> None:
        """Remembers that it accepts no requests with our additions."""
        self.client.abilities = replace(self.client.abilities, additions=False)

    def _set(self, *, up: bool, wrong: str | None = None, trouble: str = "") -> None:
        self.up, self.wrong, self.trouble = up, wrong, trouble
        if not up:
            self.loaded.clear()
        self._changed(self)

    async def watch(self, keeper: Keeper) -> None:
        """Follows its health until cancelled."""
        pause = self._intervals.down_poll_s
        quiet_until = time.monotonic() + self._intervals.quiet_start_s
        while True:
            self._woken.clear()
            healthy = False
            try:
                healthy = await self._is_healthy()
                if self.up and not healthy:  # it may have been busy for a moment
                    healthy = await self._is_healthy()
                if not healthy:
                    why = self.client.trouble
                    self._set(up=False, trouble=why)
                    if self._logged or time.monotonic() > quiet_until:
                        self._log_new(f"the engine is not there, requests wait: {why}")
                elif not self.up:
                    await keeper.prepare(self)
                    self._set(up=True)
                    self._log_new(keeper.found(self))
                else:
                    await self._look_again(keeper)
            except WrongEngineError as error:
                self._set(up=False, wrong=str(error))
                self._log_new(f"no request is let through: {error}")
            except EngineError as error:
                self._set(up=False, trouble=str(error))
                self._log_new(f"the engine is there, but cannot serve yet: {error}")
            except Exception:
                self._set(up=False)
                log.exception("getting the engine ready failed; trying again")
            if self.up:
                pause = self._intervals.health_poll_s
            elif not healthy or pause == self._intervals.health_poll_s:
                pause = self._intervals.down_poll_s
            else:
                pause = min(2 * pause, self._intervals.slowest_poll_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), pause)

    async def _look_again(self, keeper: Keeper) -> None:
        try:
            if not await keeper.look_again(self):
                return
            self.trouble = ""
        except (EngineError, AdapterError) as error:  # it serves what it has
            self.trouble = str(error)
            log.info("%s could not be looked at again: %s", self.client.url, error)
        self._log_new(keeper.found(self))

    def _log_new(self, what: str) -> None:
        """Logs a message about the engine, unless it was the last one."""
        if what != self._logged:
            self._logged = what
            level = logging.INFO if self.up and not self.client.abilities.lacks else logging.WARNING
            log.log(level, "%s (%s)", what, self.client.url)
