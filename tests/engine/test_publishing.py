"""What a person put into service stays: no publication, at any moment, undoes their choice."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.engine.client import EngineClient, publish, publish_candidate, withdraw
from nextstate.errors import AdapterError, ConflictError
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store

_processes = multiprocessing.get_context("spawn")
CANDIDATE, SERVING, RETIRED = (
    VersionState.CANDIDATE, VersionState.SERVING, VersionState.RETIRED,
)  # fmt: skip


def candidate(number: int, parent: int) -> PolicyVersion:
    return PolicyVersion("main", number, parent, f"/a/{number}", "ff", 1, CANDIDATE)


def states(store: Store) -> list[tuple[int, str]]:
    return [(v.number, v.state.value) for v in store.versions.all("main")]


class Engine:
    """An engine that knows every adapter and calls `during` in each probe."""

    def __init__(self, during: Callable[[str], None] = lambda _: None) -> None:
        self.unloaded: list[str] = []
        self.probed: list[str] = []
        self._during = during

    async def holds(self, name: str, path: str) -> bool:
        return True

    async def probe(self, name: str) -> None:
        self.probed.append(name)
        self._during(name)

    async def unload_adapter(self, name: str) -> None:
        self.unloaded.append(name)

    @property
    def client(self) -> EngineClient:
        return cast(EngineClient, self)


@pytest.fixture
def chain(store: Store) -> Store:
    """Versions 1 and 2, of which 2 serves, and 3, made from 2, waits to be published."""
    for number in (1, 2):
        store.versions.add(candidate(number, number - 1), None)
        assert store.versions.serve_candidate(candidate(number, number - 1))
    store.versions.add(candidate(3, 2), None)
    return store


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_candidate_made_before_a_person_chose_never_serves_by_itself(
    chain: Store, chosen: int
) -> None:
    chain.versions.set_serving("main", chosen)
    engine = Engine()
    asyncio.run(publish_candidate(chain, [engine.client], candidate(3, 2)))
    assert chain.versions.serving("main").number == chosen
    assert chain.versions.overtaken(candidate(3, 2))
    third = chain.versions.all("main")[-1]
    assert third.state is RETIRED
    assert f"version {chosen} was put into service" in (third.reason or "")
    asyncio.run(publish(chain, [engine.client], third))  # unless they choose it themselves
    assert chain.versions.serving("main").number == 3


def test_a_rollback_while_the_candidate_is_loaded_stays_and_its_adapter_is_unloaded(
    chain: Store,
) -> None:
    engine = Engine(lambda _: chain.versions.set_serving("main", 1))
    third = candidate(3, 2)
    assert not chain.versions.overtaken(third)
    asyncio.run(publish_candidate(chain, [engine.client], third))
    assert states(chain) == [(1, "serving"), (2, "retired"), (3, "retired")]
    assert engine.unloaded == [third.adapter_name]


def test_a_candidate_of_a_version_that_was_withdrawn_meanwhile_never_serves(chain: Store) -> None:
    second = chain.versions.get("main", 2)
    assert second is not None
    asyncio.run(withdraw(chain, [Engine().client], second))
    assert chain.versions.overtaken(candidate(3, 2))
    asyncio.run(publish_candidate(chain, [Engine().client], candidate(3, 2)))
    assert states(chain) == [(1, "serving"), (2, "rejected"), (3, "retired")]


def test_a_candidate_that_a_person_puts_into_service_counts_as_published(chain: Store) -> None:
    chain.versions.set_serving("main", 3)
    for _ in range(2):
        assert not chain.versions.overtaken(candidate(3, 2))
        asyncio.run(publish_candidate(chain, [Engine().client], candidate(3, 2)))
    assert chain.versions.serving("main").number == 3


def test_a_version_is_withdrawn_for_an_ancestor_whose_adapter_is_kept(chain: Store) -> None:
    second = chain.versions.get("main", 2)
    assert second is not None
    assert chain.versions.forget_adapter("main", 1)
    asyncio.run(withdraw(chain, [Engine().client], second))
    assert chain.versions.serving("main").number == 0


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_version_that_a_person_chooses_while_it_is_withdrawn_stays(
    chain: Store, chosen: int
) -> None:
    second = chain.versions.get("main", 2)
    assert second is not None
    engine = Engine(lambda _: chain.versions.set_serving("main", chosen) and None)
    asyncio.run(withdraw(chain, [engine.client], second))
    assert chain.versions.serving("main").number == chosen


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_version_that_was_found_bad_before_a_person_chose_is_not_withdrawn(
    chain: Store, chosen: int
) -> None:
    second, found = chain.versions.get("main", 2), chain.versions.decisions("main")
    assert second is not None
    chain.versions.set_serving("main", chosen)
    asyncio.run(withdraw(chain, [Engine().client], second, found))
    assert chain.versions.serving("main").number == chosen


def test_of_two_persons_choices_the_one_that_was_made_last_serves(chain: Store) -> None:
    """Not the one whose adapter took longer to load."""
    first, base = chain.versions.get("main", 1), chain.versions.get("main", 0)
    assert first is not None
    assert base is not None

    def choose() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, publish(chain, [Engine().client], base)).result()

    engine = Engine(lambda _: choose())
    with pytest.raises(ConflictError, match="version 0 of main was put into service while version"):
        asyncio.run(publish(chain, [engine.client], first))
    assert chain.versions.serving("main").number == 0
    assert chain.versions.decisions("main").choices == 1


def test_a_choice_whose_answer_was_lost_is_found_and_not_made_twice(chain: Store) -> None:
    for _ in range(2):
        assert chain.versions.set_serving("main", 1, "ana", 0)
    assert chain.versions.serving("main").number == 1
    assert chain.versions.decisions("main").choices == 1


def test_an_adapter_that_is_deleted_while_a_person_loads_it_does_not_serve(chain: Store) -> None:
    first = chain.versions.get("main", 1)
    assert first is not None
    engine = Engine(lambda _: chain.versions.forget_adapter("main", 1))
    with pytest.raises(AdapterError, match="version 1 was deleted meanwhile"):
        asyncio.run(publish(chain, [engine.client], first))
    assert chain.versions.serving("main").number == 2
    gone = chain.versions.get("main", 1)
    assert gone is not None
    with pytest.raises(AdapterError, match="version 1 was deleted to make room"):
        asyncio.run(publish(chain, [engine.client], gone))


def test_a_serving_version_is_not_rejected(chain: Store) -> None:
    """Otherwise no version would serve, and the base model would answer."""
    chain.versions.set_serving("main", 1)
    assert not chain.versions.reject("main", 1, "seen as retired before")
    assert chain.versions.serving("main").number == 1
    assert chain.versions.reject("main", 3, "no use")


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["person", "made", "publish", "withdraw", "reject"]), max_size=12),
       st.randoms(use_true_random=False))  # fmt: skip
def test_in_any_order_one_version_serves_and_training_replaces_only_a_parent(
    tmp_path_factory: pytest.TempPathFactory, acts: list[str], random: Random
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path_factory.mktemp("s"))))
    made: list[PolicyVersion] = []
    chosen: int | None = None
    for act in acts:
        before = store.versions.serving("main").number
        if act == "made":
            parent = random.choice([0, before, *(v.number for v in made)])
            made.append(candidate(len(made) + 1, parent))
            store.versions.add(made[-1], None)
        elif act == "person":
            chosen = random.choice([0, *(v.number for v in made)])
            store.versions.set_serving("main", chosen)
            assert store.versions.serving("main").number == chosen
        elif made:
            version = random.choice(made)
            if act == "publish":
                served = store.versions.serve_candidate(version)
                assert served == (store.versions.serving("main").number == version.number)
                assert before in (version.number, version.parent) or not served
            elif act == "withdraw":
                store.versions.replace_serving(version, 0)
                assert store.versions.serving("main").number == (
                    0 if before == version.number else before
                )
            else:
                store.versions.reject("main", version.number, "why")
                assert store.versions.serving("main").number == before
        assert sum(state == "serving" for _, state in states(store)) <= 1
    store.close()


_AUDIT = """
CREATE TABLE flips (seq INTEGER PRIMARY KEY, number INTEGER);
CREATE TRIGGER flipped AFTER UPDATE OF state ON versions WHEN new.state = 'serving'
BEGIN INSERT INTO flips (number) VALUES (new.number); END;
"""
_MADE_BEFORE = 4


def choose(folder: str, seed: int, times: int) -> None:
    """A person who switches between the first versions."""
    store, random = Store(StoreConfig(dir=folder)), Random(seed)
    for _ in range(times):
        store.versions.set_serving("main", random.randint(1, _MADE_BEFORE))
    store.close()


def learn(folder: str, times: int) -> None:
    """A learner without training: it publishes children of the serving version."""
    store = Store(StoreConfig(dir=folder))
    for number in range(_MADE_BEFORE + 1, _MADE_BEFORE + 1 + times):
        version = candidate(number, store.versions.serving("main").number)
        store.versions.add(version, None)
        asyncio.run(publish_candidate(store, [Engine().client], version))
    store.close()


def test_processes_that_race_never_replace_what_a_person_chose(tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    store = Store(StoreConfig(dir=folder))
    for number in range(1, _MADE_BEFORE + 1):
        store.versions.add(candidate(number, number - 1), None)
    with closing(sqlite3.connect(tmp_path / "state/nextstate.sqlite3")) as file:
        file.executescript(_AUDIT)
    store.versions.set_serving("main", 1)
    racing = [_processes.Process(target=choose, args=(folder, seed, 30)) for seed in (1, 2)]
    racing.append(_processes.Process(target=learn, args=(folder, 30)))
    for process in racing:
        process.start()
    for process in racing:
        process.join()
        assert process.exitcode == 0
    with closing(sqlite3.connect(tmp_path / "state/nextstate.sqlite3")) as file:
        flips = [row[0] for row in file.execute("SELECT number FROM flips ORDER BY seq")]
    parents = {v.number: v.parent for v in store.versions.all("main")}
    learned = [(old, new) for old, new in pairwise(flips) if new > _MADE_BEFORE]
    assert [old for old, _ in learned] == [parents[new] for _, new in learned]
    assert len(flips) >= 60
    left = [v for v in store.versions.all("main") if v.number > _MADE_BEFORE]
    assert {v.state for v in left} <= {SERVING, RETIRED}
    store.close()
