"""Episodes of two steps in the environment `tests.rollout.coins:create`, and an engine for them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import web

from nextstate.hooks import Acted, Scored
from nextstate.records import Json
from tests.scripted_engine import Script, ScriptedEngine


def machine() -> str:
    """The network namespace of this process, which stands for a machine."""
    return os.readlink("/proc/self/ns/net")


class Coin:
    """Says where it is, and ends after two steps."""

    async def reset(self, task: Json, seed: int) -> str:
        self.steps = 0
        return f"Coin {seed} at {machine()}?"

    async def step(self, action: str) -> Acted:
        self.steps += 1
        return Acted("Once more.", None, self.steps == 2)

    async def score(self) -> Scored:
        return Scored(1.0)

    async def close(self) -> None:
        pass


class Coins:
    def check_task(self, task: Json) -> None:
        pass

    async def check_machine(self) -> None:
        pass

    def make(self) -> Coin:
        return Coin()


def create(_: object) -> Coins:
    return Coins()


class Holding(ScriptedEngine):
    """Before some calls are answered, it does what it was given: then episodes are half."""

    def __init__(self, waiting: int, where: str = "", patience_s: float = 60) -> None:
        """It acts when so many calls wait, one of them from the machine `where` if that is set;
        each waits for that, but no longer than `patience_s`."""
        super().__init__()
        self.script = Script(("right", "."))
        self.acts: list[Callable[[], None]] = []
        self._waiting, self._where, self._patience_s = waiting, where, patience_s
        self._held: list[bytes] = []
        self._go = asyncio.Event()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self._held.append(body)
        there = any(self._where.encode() in one for one in self._held)
        if self.acts and there and len(self._held) >= self._waiting:
            await asyncio.to_thread(self.acts.pop(0))
            self._go.set()
            self._go = asyncio.Event()
        elif self.acts:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._go.wait(), self._patience_s)
        self._held.remove(body)
        return await super()._chat(request)


def arguments(tasks: Any, *more: str) -> list[str]:
    """Of `nextstate`, for eight groups of two."""
    return [
        *("rollout", "tests.rollout.coins:create", "--tasks", str(tasks), "--json"),
        *("--group-size", "2", "--parallel", "4", "--run", "night", *more),
    ]


def lines(count: int) -> str:
    """A file of tasks."""
    return "".join(f'{{"id": "c-{number}", "split": "train"}}\n' for number in range(count))
