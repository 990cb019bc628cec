"""A vLLM without a GPU and the learner get cores of their own."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.app import cores
from nextstate.app.cores import BINDING, Cores, divide, physical_cores, shared_cores
from nextstate.app.doctor import checks
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.app.supervisor import Child, end, start


def single(count: int) -> list[frozenset[int]]:
    """Cores without hyper-threads."""
    return [frozenset({number}) for number in range(count)]


def siblings(topology: Path, lists: dict[int, str]) -> Path:
    """A machine whose kernel names these siblings of each logical CPU."""
    for cpu, text in lists.items():
        (topology / f"cpu{cpu}/topology").mkdir(parents=True)
        (topology / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{text}\n")
    return topology


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A managed vLLM for CPUs on a machine with four cores."""
    monkeypatch.setattr(cores, "on_cpu", lambda: True)
    monkeypatch.setattr(cores, "physical_cores", lambda allowed: single(4))
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path / "state"}"\n')
    return Settings.read(file)


@pytest.mark.parametrize(
    ("count", "threads", "engine", "learner"),
    [
        (2, 0, {0}, {1}),
        (3, 0, {0, 1}, {2}),
        (8, 0, {0, 1, 2, 3, 4, 5}, {6, 7}),
        (4, 3, {0}, {1, 2, 3}),
    ],
)
def test_the_learner_gets_its_threads_or_a_quarter_and_vllm_keeps_at_least_one_core(
    count: int, threads: int, engine: set[int], learner: set[int]
) -> None:
    assert divide(single(count), threads) == Cores(frozenset(engine), frozenset(learner))


@pytest.mark.parametrize(("count", "threads"), [(1, 0), (1, 1), (4, 4), (4, 9)])
def test_nothing_is_divided_if_no_core_would_be_left(count: int, threads: int) -> None:
    assert divide(single(count), threads) is None


@given(st.integers(2, 64), st.integers(0, 80))
def test_every_core_is_given_to_exactly_one_of_the_two(count: int, threads: int) -> None:
    found = divide(single(count), threads)
    if found is None:
        assert threads >= count
        return
    assert found.engine | found.learner == set(range(count))
    assert not found.engine & found.learner
    assert found.engine
    assert found.learner


def test_hyper_threads_of_one_core_stay_together(tmp_path: Path) -> None:
    lists = {0: "0,4", 1: "1,5", 2: "2-3", 3: "2-3", 4: "0,4", 5: "1,5"}
    found = physical_cores({0, 1, 2, 3, 4}, siblings(tmp_path, lists))
    assert found == [{0, 4}, {1}, {2, 3}], "CPU 5 is not ours"
    assert divide(found, 0) == Cores(frozenset({0, 1, 4}), frozenset({2, 3}))


def test_a_cpu_whose_siblings_are_not_known_is_a_core(tmp_path: Path) -> None:
    assert physical_cores({0, 1}, tmp_path) == [{0}, {1}]


def test_nothing_is_divided_where_either_computes_elsewhere_or_a_person_binds_the_threads(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, learner = settings.engine, settings.learner
    assert shared_cores(settings) == Cores(frozenset({0, 1, 2}), frozenset({3}))
    for other in (
        replace(settings, engine=replace(engine, env={BINDING: "0-1"})),
        replace(settings, engine=replace(engine, mode="external", url="http://127.0.0.1:1")),
        replace(settings, learner=replace(learner, device="cuda")),
    ):
        assert shared_cores(other) is None
    monkeypatch.setattr(cores, "on_cpu", lambda: False)
    assert shared_cores(settings) is None


def test_vllm_is_started_on_its_cores_and_doctor_says_which(settings: Settings) -> None:
    assert Stack(settings).children["engine"].cpus == {0, 1, 2}
    found = [check.found for check in checks(settings.file) if check.name == "cores"]
    assert found[0].startswith("vLLM on CPU 0, 1, 2, the learner on CPU 3 (the default;")


def test_several_engines_divide_the_cores_and_have_names_ports_and_logs_of_their_own(
    settings: Settings,
) -> None:
    engine = replace(settings.engine, replicas=2)
    stack = Stack(replace(settings, engine=engine))
    found = [child for name, child in stack.children.items() if name.startswith("engine")]
    assert [(child.name, child.cpus) for child in found] == [("engine-0", {0}), ("engine-1", {1})]
    assert [child.log_file.name for child in found] == ["engine-0.log", "engine-1.log"]
    ports = [child.argv[[*child.argv].index("--port") + 1] for child in found]
    assert stack.engine_urls == [f"http://127.0.0.1:{port}" for port in ports]
    assert len({*ports}) == 2
    assert list(stack.states())[:2] == ["engine-0", "engine-1"]
    assert stack.children["judge"].retry_with == ("engine-0", "engine-1")
    many = Stack(replace(settings, engine=replace(engine, replicas=4)))
    assert many.children["engine-3"].cpus == {0, 1, 2}  # too few to divide


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds processes to CPUs")
def test_a_child_and_what_it_starts_keep_to_its_cpus(tmp_path: Path) -> None:
    mine = min(os.sched_getaffinity(0))
    code = (
        "import os, subprocess, sys\n"
        "ask = 'import os; print(os.sched_getaffinity(0))'\n"
        "subprocess.run([sys.executable, '-c', ask], check=True)\n"
    )
    log = tmp_path / "log"

    async def run() -> None:
        argv = [sys.executable, "-c", code]
        child = Child("child", argv, log, cpus=frozenset({mine}))
        process = await start(child)
        await process.wait()
        await end(child)

    asyncio.run(run())
    assert log.read_text().strip() == str({mine})
