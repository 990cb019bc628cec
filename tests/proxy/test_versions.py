"""Which version answers: a flip, a lost adapter, a changed one, a withdrawn one."""

from __future__ import annotations

import asyncio
import errno
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from nextstate.app.engine_access import change_version
from nextstate.app.settings import Settings
from nextstate.engine import adapter_files
from nextstate.engine.adapter_files import WEIGHTS_FILE
from nextstate.engine.client import publish, withdraw
from nextstate.errors import AdapterError, EngineError
from nextstate.records import VersionState
from nextstate.store import Store
from proxy.intervals import Intervals
from proxy.versions import Versions
from tests.proxy.running_proxy import (
    V1,
    V2,
    Running,
    add_version,
    both,
    request,
    running,
    serve,
    until,
)
from tests.scripted_engine import (
    MODEL,
    Script,
    ScriptedEngine,
    scripted_engine,
)


def test_new_requests_take_the_new_version_and_the_old_unloads_when_drained(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await serve(store, p, tmp_path, 1)
        engine.script.gate = asyncio.Event()
        old = asyncio.create_task(p.chat(request("old", stream=True)))
        await until(lambda: bool(engine.requests))
        await serve(store, p, tmp_path, 2)
        assert set(engine.adapters) == {V1, V2}  # still one reply on it
        engine.queue = [Script()]
        _, _, new = await p.chat(request("new"))
        engine.script.gate.set()
        _, data, headers = await old
        assert b"main-v" not in data
        assert (headers["x-nextstate-version"], new["x-nextstate-version"]) == ("1", "2")
        await until(lambda: engine.unloaded == [V1])
        turns = [store.turns.get(i) for i in store.turns.ids()]
        assert {turn.policy_version for turn in turns if turn} == {1, 2}
        answer = await p.http.get(f"{p.url}/v1/models")
        assert [m["id"] for m in (await answer.json())["data"]] == [MODEL]

    both(test, store, tmp_path)


def test_an_adapter_that_the_engine_lost_comes_back_without_the_agent_noticing(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await serve(store, p, tmp_path, 1)
        engine.adapters.clear()  # as after a restart too quick for the health check
        status, _, headers = await p.chat(request())
        assert (status, headers["x-nextstate-version"]) == (200, "1")

    both(test, store, tmp_path)


def test_an_unload_that_failed_is_tried_again(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.unloads_to_fail = 2
        for number in (1, 2):
            await serve(store, p, tmp_path, number)
        await until(lambda: engine.unloaded == [V1])
        assert (engine.unloads_to_fail, list(engine.adapters)) == (0, [V2])
        await until(lambda: V1 not in p.proxy.versions.running)

    both(test, store, tmp_path, intervals=Intervals(unload_again_s=0.1))


def test_an_adapter_that_is_unloaded_already_is_not_unloaded_again(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await serve(store, p, tmp_path, 1)
        engine.adapters.clear()
        await serve(store, p, tmp_path, 2)
        await until(lambda: V1 not in p.proxy.versions.running)

    both(test, store, tmp_path)


def test_a_version_that_is_unloaded_while_it_comes_back_is_loaded_again(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.undone = 2
        await publish(store, p.proxy.engines, add_version(store, tmp_path, 1))
        assert (engine.loads, store.versions.serving("main").number) == (3, 1)
        engine.undone = 3
        with pytest.raises(EngineError, match="does not exist"):
            await publish(store, p.proxy.engines, add_version(store, tmp_path, 2))
        assert (engine.loads, store.versions.serving("main").number) == (6, 1)

    both(test, store, tmp_path)


def test_requests_that_bring_a_lost_adapter_back_at_the_same_time_all_succeed(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await serve(store, p, tmp_path, 1)
        engine.adapters.clear()
        engine.loading = asyncio.Event()
        asked = [asyncio.create_task(p.chat(request(str(n)))) for n in range(4)]
        await until(lambda: engine.loads == 1 + len(asked))
        engine.loading.set()
        assert [(await one)[0] for one in asked] == [200] * len(asked)

    both(test, store, tmp_path)


@pytest.mark.parametrize(
    ("noticed", "file"),
    [
        ("at a restart", WEIGHTS_FILE),
        ("by a request", WEIGHTS_FILE),
        ("by a request", "adapter_config.json"),
    ],
)
def test_a_changed_adapter_is_not_loaded_and_its_parent_serves_with_the_reason(
    store: Store, tmp_path: Path, noticed: str, file: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for number in (1, 2):
            await serve(store, p, tmp_path, number)
        (tmp_path / "v2" / file).write_bytes(b"something else")
        engine.adapters.clear()
        if noticed == "at a restart":
            p.proxy.versions.replicas[0].failed()
        else:
            await p.chat(request())
        await until(lambda: p.proxy.versions.serving["main"].number == 1)
        status, _, headers = await p.chat(request())
        assert (status, headers["x-nextstate-version"]) == (200, "1")
        first, second = store.versions.all("main")
        assert (first.state, second.state) == (VersionState.SERVING, VersionState.REJECTED)
        assert "changed on disk" in (second.reason or "")
        assert V2 not in engine.adapters

    both(test, store, tmp_path)


@pytest.mark.parametrize("noticed", ["at a restart", "by a request"])
def test_an_adapter_that_cannot_be_read_for_now_keeps_its_place_and_serves_once_it_can(
    store: Store, tmp_path: Path, noticed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, tried = adapter_files.file_sha256, 0

    def fails(path: Path) -> str:
        nonlocal tried
        tried += 1
        raise OSError(errno.ESTALE, "Stale file handle")

    async def test(engine: ScriptedEngine, p: Running) -> None:
        for number in (1, 2):
            await serve(store, p, tmp_path, number)
        monkeypatch.setattr(adapter_files, "file_sha256", fails)
        engine.adapters.clear()
        if noticed == "at a restart":
            p.proxy.versions.replicas[0].failed()
        else:
            await p.chat(request())
        await until(lambda: tried > 0)
        monkeypatch.setattr(adapter_files, "file_sha256", read)
        status, _, headers = await p.chat(request())
        assert (status, headers["x-nextstate-version"]) == (200, "2")
        assert [v.state.value for v in store.versions.all("main")] == ["retired", "serving"]

    both(test, store, tmp_path)


def test_a_file_is_lost_only_where_its_disk_is_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        adapter_files.verify_adapter(tmp_path / "v1", "ff")
    with pytest.raises(EngineError, match="see that this machine has its disk"):
        adapter_files.verify_adapter(tmp_path / "not mounted" / "v1", "ff")


@pytest.mark.parametrize("adapter", ["whole", "changed"])
def test_a_store_that_fails_while_the_engine_comes_back_does_not_end_the_watching(
    store: Store, tmp_path: Path, adapter: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await serve(store, p, tmp_path, 1)
        with closing(sqlite3.connect(store.dir / "nextstate.sqlite3")) as file:
            file.execute("ALTER TABLE versions RENAME TO gone")
            engine.adapters.clear()
            if adapter == "changed":
                (tmp_path / "v1" / WEIGHTS_FILE).write_bytes(b"something else")
            p.proxy.versions.replicas[0].failed()
            if adapter == "changed":
                await until(lambda: "getting the engine ready failed" in caplog.text)
            else:  # the store is not needed to serve
                await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            file.execute("ALTER TABLE gone RENAME TO versions")
        await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
        status, _, headers = await p.chat(request())
        assert (status, headers["x-nextstate-version"]) == (200, "01"[adapter == "whole"])

    both(test, store, tmp_path)


def test_a_proxy_whose_watching_has_failed_ends(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: Versions) -> None:
        raise ValueError("a defect")

    async def test() -> None:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        async with running("http://127.0.0.1:1", store, tmp_path):
            await asyncio.wait_for(ended.wait(), 60)
        assert "a defect" in caplog.text

    monkeypatch.setattr(Versions, "run", broken)
    asyncio.run(test())


def test_a_withdrawn_version_gives_way_to_its_nearest_whole_ancestor(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> None:
        async with scripted_engine() as engine:
            file = tmp_path / "nextstate.toml"
            address = f'mode = "external"\nurl = "{engine.url}"\nmodel = "{MODEL}"'
            file.write_text(f"[engine]\n{address}\n")
            settings = Settings.read(file)
            for number in (1, 2, 3):
                await change_version(settings, publish, store, add_version(store, tmp_path, number))
            (tmp_path / "v2" / WEIGHTS_FILE).write_bytes(b"something else")
            engine.adapters.clear()
            rejected = replace(store.versions.serving("main"), reason="worse")
            await change_version(settings, withdraw, store, rejected)
            assert list(engine.adapters) == [V1]
            assert store.versions.serving("main").number == 1
            assert store.versions.all("main")[2].reason == "worse"
            await change_version(settings, withdraw, store, rejected)  # another serves by now
            assert store.versions.serving("main").number == 1

    asyncio.run(test())


def test_a_changed_adapter_is_refused_before_the_engine_sees_it(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        version = add_version(store, tmp_path, 1)
        (tmp_path / "v1" / WEIGHTS_FILE).unlink()
        with pytest.raises(AdapterError, match=r"v1 cannot be read: .*No such file"):
            await publish(store, p.proxy.engines, version)
        assert engine.adapters == {}
        assert store.versions.serving("main").number == 0

    both(test, store, tmp_path)


def test_while_the_engine_is_down_streams_are_held_with_comments(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> None:
        async with scripted_engine() as engine:
            engine.healthy = False
            async with running(
                engine.url, store, tmp_path, intervals=Intervals(keep_alive_s=0.05)
            ) as p:
                answer = await p.http.post(
                    f"{p.url}/v1/chat/completions", data=orjson.dumps(request(stream=True))
                )
                assert answer.status == 200
                assert await answer.content.readline() == b": waiting for the engine\n"
                engine.healthy = True
                data = await answer.read()
                assert data.endswith(b"data: [DONE]\n\n")
                assert b"Hel" in data

    asyncio.run(test())


@pytest.mark.parametrize(
    ("method", "path", "stream"),
    [
        ("POST", "chat/completions", True),
        ("POST", "chat/completions", False),
        ("GET", "models", False),
        ("POST", "score", False),
        ("POST", "echo", False),
    ],
)
def test_an_engine_that_stays_down_is_a_clear_503(
    store: Store, tmp_path: Path, method: str, path: str, stream: bool
) -> None:
    async def test() -> None:
        async with running("http://127.0.0.1:1", store, tmp_path, hold_s=0.1) as p:
            data = orjson.dumps(request(stream=stream))
            answer = await p.http.request(method, f"{p.url}/v1/{path}", data=data)
            assert (answer.status, answer.headers["Retry-After"]) == (503, "10")
            assert (await answer.json())["error"]["code"] == 503

    asyncio.run(test())
