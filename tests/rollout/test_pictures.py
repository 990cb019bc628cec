"""rollout/pictures.py: what is kept of what agents saw, and how much."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from nextstate.hooks import Acted, Environment, Scored
from nextstate.records import Json
from rollout.pictures import MOST_BYTES, MOST_EPISODES, MOST_STEPS, ONE_OF, Pictures


class Blind:
    """An environment that ends after some steps."""

    def __init__(self, ends_after: int = 2) -> None:
        self.left = ends_after

    async def reset(self, task: Json, seed: int) -> str:
        return "begin"

    async def step(self, action: str) -> Acted:
        self.left -= 1
        return Acted("go on", None, not self.left)

    async def score(self) -> Scored:
        return Scored(1.0)

    async def close(self) -> None:
        pass


class Seen(Blind):
    """One that looks like a number."""

    def __init__(self, ends_after: int = 2, size: int = 1) -> None:
        super().__init__(ends_after)
        self.size = size

    async def picture(self) -> bytes | None:
        return b"%d" % self.left * self.size


class Broken(Blind):
    async def picture(self) -> bytes | None:
        raise OSError("no screen")


def play(pictures: Pictures, episode: str, environment: Environment) -> None:
    async def run() -> None:
        played = pictures.of(episode, environment)
        await played.reset({}, 0)
        while not (await played.step("act")).done:
            pass
        assert (await played.score()).outcome == 1.0
        await played.close()

    asyncio.run(run())


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_picture_shows_what_the_agent_saw_before_each_step(tmp_path: Path) -> None:
    play(Pictures(tmp_path), "group-0", Seen(3))
    assert files(tmp_path) == {"group-0/0.jpg": "3", "group-0/1.jpg": "2", "group-0/2.jpg": "1"}


def test_pictures_are_taken_of_one_episode_in_some(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path)
    for number in range(2 * ONE_OF):
        play(pictures, f"e-{number}", Seen())
    assert {path.name for path in tmp_path.iterdir()} == {"e-0", f"e-{ONE_OF}"}


def test_an_environment_without_a_look_or_with_a_broken_one_is_played_as_it_is(
    tmp_path: Path,
) -> None:
    for environment in (Blind(), Broken()):
        play(Pictures(tmp_path), "e", environment)
    play(Pictures(tmp_path / "in"), "../out", Seen())
    assert files(tmp_path) == {}


def test_number_and_size_of_pictures_are_bounded(tmp_path: Path) -> None:
    play(Pictures(tmp_path), "long", Seen(MOST_STEPS + 5))
    assert len(files(tmp_path)) == MOST_STEPS
    play(Pictures(tmp_path), "large", Seen(size=MOST_BYTES + 1))
    assert len(files(tmp_path)) == MOST_STEPS
    for number in range(MOST_EPISODES):
        (tmp_path / f"old-{number}").mkdir()
        os.utime(tmp_path / f"old-{number}", (number, number))
    play(Pictures(tmp_path), "new", Seen())
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == MOST_EPISODES
    assert {"long", "new"} <= left
    assert "old-1" not in left
