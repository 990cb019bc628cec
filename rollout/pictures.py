"""Pictures of what agents saw, as files: EPISODE/STEP.jpg in a folder of the state folder.

The picture of a step shows what the agent saw before the reply of that step. Pictures are taken of
some episodes only, since one costs as much time as several steps, and only the newest episodes are
kept, each with its first steps. A picture that cannot be had is left out: the episode goes on.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

from nextstate import sealed_files
from nextstate.episodes import is_label
from nextstate.hooks import Acted, AgentProgram, Environment, Pictured, Scored
from nextstate.records import Json

log = logging.getLogger(__name__)

ONE_OF = 4
"""Of so many episodes, pictures of one are taken."""
MOST_EPISODES, MOST_STEPS, MOST_BYTES = 200, 20, 64 << 10
"""In the folder; of an episode; of a picture. A larger picture is left out."""


class Pictures:
    """The folder of all pictures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begun = 0

    def of(
        self, episode: str, environment: Environment | AgentProgram
    ) -> Environment | AgentProgram:
        """The environment, made to keep the pictures of this episode if it has some."""
        if isinstance(environment, AgentProgram) or not isinstance(environment, Pictured):
            return environment
        if not is_label(episode) or not sealed_files.may_write(self._folder / episode):
            return environment
        self._begun += 1
        return _Kept(self, episode, environment) if self._begun % ONE_OF == 1 else environment

    async def keep(self, episode: str, step: int, environment: Pictured) -> None:
        """Writes what the environment looks like now."""
        try:
            picture = await environment.picture()
            if picture is not None and len(picture) <= MOST_BYTES and step < MOST_STEPS:
                await asyncio.to_thread(self._write, episode, step, picture)
        except Exception as error:  # of a plugin or the disk
            log.warning("no picture: %s episode=%s step=%d", error, episode, step)

    def _write(self, episode: str, step: int, picture: bytes) -> None:
        folder = self._folder / episode
        if not folder.is_dir():
            self._make_room()
            folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{step}.part"
        sealed_files.write(part, picture, f"{step}.jpg")
        part.replace(folder / f"{step}.jpg")

    def _make_room(self) -> None:
        """Deletes the oldest episodes until another one may come."""
        found = [path for path in self._folder.glob("*") if path.is_dir()]
        found.sort(key=lambda path: path.stat().st_mtime)
        for path in found[: max(0, len(found) - MOST_EPISODES + 1)]:
            shutil.rmtree(path, ignore_errors=True)


class _Kept:
    """An environment whose pictures are kept."""

    def __init__(self, pictures: Pictures, episode: str, environment: Environment) -> None:
        self._pictures, self._episode, self._environment = pictures, episode, environment
        self._steps = 0

    async def reset(self, task: Json, seed: int) -> str:
        shown = await self._environment.reset(task, seed)
        await self._look()
        return shown

    async def step(self, action: str) -> Acted:
        acted = await self._environment.step(action)
        self._steps += 1
        if not acted.done:
            await self._look()
        return acted

    async def score(self) -> Scored:
        return await self._environment.score()

    async def close(self) -> None:
        await self._environment.close()

    async def _look(self) -> None:
        assert isinstance(self._environment, Pictured)
        await self._pictures.keep(self._episode, self._steps, self._environment)
