"""Versions that are whole models: an engine each, blue and green, and what may fail in between."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from nextstate.app import engine_pool
from nextstate.app.engine_pool import EnginePool
from nextstate.app.supervisor import Child
from nextstate.engine.adapter_files import MODEL_FILE, folder_sha256, verify_adapter
from nextstate.engine.client import EngineClient, publish, publish_candidate, withdraw
from nextstate.engine.process import free_port
from nextstate.engine.whole import (
    PROBE_FILE,
    UP,
    WholeEngine,
    engine_of,
    read_engines,
    write_engine,
)
from nextstate.errors import AdapterError, ConflictError, EngineError
from nextstate.records import WHOLE_MODEL, PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.versions import base_version
from proxy.intervals import INTERVALS
from proxy.replica import Replica
from proxy.whole_engines import Router, WholeEngines
from tests.proxy.running_proxy import Running, request, running, until
from tests.scripted_engine import MODEL, scripted_engine

SERVER = (sys.executable, "-m", "tests.engine.whole_server")


def add_version(
    store: Store,
    parent: Path,
    number: int,
    state: VersionState = VersionState.CANDIDATE,
    model: Path | None = None,
) -> PolicyVersion:
    """A version to probe, with a `model`'s files or with a file instead of weights."""
    folder = parent / f"v{number}"
    if model is None:
        folder.mkdir()
        (folder / MODEL_FILE).write_bytes(folder.name.encode())
    else:
        shutil.copytree(model, folder)
    probe = {"prompt": [3, number], "tokens": [5, 6], "logprobs": [-0.5 - number, -2.0]}
    (folder / PROBE_FILE).write_text(json.dumps({"probes": [probe]}))
    sha256 = folder_sha256(folder)
    version = PolicyVersion(
        "main", number, number - 1, str(folder), sha256, 16, state, {WHOLE_MODEL: 1.0}
    )
    store.versions.add(version, None)
    return version


@dataclass
class World:
    """A store, a proxy before the base's engine, and a pool of engines for versions."""

    store: Store
    folder: Path
    proxy: Running
    no_room: str | None = None
    pool: EnginePool = field(init=False)

    @property
    def engines(self) -> list[EngineClient]:
        return [*self.proxy.proxy.engines]

    def version(self, number: int, **files: str) -> PolicyVersion:
        """A candidate with a file instead of weights; `files` say how its engine fails."""
        version = add_version(self.store, self.folder, number)
        for name, text in files.items():
            (self.folder / f"v{number}" / f".{name}").write_text(text)
        return version

    def make(self, engine: WholeEngine) -> tuple[Child, str]:
        port = free_port()
        argv = [*SERVER, str(port), engine.name, engine.path]
        name = f"engine-v{engine.number:06d}"
        log = self.folder / f"{name}.log"
        return Child(name, argv, log, cwd=Path.cwd()), f"http://127.0.0.1:{port}"

    async def publish(self, version: PolicyVersion) -> None:
        await asyncio.wait_for(publish(self.store, self.engines, version), 60)

    async def asked(self, text: str = "hi") -> int:
        """The version that answers a request."""
        status, data, headers = await self.proxy.chat(request(text))
        assert status == 200, data
        return int(headers["x-nextstate-version"])

    async def serves(self, number: int) -> None:
        """Returns once new requests get the version."""
        versions = self.proxy.proxy.versions
        async with asyncio.timeout(30):
            while not (versions.serving["main"].number == number and versions.up):
                await asyncio.sleep(0.01)

    def pid(self, number: int) -> int:
        (child,) = [c for c in self.pool.children if c.name == f"engine-v{number:06d}"]
        assert child.process is not None
        return child.process.pid


@asynccontextmanager
async def world(store: Store, folder: Path) -> AsyncGenerator[World]:
    async with scripted_engine() as engine, running(engine.url, store, folder) as proxy:
        await asyncio.wait_for(proxy.proxy.versions.wait_up(), 60)
        made = World(store, folder, proxy)
        base = EngineClient(engine.url, MODEL, "engine-key")
        made.pool = EnginePool(
            store, base, made.make, lambda: made.no_room, exact=True, poll_s=0.05
        )
        stopping = asyncio.Event()
        task = asyncio.create_task(made.pool.run(stopping))
        try:
            yield made
        finally:
            stopping.set()
            await task
            await base.close()


def within(test: Callable[[World], Awaitable[None]], store: Store, folder: Path) -> None:
    async def run() -> None:
        async with world(store, folder) as made:
            await test(made)

    asyncio.run(run())


def test_new_requests_flip_and_the_old_engine_ends_its_streams_before_it_makes_room(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        assert await w.asked() == 0
        first = w.version(1)
        await w.publish(first)
        await w.serves(1)
        waits = Path(first.path or "") / ".waits"
        waits.touch()
        await asyncio.sleep(0.1)
        old = [asyncio.create_task(w.proxy.chat(request(f"{n}", stream=True))) for n in range(4)]
        await until(lambda: w.proxy.proxy.versions.running[first.adapter_name or ""] == 4)
        await w.publish(w.version(2))
        await w.serves(2)
        assert await w.asked("new") == 2
        assert (await w.asked(), [task.done() for task in old]) == (2, [False] * 4)
        w.no_room = "no room for a third"
        third = asyncio.create_task(w.publish(w.version(3)))
        await asyncio.sleep(0.5)
        assert not third.done()  # the first version's streams still run on its engine
        w.pid(1)
        w.no_room = None
        waits.unlink()
        answers = await asyncio.gather(*old)
        assert {status for status, _, _ in answers} == {200}
        assert all(data.endswith(b"data: [DONE]\n\n") for _, data, _ in answers)
        assert {headers["x-nextstate-version"] for _, _, headers in answers} == {"1"}
        await third
        await w.serves(3)
        assert await w.asked() == 3
        turns = [store.turns.get(turn) for turn in store.turns.ids()]
        assert [turn.policy_version for turn in turns if turn] == [0, 2, 2, 1, 1, 1, 1, 3]

    within(test, store, tmp_path)


def test_a_return_is_at_once_while_the_engine_lives_and_starts_it_otherwise(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        first, second = w.version(1), w.version(2)
        await w.publish(first)
        await w.publish(second)
        await w.serves(2)
        pid = w.pid(1)
        await w.publish(first)
        await w.serves(1)
        assert (await w.asked(), w.pid(1)) == (1, pid)
        await w.publish(w.version(3))  # ends the second one's engine
        await w.serves(3)
        assert sorted(child.name for child in w.pool.children) == [
            "engine-v000001",
            "engine-v000003",
        ]
        await w.publish(second)
        await w.serves(2)
        assert await w.asked() == 2
        await w.publish(base_version("main", VersionState.RETIRED))
        await w.serves(0)
        assert await w.asked() == 0

    within(test, store, tmp_path)


def test_the_version_before_keeps_its_engine_until_the_serving_one_has_its_own(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        first, second = w.version(1), w.version(2)
        await w.publish(first)
        await w.publish(second)
        await w.serves(2)
        pid = w.pid(2)
        os.kill(w.pid(1), signal.SIGKILL)  # just before a person returns to it
        store.versions.set_serving("main", 1)
        await w.serves(1)
        assert (await w.asked(), w.pid(2)) == (1, pid)

    within(test, store, tmp_path)


def test_a_return_while_the_next_weights_are_read_keeps_the_engine_it_returns_to(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_slowly(path: Path, sha256: str) -> None:
        if path.name == "v3":
            store.versions.set_serving("main", 1)
        verify_adapter(path, sha256)

    async def test(w: World) -> None:
        await w.publish(w.version(1))
        await w.publish(w.version(2))
        await w.serves(2)
        pid = w.pid(1)
        monkeypatch.setattr(engine_pool, "verify_adapter", read_slowly)
        third = asyncio.create_task(w.publish(w.version(3)))
        await until(lambda: any(one.name.endswith("3") for one in w.pool.children))
        await w.serves(1)
        assert (await w.asked(), w.pid(1)) == (1, pid)
        with pytest.raises(ConflictError):  # the return came later
            await third

    within(test, store, tmp_path)


def test_an_engine_that_ends_in_the_switch_changes_nothing_and_a_later_try_serves(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        version = w.version(1, dies="")
        with pytest.raises(EngineError, match=r"weights cannot be read; the whole log is"):
            await publish_candidate(store, w.engines, version)
        assert store.versions.serving("main").number == 0
        assert (await w.asked(), read_engines(store.dir)) == (0, {})
        (Path(version.path or "") / ".dies").unlink()
        await publish_candidate(store, w.engines, version)
        await w.serves(1)
        assert await w.asked() == 1

    within(test, store, tmp_path)


def test_an_engine_that_is_killed_after_the_flip_starts_again_and_requests_wait(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        await w.publish(w.version(1))
        await w.serves(1)
        before = w.pid(1)
        os.kill(before, signal.SIGKILL)
        assert await asyncio.gather(*(w.asked(f"{n}") for n in range(4))) == [1] * 4
        assert w.pid(1) != before

    within(test, store, tmp_path)


def test_requests_for_a_version_whose_engine_died_after_the_flip_get_the_new_one(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        first = w.version(1)
        await w.publish(first)
        await w.serves(1)
        versions = w.proxy.proxy.versions
        with versions.hold("main") as held:
            await w.publish(w.version(2))
            await w.serves(2)
            os.kill(w.pid(1), signal.SIGKILL)
            await until(lambda: not held.replica.up)
            versions.place_again(held)
            assert held.version is not None
            assert (held.version.number, held.replica.name) == (2, "engine-v000002")

    within(test, store, tmp_path)


def test_weights_that_the_engine_reads_otherwise_or_that_have_changed_never_serve(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        with pytest.raises(AdapterError, match=r"version 1 otherwise .* up to 0\.01 nats, over"):
            await publish_candidate(store, w.engines, w.version(1, differs=""))
        changed = w.version(2)
        (Path(changed.path or "") / MODEL_FILE).write_bytes(b"other")
        with pytest.raises(AdapterError, match="has changed on disk"):
            await publish_candidate(store, w.engines, changed)
        assert store.versions.serving("main").number == 0
        assert await w.asked() == 0
        assert [child.name for child in w.pool.children] == ["engine-v000001"]

    within(test, store, tmp_path)


def test_without_room_the_version_waits_and_what_serves_goes_on(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        w.no_room = "a further engine needs 2.00 GB of RAM, and 1.00 GB are free: make room"
        version = w.version(1)
        with pytest.raises(EngineError, match="the engine of version 1: a further engine needs"):
            await publish_candidate(store, w.engines, version)
        assert (await w.asked(), w.pool.children) == (0, [])
        w.no_room = None
        await publish_candidate(store, w.engines, version)
        await w.serves(1)

    within(test, store, tmp_path)


def test_a_serving_version_whose_file_changes_gives_way_to_its_intact_ancestor(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        await w.publish(w.version(1))
        second = w.version(2)
        await w.publish(second)
        await w.serves(2)
        (Path(second.path or "") / MODEL_FILE).write_bytes(b"other")
        os.kill(w.pid(2), signal.SIGKILL)
        await w.serves(1)
        assert await w.asked() == 1
        assert store.versions.get("main", 2).state is VersionState.REJECTED

    within(test, store, tmp_path)


def test_a_version_that_is_withdrawn_gives_way_to_its_parent(store: Store, tmp_path: Path) -> None:
    async def test(w: World) -> None:
        await w.publish(w.version(1))
        second = w.version(2)
        await w.publish(second)
        await w.serves(2)
        assert (await withdraw(store, w.engines, second)).number == 1
        await w.serves(1)
        assert await w.asked() == 1

    within(test, store, tmp_path)


def test_a_restart_of_the_proxy_finds_the_version_and_its_engine(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        await w.publish(w.version(1))
        await w.serves(1)
        url = w.engines[0].url
        async with running(url, store, tmp_path) as again:
            status, _, headers = await again.chat(request("after"))
            assert (status, headers["x-nextstate-version"]) == (200, "1")

    within(test, store, tmp_path)


def test_an_engine_that_a_killed_pool_has_left_is_started_again_when_it_is_asked_for(
    store: Store, tmp_path: Path
) -> None:
    async def test(w: World) -> None:
        version = w.version(1)
        left = replace(engine_of(version), state=UP, url=f"http://127.0.0.1:{free_port()}")
        write_engine(store.dir, left)
        await w.publish(version)
        await w.serves(1)
        assert await w.asked() == 1

    within(test, store, tmp_path)


def test_a_proxy_follows_no_engine_that_is_not_on_the_machine_of_its_base(
    store: Store, tmp_path: Path
) -> None:
    versions = [add_version(store, tmp_path, number) for number in (1, 2)]
    for version, host in zip(versions, ("10.0.0.1", "10.0.0.2"), strict=True):
        write_engine(store.dir, replace(engine_of(version), state=UP, url=f"http://{host}:1"))
    followed = list[str]()

    class Added:
        def add(self, replica: Replica) -> None:
            followed.append(replica.client.url)

        def remove(self, replica: Replica) -> None: ...

        def changed(self, replica: Replica) -> None: ...

    async def run() -> None:
        base = EngineClient("http://10.0.0.2:9", MODEL)
        engines = WholeEngines(store.dir, base, {}, INTERVALS, cast(Router, Added()))
        async with asyncio.TaskGroup() as tasks:
            engines.start(tasks)
            await engines.follow(versions)
            await engines.close()
        await base.close()

    asyncio.run(run())
    assert followed == ["http://10.0.0.2:1"]


def test_an_engine_for_adapters_refuses_a_whole_model(store: Store, tmp_path: Path) -> None:
    from nextstate.engine.client import ensure_loaded

    async def test(w: World) -> None:
        with pytest.raises(EngineError, match=r"is a whole model.*lora_rank = 0"):
            await ensure_loaded(w.engines[0], w.version(1))

    within(test, store, tmp_path)
