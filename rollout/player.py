"""Where an episode is played: in this process, or on another machine (`rollout/nodes.py`)."""

from __future__ import annotations

from typing import Protocol

from nextstate.hooks import EnvironmentKind, Shared
from rollout.attempt import Attempt, play
from rollout.pictures import Pictures
from rollout.proxy import Opened, ProxyClient
from rollout.tasks import Task


class Player(Protocol):
    """Plays episodes, as many at once as are asked for."""

    async def play(self, opened: Opened, task: Task, seed: int) -> Attempt:
        """Plays and closes one episode. It is `aborted` if whoever played it was lost."""
        ...

    async def release(self) -> None:
        """Ends what its episodes share."""
        ...


class Here:
    """Plays in this process."""

    def __init__(
        self,
        kind: EnvironmentKind,
        proxy: ProxyClient,
        max_calls: int,
        deadline_s: float,
        pictures: Pictures | None = None,
    ) -> None:
        self._kind, self._proxy, self._pictures = kind, proxy, pictures
        self._max_calls, self._deadline_s = max_calls, deadline_s

    async def play(self, opened: Opened, task: Task, seed: int) -> Attempt:
        """Plays and closes one episode."""
        environment = self._kind.make()
        if self._pictures is not None:
            environment = self._pictures.of(opened.episode, environment)
        return await play(
            self._proxy, opened, environment, task, seed, self._max_calls, self._deadline_s
        )

    async def release(self) -> None:
        """Ends what the environments share."""
        if isinstance(self._kind, Shared):
            await self._kind.release()
