"""Exams that `nextstate rollout ENVIRONMENT` holds for the lineage that it plays for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from nextstate.app.cli import command_parser
from nextstate.app.cli.rollout import exams_of
from nextstate.app.settings import Settings
from nextstate.engine.client import publish
from nextstate.episodes import Episode, EpisodeState, EpisodeStatus, Split
from nextstate.exams import Exam
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.examiners import Examiners
from proxy.lineages import Access
from rollout import exam as exam_module
from rollout.attempt import Attempt
from rollout.exam import Exams, Given, Place
from rollout.player import Here
from rollout.proxy import Opened, ProxyClient
from rollout.runner import Plan, run
from rollout.tasks import Task
from tests.proxy.running_proxy import Running, add_version, both, running, until
from tests.rollout.coins import Holding
from tests.rollout.machine import every_episode
from tests.rollout.test_nodes import environment as without_ray
from tests.rollout.test_nodes import needs_ray
from tests.rollout.test_runner import PLAN, ShownKind, client, ignore, tasks
from tests.scripted_engine import MODEL, ScriptedEngine, write_weights

ROOT = Path(__file__).parents[2]
GIVEN = Given(
    "main",
    "nextstate rollout --run night",
    "shown",
    lambda: [Task(f"held-{n}", Split.EVAL, {}) for n in range(4)],
    {"max_calls": 10, "sampling": {"temperature": 1.0}},
    60.0,
)


def exam_of(store: Store, lineage: str = "main") -> Exam:
    (version,) = store.versions.newest(lineage, 1)
    return Exam.of(version.metrics)


def exam_episodes(store: Store) -> list[Episode]:
    return [one for one in every_episode(store) if one.split is Split.EVAL]


async def episodes_of(exams: Exams) -> AsyncGenerator[tuple[Place, Opened, Task]]:
    while (found := await exams.next()) is not None:
        yield found


def test_a_run_of_another_lineage_plays_the_exam_of_its_candidate(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        folder = tmp_path / "other-1"
        sha256 = write_weights(folder)
        made = PolicyVersion("other", 1, 0, str(folder), sha256, 16, VersionState.CANDIDATE)
        store.versions.add(made, None)
        holders: list[str | None] = []

        async def look() -> None:
            holders.append(store.examiners.holder("other"))

        plan = replace(PLAN, lineage="other")
        async with client(p) as proxy:
            exams = Exams(replace(GIVEN, lineage="other"), proxy, store)
            given = plan, tasks(3), ShownKind(at_step=look), proxy, ignore
            attempts = await run(*given, exams=exams)
        assert [one.task.split for one in attempts] == ["train"] * 3
        assert exam_of(store, "other") == Exam(planned=4, tasks=4, solved=4)
        played = exam_episodes(store)
        assert sorted((one.task, one.version, one.seed) for one in played) == [
            (f"held-{n}", version, n) for n in range(4) for version in (0, 1)
        ]
        assert {(one.lineage, one.max_calls, one.sampling["temperature"]) for one in played} == {
            ("other", 10, 1.0)
        }
        assert exams.played == 8
        assert {*holders} == {GIVEN.holder}
        assert store.examiners.holder("other") is None

    both(test, store, tmp_path, access={"other": Access("other", None)})


def test_one_run_holds_the_exams_and_another_takes_over_when_it_has_ended(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exam_module, "HOLD_S", 0.01)
    monkeypatch.setattr(exam_module, "LOOK_S", 0.01)

    async def test(_: ScriptedEngine, p: Running) -> None:
        add_version(store, tmp_path, 1)
        assert store.examiners.hold("main", "another") == "another"
        go = asyncio.Event()

        async def held() -> None:
            if not go.is_set():
                assert not exam_episodes(store)
                store.examiners.leave("main", "another")
                await until(lambda: store.examiners.holder("main") == GIVEN.holder)
                go.set()

        async with client(p) as proxy:
            exams = Exams(GIVEN, proxy, store)
            plan, kind = replace(PLAN, parallel=1), ShownKind(at_step=held)
            await run(plan, tasks(3), kind, proxy, ignore, exams=exams)
        assert go.is_set()
        assert exam_of(store).is_over

    both(test, store, tmp_path)


class Losing(Here):
    """As the nodes of Ray: the first two episodes are lost with whoever played them."""

    lost = 0

    async def play(self, opened: Opened, task: Task, seed: int) -> Attempt:
        if self.lost < 2:
            self.lost += 1
            await self._proxy.give_up(opened, EpisodeStatus.ABORTED)
            return Attempt(opened.episode, task, EpisodeStatus.ABORTED)
        return await super().play(opened, task, seed)


def test_an_episode_of_an_exam_that_its_node_lost_is_played_again(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        add_version(store, tmp_path, 1)
        async with client(p) as proxy:
            kind = ShownKind()
            player = Losing(kind, proxy, 10, 60.0)
            exams = Exams(GIVEN, proxy, store)
            await run(PLAN, tasks(1), kind, proxy, ignore, player=player, exams=exams)
        assert exam_of(store) == Exam(planned=4, tasks=4, solved=4)
        statuses = [one.status for one in exam_episodes(store)]
        assert statuses.count(EpisodeStatus.ABORTED) == 2
        assert statuses.count(EpisodeStatus.DONE) == 8

    both(test, store, tmp_path)


def test_an_exam_that_begins_leaves_the_episodes_alone_that_are_still_played(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exam_module, "LOOK_S", 0.0)

    async def test(_: ScriptedEngine, p: Running) -> None:
        made = add_version(store, tmp_path, 1)
        async with client(p) as proxy:
            exams = Exams(GIVEN, proxy, store)
            found = await exams.next()
            assert found is not None
            place, opened, task = found
            assert (place.version, await proxy.calls(opened)) == (1, 0)
            await publish(store, p.proxy.engines, made)  # it was waited for long enough
            add_version(store, tmp_path, 2)
            places = [one[0] async for one in episodes_of(exams)]
            assert await proxy.state(opened.episode) is EpisodeState.OPEN
            assert (len(places), len({*places, place})) == (7, 8)
            for one in (*places, place):
                done = Attempt(opened.episode, task, EpisodeStatus.DONE, outcome=1.0)
                await exams.ended(one, done)
            assert await exams.next() is None
        assert exam_of(store) == Exam(planned=4, tasks=4, solved=4)

    both(test, store, tmp_path)


def test_a_run_that_ends_while_it_says_that_it_holds_the_exams_holds_them_no_more(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go = threading.Event(), threading.Event()

    def hold(lineage: str, holder: str) -> str:
        asked.set()
        go.wait(2)  # longer than `leave` would take beside it
        return Examiners.hold(store.examiners, lineage, holder)

    async def test() -> None:
        holding = asyncio.create_task(
            Exams(GIVEN, ProxyClient.__new__(ProxyClient), store).hold_on()
        )
        await asyncio.to_thread(asked.wait)
        holding.cancel()
        done, _ = await asyncio.wait([holding], timeout=1)
        assert not done
        go.set()
        await asyncio.wait([holding])

    monkeypatch.setattr(store.examiners, "hold", hold)
    asyncio.run(test())
    assert store.examiners.holder("main") is None


def test_workers_that_find_nothing_wait_for_an_exam_while_another_plays(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exam_module, "LOOK_S", 0.0)

    async def test(_: ScriptedEngine, p: Running) -> None:
        async def step() -> None:
            if not store.versions.newest("main", 1):
                await asyncio.sleep(0.1)  # the others have looked, and found nothing
                add_version(store, tmp_path, 1)
            await until(lambda: kind.most_playing == PLAN.parallel)

        kind = ShownKind(at_step=step)
        async with client(p) as proxy:
            exams = Exams(GIVEN, proxy, store)
            await run(PLAN, tasks(1), kind, proxy, ignore, exams=exams)
        assert kind.most_playing == PLAN.parallel
        assert exam_of(store) == Exam(planned=4, tasks=4, solved=4)

    both(test, store, tmp_path)


@asynccontextmanager
async def command(store: Store, p: Running, tmp_path: Path, *more: str) -> AsyncGenerator[Process]:
    """`nextstate rollout` in a process of its own, on the proxy's store."""
    config, source = tmp_path / "nextstate.toml", tmp_path / "tasks.jsonl"
    config.write_text(
        f'[store]\ndir = "{store.dir}"\n[proxy]\nport = {p.url.rpartition(":")[2]}\n'
        f'[engine]\nmode = "external"\nurl = "http://127.0.0.1:1"\nmodel = "{MODEL}"\n'
    )
    splits = ["train"] * 2 + ["eval"] * 4
    source.write_text(
        "".join(f'{{"id": "c-{n}", "split": "{split}"}}\n' for n, split in enumerate(splits))
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "nextstate", "rollout", "tests.rollout.coins:create"),
        *("--config", str(config), "--tasks", str(source), "--run", "night", "--parallel", "2"),
        *more,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=without_ray(tmp_path),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.processes
def test_a_command_that_was_killed_in_an_exam_goes_on_with_it_and_plays_nothing_twice(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> None:
        engine = Holding(waiting=2)
        server = engine.server = TestServer(engine.app())
        await server.start_server()
        async with running(engine.url, store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            add_version(store, tmp_path, 1)
            async with command(store, p, tmp_path) as first:
                # Some episodes have ended, and two are half.
                engine.acts = [lambda: None, lambda: None, first.kill]
                await first.wait()
            holder = store.examiners.holder("main")
            before = exam_episodes(store)
            assert holder == "nextstate rollout --run night"
            assert {one.status for one in before} == {EpisodeStatus.DONE, None}
            async with command(store, p, tmp_path) as second:
                out, _ = await second.communicate()
            assert second.returncode == 0
        await server.close()
        assert exam_of(store) == Exam(planned=4, tasks=4, solved=4)
        done = [one for one in exam_episodes(store) if one.status is EpisodeStatus.DONE]
        assert len(done) == len({(one.task, one.version) for one in done}) == 8
        assert {one.task for one in done} == {f"c-{n}" for n in range(2, 6)}
        assert {one.status for one in every_episode(store)} == {
            EpisodeStatus.DONE,
            EpisodeStatus.ABORTED,
        }
        lines = out.decode().splitlines()
        assert any(line.startswith("8 episodes in") for line in lines)
        assert any("more in the exams of candidates" in line for line in lines)
        assert store.examiners.holder("main") is None

    asyncio.run(test())


@needs_ray
@pytest.mark.timeout(900)
def test_exams_are_played_on_the_nodes_of_ray(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        add_version(store, tmp_path, 1)
        async with command(store, p, tmp_path, "--ray", "--json") as process:
            out, _err = await process.communicate()
        assert process.returncode == 0
        assert len(out.splitlines()) == 8  # of the tasks that train
        assert exam_of(store) == Exam(planned=4, tasks=4, solved=4)
        assert {one.calls for one in exam_episodes(store)} == {2}

    both(test, store, tmp_path)


@pytest.mark.parametrize(
    ("more", "learner", "holds"),
    [((), "", True), (("--eval",), "", False), ((), "[learner]\nlora_rank = 0\n", False)],
)
def test_a_run_that_only_measures_and_one_of_whole_models_hold_no_exams(
    store: Store, tmp_path: Path, more: tuple[str, ...], learner: str, holds: bool
) -> None:
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{store.dir}"\n{learner}')
    args = command_parser().parse_args(["rollout", "terminal", "--tasks", "t", *more])
    read = [Task("t-1", Split.TRAIN, {})]
    plan, proxy = Plan("terminal"), ProxyClient.__new__(ProxyClient)
    found = exams_of(args, Settings.read(config), plan, read, proxy, store)
    assert (found is not None) is holds
