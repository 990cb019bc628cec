"""The endless stage: groups with numbers, exams, room for people, what a kill leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nextstate.episodes import Episode, EpisodeState, EpisodeStatus, Split
from nextstate.errors import ConfigError, RolloutError
from nextstate.exams import MISSED, Exam
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from plugins.environments.terminal import TerminalKind
from plugins.environments.tools import ToolsKind
from rollout.config import RolloutConfig
from rollout.progress import read_progress
from rollout.sources import Generated, TaskFile, source_of, tasks_of
from rollout.stage import run
from rollout.tasks import Task
from tests.proxy.running_proxy import Running, add_version, both, request, until
from tests.rollout.machine import every_episode
from tests.rollout.test_runner import ShownKind, client
from tests.scripted_engine import Script, ScriptedEngine

CONFIG = RolloutConfig(environment="shown", parallel=2, group_size=2, deadline_s=60, exam_tasks=4)


class Numbers:
    """Tasks that are their numbers."""

    def __init__(self, held_out: int = 4) -> None:
        self._held_out = held_out

    def training(self, number: int) -> Task:
        return Task(f"task-{number}", Split.TRAIN, {"number": number})

    def held_out(self, count: int) -> list[Task]:
        return [Task(f"held-{n}", Split.EVAL, {"number": n}) for n in range(self._held_out)][:count]


@asynccontextmanager
async def playing(
    p: Running,
    store: Store,
    folder: Path,
    kind: Any,
    config: RolloutConfig = CONFIG,
    source: Any = None,
) -> AsyncGenerator[asyncio.Task[None]]:
    """The stage, for as long as the block runs."""
    stop = asyncio.Event()
    async with client(p) as proxy:
        stage = asyncio.create_task(
            run(config, kind, source or Numbers(), proxy, store, folder, stop)
        )
        try:
            yield stage
        finally:
            stop.set()
            await asyncio.wait({stage})


def episodes(store: Store, split: Split = Split.TRAIN) -> list[Episode]:
    return [one for one in every_episode(store) if one.split is split]


def ended(store: Store) -> int:
    return sum(one.state is not EpisodeState.OPEN for one in episodes(store))


def test_groups_have_numbers_which_are_their_seeds_and_go_on_after_a_stop(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        for least in (5, 9):
            kind = ShownKind()
            async with playing(p, store, tmp_path, kind):
                await until(lambda least=least: ended(store) >= least)
            assert kind.closed
        found = episodes(store)
        numbers = [int(str(one.group).removeprefix("train.main.shown.")) for one in found]
        assert {*numbers} == {*range(max(numbers) + 1)}
        assert [(one.seed, one.task) for one in found] == [(n, f"task-{n}") for n in numbers]
        assert max(numbers.count(n) for n in numbers) <= CONFIG.group_size + 2  # two were aborted

    both(test, store, tmp_path)


def test_what_a_killed_run_left_half_is_aborted_and_replaced_in_its_group(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        async with client(p) as proxy:
            asked = {"environment": "shown", "task": "task-3", "group_size": 2, "seed": 3}
            budgets = {"max_calls": CONFIG.max_calls, "deadline_s": CONFIG.open_s}
            group = "train.main.shown.000000003"
            half, _ = await proxy.open_group(
                **asked, **budgets, split=Split.TRAIN, lineage="main", group=group
            )
            await proxy.call(half, [{"role": "user", "content": "begin"}])
        async with playing(p, store, tmp_path, ShownKind()):
            await until(lambda: ended(store) >= 5)
        found = {one.id: one.status for one in episodes(store) if one.group == group}
        assert found == {f"{group}-0": "aborted", f"{group}-1": "done", f"{group}-0~2": "done"}
        others = {one.seed for one in episodes(store) if one.group != group}
        assert min(seed for seed in others if seed is not None) == 4

    both(test, store, tmp_path)


def test_a_second_try_that_a_killed_run_left_half_is_replaced_too(
    store: Store, tmp_path: Path
) -> None:
    """Its place was lost once before the kill; the group is settled without waiting for it."""

    async def test(engine: ScriptedEngine, p: Running) -> None:
        group = "train.main.shown.000000003"
        async with client(p) as proxy:
            asked = {"environment": "shown", "task": "task-3", "group_size": 2, "seed": 3}
            asked |= {"max_calls": CONFIG.max_calls, "deadline_s": CONFIG.open_s}
            asked |= {"split": Split.TRAIN, "lineage": "main", "group": group}
            lost, _ = await proxy.open_group(**asked)
            await proxy.give_up(lost, EpisodeStatus.FAILED)
            half = await proxy.open_episode(episode=f"{group}-0~2", **asked)
            await proxy.call(half, [{"role": "user", "content": "begin"}])
        async with playing(p, store, tmp_path, ShownKind()):
            await until(lambda: ended(store) >= 6)
        found = {one.id: one.status for one in episodes(store) if one.group == group}
        assert found == {
            f"{group}-0": "failed",
            f"{group}-0~2": "aborted",
            f"{group}-0~3": "done",
            f"{group}-1": "done",
        }

    both(test, store, tmp_path)


def test_groups_of_others_whose_names_begin_as_ours_are_left_alone(
    store: Store, tmp_path: Path
) -> None:
    """Those of another environment `shown.x`, of a run, or of a program of somebody's."""

    async def test(_: ScriptedEngine, p: Running) -> None:
        asked = {"environment": "other", "task": "t", "group_size": 1, "deadline_s": 600}
        others = ["x", "x.000000007", "0000000007", "12345678x"]
        async with client(p) as proxy:
            for name in others:
                await proxy.open_group(**asked, group=f"train.main.shown.{name}")
            add_version(store, tmp_path, 1)
            async with playing(p, store, tmp_path, ShownKind(), replace(CONFIG, exam_tasks=1)):
                await until(lambda: exam_of(store).is_over)
                await until(lambda: ended(store) >= 2)
            (key,) = {
                str(one.group).rpartition(".")[0]
                for one in episodes(store, Split.EVAL)
                if one.version == 1
            }
            await proxy.open_group(**asked, group=f"{key}.x", split=Split.EVAL)
            store.versions.note("main", 1, {"exam/planned": 0.0})
            async with playing(p, store, tmp_path, ShownKind(), replace(CONFIG, exam_tasks=1)):
                await until(lambda: ended(store) >= 4)
        theirs = [one for one in every_episode(store) if one.environment == "other"]
        assert {one.state for one in theirs} == {EpisodeState.OPEN}
        numbers = {one.seed for one in episodes(store) if one.environment == "shown"}
        assert min(n for n in numbers if n is not None) == 0

    both(test, store, tmp_path)


def test_an_episode_that_breaks_is_replaced_and_many_in_a_row_end_the_stage(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += [Script(status=400)]
        async with playing(p, store, tmp_path, ShownKind()):
            await until(lambda: ended(store) >= 3)
        found = {one.id: one.status for one in episodes(store)}
        failed = [name for name, status in found.items() if status is EpisodeStatus.FAILED]
        assert len(failed) == 1
        assert found[f"{failed[0]}~2"] is EpisodeStatus.DONE

        async def breaks() -> None:
            raise RolloutError("no disk")

        async with playing(p, store, tmp_path, ShownKind(at_reset=breaks)) as stage:
            await asyncio.wait({stage})
        with pytest.raises(RolloutError, match="the last 4 episodes failed: no disk"):
            await stage

    both(test, store, tmp_path)


def exam_of(store: Store) -> Exam:
    (version,) = store.versions.newest("main", 1)
    return Exam.of(version.metrics)


def test_a_candidate_and_its_parent_play_the_held_out_tasks_before_anything_else(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        add_version(store, tmp_path, 1)
        async with playing(p, store, tmp_path, ShownKind()):
            await until(lambda: exam_of(store).is_over)
            store.versions.serve_candidate(store.versions.newest("main", 1)[0])
        assert exam_of(store) == Exam(planned=4, tasks=4, solved=4)
        played = episodes(store, Split.EVAL)
        assert sorted((one.task, one.version, one.seed) for one in played) == [
            (f"held-{n}", version, n) for n in range(4) for version in (0, 1)
        ]
        assert {one.state for one in played} == {EpisodeState.CLOSED}
        assert {one.version_max for one in played} == {0, 1}
        add_version(store, tmp_path, 2)
        async with playing(p, store, tmp_path, ShownKind()):
            await until(lambda: exam_of(store).is_over)
        again = [one.version for one in episodes(store, Split.EVAL)[len(played) :]]
        assert again == [2] * 4  # its parent has played them before

    both(test, store, tmp_path)


def test_an_exam_goes_on_after_a_kill_and_a_broken_episode_is_tried_again(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        add_version(store, tmp_path, 1)
        engine.queue += [Script(), Script(status=400)]
        held = asyncio.Event()

        async def stuck() -> None:
            await held.wait()

        async with playing(p, store, tmp_path, ShownKind(at_score=stuck)) as stage:
            await until(lambda: len(engine.requests) >= 2)
            stage.cancel()  # it aborts what it plays
        async with playing(p, store, tmp_path, ShownKind()):
            await until(lambda: exam_of(store).is_over)
        found = exam_of(store)
        assert (found.planned, found.tasks, found.solved) == (4, 4, 4)
        outcomes = [one for one in episodes(store, Split.EVAL) if one.outcome is not None]
        assert len(outcomes) == 8
        assert len({(one.task, one.version) for one in outcomes}) == 8

    both(test, store, tmp_path)


def test_without_held_out_tasks_an_exam_is_missed_at_once(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        add_version(store, tmp_path, 1)
        async with playing(p, store, tmp_path, ShownKind(), source=Numbers(0)):
            await until(lambda: MISSED in store.versions.newest("main", 1)[0].metrics)
        assert not episodes(store, Split.EVAL)

    both(test, store, tmp_path)


def test_an_exam_that_the_proxy_refuses_is_given_up_and_training_goes_on(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        made = PolicyVersion("main", 1, 0, None, "ff", 16, VersionState.CANDIDATE)
        store.versions.add(made, None)  # without an adapter
        async with playing(p, store, tmp_path, ShownKind()):
            await until(lambda: MISSED in store.versions.newest("main", 1)[0].metrics)
            await until(lambda: ended(store) >= 3)

    both(test, store, tmp_path)


def test_while_people_use_the_engine_one_episode_is_played_at_a_time(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        async with client(p) as proxy:
            assert not await proxy.people()
            await p.chat(request())
            assert await proxy.people()
            assert not await proxy.people()
            (opened,) = await proxy.open_group(environment="e", task="t", group_size=1)
            await proxy.call(opened, [{"role": "user", "content": "begin"}])
            assert not await proxy.people()  # nobody waits for an episode's reply

        first = asyncio.Event()

        async def count() -> None:
            first.set()
            await asyncio.sleep(0)

        kind = ShownKind(at_step=count)
        async with playing(p, store, tmp_path, kind):
            await first.wait()
            await p.chat(request())
            await until(lambda: read_progress(tmp_path).get("yields") is True)
            assert read_progress(tmp_path)["playing"] <= 1

    both(test, store, tmp_path)


def test_a_proxy_that_is_away_is_waited_for(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        url, p.url = p.url, "http://127.0.0.1:1"
        async with playing(p, store, tmp_path, ShownKind()) as stage:
            ended, playing_on = await asyncio.wait({stage}, timeout=0.2)
            assert (ended, playing_on) == (set(), {stage})
        p.url = url

    both(test, store, tmp_path)


def test_a_file_is_played_again_and_again_in_another_order() -> None:
    tasks = [Task(f"t-{n}", Split.TRAIN, {}) for n in range(9)]
    held = [Task(f"e-{n}", Split.EVAL, {}) for n in range(5)]
    source, same = TaskFile("f", [*tasks, *held]), TaskFile("f", [*tasks, *held])
    first, second = ([source.training(9 * epoch + n).id for n in range(9)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == [task.id for task in tasks]
    assert first != second
    assert [same.training(n).id for n in reversed(range(9))] == first[::-1]
    assert len(source.held_out(4)) == 4
    assert source.held_out(99) == same.held_out(99)
    assert {task.id for task in source.held_out(99)} == {task.id for task in held}
    with pytest.raises(ConfigError, match="none of its 5 tasks is for train"):
        TaskFile("f", held)


@pytest.mark.parametrize("kind", [ToolsKind(), TerminalKind()])
def test_generated_tasks_are_valid_and_their_splits_differ(kind: Any) -> None:
    source = source_of("", "tools", kind)
    assert isinstance(source, Generated)
    training, held_out = [source.training(n) for n in range(20)], source.held_out(20)
    assert len({task.id for task in [*training, *held_out]}) == 40
    assert {task.split for task in training} == {Split.TRAIN}
    assert {task.split for task in held_out} == {Split.EVAL}
    for task in (*training, *held_out):
        kind.check_task(task.fields)


def test_a_number_is_so_many_generated_tasks_and_a_quarter_as_many_held_out_ones() -> None:
    found = tasks_of("10", "tools", ToolsKind())
    assert [task.split for task in found] == [Split.TRAIN] * 10 + [Split.EVAL] * 3
    source = source_of("", "tools", ToolsKind())
    assert found[:10] == [source.training(number) for number in range(10)]
    assert found[10:] == source.held_out(3)
    assert len({task.id for task in found}) == 13
    for wrong in ("0", "100001", "9" * 5000):
        with pytest.raises(ConfigError, match="expected 1 to 100000 generated tasks"):
            tasks_of(wrong, "tools", ToolsKind())
    with pytest.raises(ConfigError, match=r"--tasks 10: .* 'shown' generates no tasks: name a"):
        tasks_of("10", "shown", ShownKind())


def test_an_environment_without_tasks_of_its_own_needs_a_file() -> None:
    with pytest.raises(ConfigError, match="generates none: name a file with one task a line"):
        source_of("", "shown", ShownKind())
