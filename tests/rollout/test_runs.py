"""rollout/runner.py: runs of one name that go on after a kill, and runs beside people."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from nextstate.episodes import EpisodeStatus
from nextstate.errors import RefusedError
from nextstate.pace import Pace
from nextstate.store import Store
from rollout.proxy import Opened, ProxyClient
from rollout.runner import asked_of, run
from tests.proxy.running_proxy import Running, both, until
from tests.rollout.machine import every_episode
from tests.rollout.test_runner import PLAN, ShownKind, client, ignore, play, tasks
from tests.scripted_engine import MODEL, ScriptedEngine


class Silent(ProxyClient):
    """Of a runner that is killed: it tells the proxy nothing more."""

    async def give_up(self, opened: Opened, status: EpisodeStatus) -> None:
        pass


def test_a_run_of_the_same_name_goes_on_and_plays_nothing_twice(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        plan = replace(PLAN, parallel=1, group_size=2, name="night")
        ended: list[str] = []

        async def forever_in_the_third() -> None:
            if len(ended) == 2:
                await asyncio.Event().wait()

        async with aiohttp.ClientSession() as http:
            proxy = Silent(http, p.url, None, MODEL, 60)
            kind = ShownKind(at_step=forever_in_the_third)
            first = asyncio.create_task(
                run(plan, tasks(3), kind, proxy, lambda one: ended.append(one.episode))
            )
            await until(lambda: len(ended) == 2 and kind.playing == 1)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
        rest = await play(p, ShownKind(), plan, tasks(3))
        assert ended == ["night-0-0", "night-0-1"]
        assert [one.episode for one in rest] == ["night-1-1", "night-2-0", "night-2-1"]
        found = {one.id: one.status for one in every_episode(store)}
        assert found.pop("night-1-0") == "aborted"
        assert {*found.values()} == {EpisodeStatus.DONE}
        assert await play(p, ShownKind(), plan, tasks(3)) == []
        with pytest.raises(RefusedError, match="answered 409"):
            await play(p, ShownKind(), replace(plan, seed=7), tasks(3))

    both(test, store, tmp_path)


def test_while_people_use_the_engine_a_run_plays_one_episode_at_a_time(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        async def people() -> bool:
            return True

        plan = replace(PLAN, parallel=4, group_size=4)
        kind = ShownKind(at_step=lambda: asyncio.sleep(0.01))
        pace = Pace(1.0, people)
        async with client(p) as proxy:
            played = await run(plan, tasks(1), kind, proxy, ignore, pace=pace)
            assert [one.status for one in played] == ["done"] * 4
            assert (kind.most_playing, pace.yields) == (1, True)
            kind = ShownKind(at_step=lambda: asyncio.sleep(0.1))
            await run(plan, tasks(1), kind, proxy, ignore)
            assert kind.most_playing == 4

    both(test, store, tmp_path)


def test_a_second_try_that_a_killed_run_left_is_played_or_aborted(
    store: Store, tmp_path: Path
) -> None:
    """With `--ray` an episode that is lost gets another in its place, which may be lost too."""

    async def test(_: ScriptedEngine, p: Running) -> None:
        plan = replace(PLAN, parallel=1, group_size=2, name="night")
        async with client(p) as proxy:
            task = tasks(1)[0]
            opened = await proxy.open_group(group="night-0", **asked_of(plan, task, 0))
            for lost in opened:
                await proxy.give_up(lost, EpisodeStatus.ABORTED)
                name = f"{lost.episode}~2"
                await proxy.open_episode(episode=name, group="night-0", **asked_of(plan, task, 0))
            half = await proxy.open_episode(
                episode="night-0-0~2", group="night-0", **asked_of(plan, task, 0)
            )
            await proxy.call(half, [{"role": "user", "content": "begin"}])
        (played,) = await play(p, ShownKind(), plan, tasks(1))
        assert played.episode == "night-0-1~2"
        found = {one.id: one.status for one in every_episode(store)}
        assert found["night-0-0~2"] == "aborted"
        assert {*found.values()} == {EpisodeStatus.ABORTED, EpisodeStatus.DONE}

    both(test, store, tmp_path)
