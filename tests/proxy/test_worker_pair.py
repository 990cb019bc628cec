"""Two workers in one process with a store each: which adapters stay loaded, and what is counted."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextstate.config import StoreConfig
from nextstate.engine.client import publish
from nextstate.episodes import Episode
from nextstate.errors import StoreError
from nextstate.store import Store
from nextstate.store.episodes import Hold
from nextstate.store.workers import name_of
from proxy.answers import Refused
from proxy.intervals import Intervals
from proxy.spending import Budgets
from tests.proxy.environment import Environment, call, user
from tests.proxy.running_proxy import Running, add_version, request, running, until
from tests.proxy.test_workers import metrics
from tests.scripted_engine import MODEL, Script, ScriptedEngine, adapter, scripted_engine
from tests.store.rows import held_tokens


class Clocked(Store):
    """A worker's store, with a clock that the test sets."""

    def __init__(self, folder: Path) -> None:
        self.now = 1_000_000.0
        self.looked = 0
        """How often `others` was called."""
        super().__init__(StoreConfig(dir=str(folder / "state")), lambda: self.now)
        others = self.workers.others

        def looked(*asked: str) -> list[tuple[list[str], dict[str, int]]]:
            self.looked += 1
            return others(*asked)

        self.workers.others = looked


class Pair:
    """Two workers of one proxy, each with its own connection to the store."""

    def __init__(
        self, engine: ScriptedEngine, workers: tuple[Running, Running], stores: tuple[Clocked, ...]
    ) -> None:
        self.engine, self.workers, self.stores = engine, workers, stores

    async def serve(self, tmp_path: Path, number: int) -> None:
        """Publishes a version; returns when both workers serve it."""
        client = self.workers[0].proxy.engines
        await publish(self.stores[0], client, add_version(self.stores[0], tmp_path, number))
        for worker in self.workers:
            serving = worker.proxy.versions.serving
            await until(lambda serving=serving: serving["main"].number == number)

    async def told(self, worker: int, *adapters: str) -> None:
        """Returns when the store says that a worker uses exactly these adapters."""
        store = self.stores[0]
        await until(
            lambda: adapters in (tuple(a) for a, _ in store.workers.others(str(1 - worker)))
        )

    async def looks(self, worker: int, times: int = 3) -> None:
        """Returns when a worker has called `others` this many times more."""
        store = self.stores[worker]
        wanted = store.looked + times
        await until(lambda: store.looked >= wanted)

    async def hold(self, worker: int) -> asyncio.Task[tuple[int, bytes, dict[str, str]]]:
        """Starts a stream at a worker; it runs until the script's gate opens."""
        before = len(self.engine.requests)
        self.engine.script.gate = asyncio.Event()
        held = asyncio.create_task(self.workers[worker].chat(request(stream=True)))
        await until(lambda: len(self.engine.requests) > before)
        return held


def paired(tmp_path: Path, test: Callable[[Pair], Any]) -> None:
    async def run() -> None:
        stores = Clocked(tmp_path), Clocked(tmp_path)
        async with (
            scripted_engine() as engine,
            running(engine.url, stores[0], tmp_path, worker="0", record_timeout_s=10.0) as first,
            running(engine.url, stores[1], tmp_path, worker="1", record_timeout_s=10.0) as second,
        ):
            for worker in (first, second):
                await asyncio.wait_for(worker.proxy.versions.wait_up(), 60)
            await test(Pair(engine, (first, second), stores))
        for store in stores:
            store.close()

    asyncio.run(run())


OLD, NEW = (adapter("main", number, f"v{number}") for number in (1, 2))


@pytest.mark.parametrize("holder", [0, 1])
def test_an_adapter_stays_loaded_while_another_worker_uses_it(tmp_path: Path, holder: int) -> None:
    async def test(pair: Pair) -> None:
        await pair.serve(tmp_path, 1)
        await pair.told(holder, OLD)
        held = await pair.hold(holder)
        await pair.serve(tmp_path, 2)
        await pair.told(holder, OLD, NEW)
        await pair.looks(1 - holder)
        assert pair.engine.unloaded == []
        assert pair.engine.script.gate is not None
        pair.engine.script.gate.set()
        status, _, headers = await held
        assert (status, headers["x-nextstate-version"]) == (200, "1")
        await until(lambda: pair.engine.unloaded == [OLD])
        assert set(pair.engine.adapters) == {NEW}

    paired(tmp_path, test)


def test_calls_at_two_workers_share_what_is_left_of_an_episodes_tokens(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        engine, (first, second) = pair.engine, pair.workers
        await until(lambda: len(pair.stores[0].workers.others("")) == 2)  # each has told
        gate = asyncio.Event()
        engine.queue += [Script(body_gate=gate), Script(body_gate=gate)]
        await Environment(first).open("e-1", max_tokens=10)
        urls = [f"{worker.url}/episodes/e-1/v1" for worker in (first, second)]
        calls = [asyncio.create_task(call(first, urls[0], user("go"), max_tokens=4))]
        await until(lambda: len(engine.requests) == 1)
        calls += [asyncio.create_task(call(second, urls[1], user("go"), max_tokens=9))]
        await until(lambda: len(engine.requests) == 2)
        assert [one["max_tokens"] for one in engine.requests] == [4, 6]
        calls += [asyncio.create_task(call(first, urls[0], user("go")))]  # waits for them
        gate.set()
        await asyncio.gather(*calls)
        assert engine.requests[2]["max_tokens"] <= 10 - 2 - 2
        await until(lambda: not held_tokens(pair.stores[0], "e-1"))

    paired(tmp_path, test)


@pytest.mark.parametrize("waits_s", [None, 0.01])
def test_a_call_that_is_given_up_while_it_begins_holds_nothing_afterwards(
    tmp_path: Path, waits_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client leaves, or its time is over, while a thread still waits for the store."""

    async def test(pair: Pair) -> None:
        calls, episodes = pair.workers[0].proxy.calls, pair.stores[0].episodes
        await Environment(pair.workers[0]).open("e-1", max_tokens=10)
        episode = await calls.find("e-1")
        assert episode is not None
        entered, gate, stored = (threading.Event() for _ in range(3))
        begin = episodes.begin_call

        def late(*asked: Any) -> Any:
            entered.set()
            gate.wait(10)
            try:
                return begin(*asked)
            finally:
                stored.set()

        monkeypatch.setattr(episodes, "begin_call", late)
        if waits_s is not None:
            monkeypatch.setattr(calls, "_budgets", Budgets(waits_s, alone=False))
        path = "/v1/chat/completions"
        begun = asyncio.create_task(calls.begin(episode, "main", path, {"messages": []}))
        await until(entered.is_set)
        if waits_s is None:
            begun.cancel()
        with pytest.raises((asyncio.CancelledError, Refused)):
            await begun
        gate.set()
        await until(stored.is_set)
        await until(lambda: not held_tokens(pair.stores[0], "e-1"))

    paired(tmp_path, test)


def test_what_could_not_be_freed_is_freed_with_a_later_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(pair: Pair) -> None:
        worker, episodes = pair.workers[0], pair.stores[0].episodes
        await Environment(worker).open("e-1", max_tokens=10)
        tried = 0
        with monkeypatch.context() as patch:

            def locked(*_: object) -> None:
                nonlocal tried
                tried += 1
                raise StoreError("the database is locked")

            patch.setattr(episodes, "free", locked)
            await call(worker, f"{worker.url}/episodes/e-1/v1", user("go"), max_tokens=4)
            await until(lambda: tried > 1)
            assert held_tokens(pair.stores[0], "e-1") == 4
        await until(lambda: not held_tokens(pair.stores[0], "e-1"))

    paired(tmp_path, test)


def test_what_a_worker_held_counts_no_longer_once_it_is_silent_or_has_ended(
    tmp_path: Path,
) -> None:
    store = Clocked(tmp_path)
    episodes, workers = store.episodes, store.workers
    episodes.open([Episode("e-1", "main", "shell", "go", max_tokens=10)], None)
    for name in ("0", "1"):
        workers.beat(name, [], {})
    assert episodes.begin_call("e-1", hold=Hold("c-0", "0", 7)) == (10, None)
    assert episodes.begin_call("e-1", hold=Hold("c-1", "1", None)) == (3, None)
    assert episodes.begin_call("e-1", hold=Hold("c-2", "2", 1)) is None
    episodes.free(["c-1"])
    assert episodes.begin_call("e-1", hold=Hold("c-3", "1", 0)) == (3, None)
    store.now += 60  # nobody could say anything
    assert episodes.begin_call("e-1", hold=Hold("c-4", "1", 0)) == (3, None)
    workers.beat("1", [], {})
    assert episodes.begin_call("e-1", hold=Hold("c-5", "1", 0)) == (10, None)
    workers.beat("0", [], {})
    assert episodes.begin_call("e-1", hold=Hold("c-6", "1", 0)) == (3, None)
    workers.leave("0")
    assert episodes.begin_call("e-1", hold=Hold("c-7", "1", 0)) == (10, None)
    assert held_tokens(store, "e-1") == 0
    store.close()


def test_the_old_version_stays_loaded_until_every_worker_serves_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(pair: Pair) -> None:
        await pair.serve(tmp_path, 1)
        await pair.told(1, OLD)
        with monkeypatch.context() as patch:
            old = pair.stores[1].versions.serving_of(["main"])
            patch.setattr(pair.stores[1].versions, "serving_of", lambda names: old)
            client = pair.workers[0].proxy.engines
            await publish(pair.stores[0], client, add_version(pair.stores[0], tmp_path, 2))
            await until(lambda: pair.workers[0].proxy.versions.serving["main"].number == 2)
            await pair.looks(0)
            assert pair.engine.unloaded == []
        await until(lambda: pair.engine.unloaded == [OLD])

    paired(tmp_path, test)


def test_the_adapter_of_a_silent_worker_is_unloaded(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        await pair.serve(tmp_path, 1)
        await pair.told(1, OLD)
        held = await pair.hold(1)
        await pair.serve(tmp_path, 2)
        await pair.told(1, OLD, NEW)
        pair.stores[0].now += 9.9  # the other's clock stands still: it says nothing new
        await pair.looks(0)
        assert pair.engine.unloaded == []
        pair.stores[0].now += 0.2
        await until(lambda: pair.engine.unloaded == [OLD])
        assert pair.engine.script.gate is not None
        pair.engine.script.gate.set()
        assert (await held)[0] == 200

    paired(tmp_path, test)


def test_a_worker_says_at_once_that_it_is_there_and_when_it_leaves(tmp_path: Path) -> None:
    rare = Intervals(beat_s=3600.0)

    async def test(pair: Pair) -> None:
        await pair.told(0, MODEL)
        async with running(pair.engine.url, pair.stores[1], tmp_path, worker="2", intervals=rare):
            await until(lambda: len(pair.stores[1].workers.others("1")) == 2)
        assert len(pair.stores[1].workers.others("1")) == 1

    paired(tmp_path, test)


def test_metrics_add_up_all_workers(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        for worker, times in ((0, 2), (1, 3)):
            for _ in range(times):
                assert (await pair.workers[worker].chat(request()))[0] == 200
        held = await pair.hold(1)

        def heard(worker: int, requests: int) -> bool:
            counts = [counts for _, counts in pair.stores[0].workers.others(str(1 - worker))]
            return [c["nextstate_requests_total"] for c in counts] == [requests]

        await until(lambda: heard(0, 2) and heard(1, 4))
        for worker in pair.workers:
            text = await metrics(worker.http, worker.url)
            for line in (
                "nextstate_requests_total 6",
                "nextstate_turns_recorded_total 5",
                "nextstate_turns_lost_total 0",
                f'nextstate_requests_running{{engine="{pair.workers[0].proxy.engines[0].name}"}} 1',
                f'nextstate_engine_up{{engine="{pair.workers[0].proxy.engines[0].name}"}} 1',
                'nextstate_stored{record="turns",state="main"} 5',
            ):
                assert f"{line}\n" in text
        pair.stores[0].now += 10.1  # the other is silent: what it counted is no longer told
        text = await metrics(pair.workers[0].http, pair.workers[0].url)
        assert "nextstate_requests_total 2\n" in text
        assert pair.engine.script.gate is not None
        pair.engine.script.gate.set()
        await held

    paired(tmp_path, test)


def test_metrics_leave_out_another_machines_proxy_whose_adapters_stay_loaded(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> None:
        async with (
            scripted_engine() as engine,
            running(engine.url, store, tmp_path, worker="7@one:8000") as first,
            running(engine.url, store, tmp_path, worker="7@two:8000") as second,
        ):
            assert (await first.chat(request()))[0] == 200
            assert (await second.chat(request()))[0] == 200
            await until(lambda: len(store.workers.others("7@one:8000")) == 1)
            assert store.workers.others("7@one:8000", "@one:8000") == []
            assert "nextstate_requests_total 1\n" in await metrics(first.http, first.url)

    asyncio.run(test())


def test_proxies_of_a_store_on_a_server_know_each_other() -> None:
    assert name_of(None, StoreConfig(), 8080) is None
    assert name_of(1, StoreConfig(), 8080) == "1"
    shared = StoreConfig(url="postgresql://there/nextstate")
    name = f"{os.getpid()}@{socket.gethostname()}:8080"
    assert name_of(None, shared, 8080) == name_of(1, shared, 8080) == name
