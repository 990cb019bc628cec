"""The managed engine's key, the check of it, its environment and the adapters' names in it."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nextstate.app.engine_access import engine_access, engine_file, write_engine_file
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.config import EngineConfig, StoreConfig
from nextstate.engine.client import EngineClient, ensure_loaded
from nextstate.engine.key_check import KeyCheck
from nextstate.engine.process import command, managed_key, not_passed, server_environment
from nextstate.errors import ConfigError, EngineError
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.proxy.running_proxy import add_version, running, until
from tests.scripted_engine import MODEL, adapter, scripted_engine

SHELL = {"VLLM_API_KEY": "elsewhere", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_X": "1"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmodel = "{tmp_path}"\n')
    (tmp_path / "state").mkdir()
    return Settings.read(file)


def test_each_start_has_a_new_key_that_no_command_line_shows(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "elsewhere")
    engines = [Stack(settings).children["engine"] for _ in range(2)]
    keys = [(engine.env or {})["VLLM_API_KEY"] for engine in engines]
    assert len({*keys, "elsewhere"}) == 3
    assert all(len(key) > 30 for key in keys)
    for engine, key in zip(engines, keys, strict=True):
        assert key not in " ".join(engine.argv)
    others = [part for name, part in Stack(settings).children.items() if name != "engine"]
    assert all(key not in (part.env or {}).values() for part in others for key in keys)


def test_only_the_owner_can_read_where_the_key_is(settings: Settings) -> None:
    engine_file(settings).write_text("{}")  # what an earlier release left, open to all
    engine_file(settings).chmod(0o644)
    old = os.umask(0)
    try:
        write_engine_file(settings, ["http://127.0.0.1:5"], "secret")
    finally:
        os.umask(old)
    assert stat.S_IMODE(engine_file(settings).stat().st_mode) == 0o600
    assert engine_access(settings) == (["http://127.0.0.1:5"], "secret")
    assert [path.name for path in engine_file(settings).parent.iterdir()] == ["engine.json"]


def test_a_key_of_the_users_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_ENGINE_KEY", "mine")
    assert managed_key(EngineConfig(api_key_env="MY_ENGINE_KEY")) == "mine"
    assert managed_key(EngineConfig(env={"VLLM_API_KEY": "theirs"})) == "theirs"


@pytest.mark.parametrize("args", [("--api-key", "k"), ("--api-key=k",)])
def test_a_key_on_the_command_line_is_refused(args: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="api_key_env"):
        managed_key(EngineConfig(args=args))


def test_vllms_variables_of_the_shell_reach_the_engine_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("HF_HOME", "/cache")
    config = EngineConfig(env={"VLLM_X": "2", "VLLM_CPU_KVCACHE_SPACE": "4"})
    env = server_environment(config, "key")
    assert env["VLLM_API_KEY"] == "key"
    assert (env["VLLM_X"], env["VLLM_CPU_KVCACHE_SPACE"]) == ("2", "4")
    assert "VLLM_LOGGING_LEVEL" not in env
    assert (env["CUDA_VISIBLE_DEVICES"], env["HF_HOME"]) == ("1", "/cache")
    assert not_passed(config, SHELL) == ["VLLM_API_KEY", "VLLM_LOGGING_LEVEL"]


DOOR = [
    ("http", "/v1/models", {}, 401),
    ("http", "/adapters", {}, 401),
    ("http", "/adapters/main", {"authorization": "Bearer wrong"}, 401),
    ("http", "/invocations", {"authorization": "Bearer key2"}, 401),
    ("http", "/tokenize", {"x-api-key": "key"}, 401),
    ("http", "/metrics", {"authorization": "key"}, 401),
    ("http", "//health", {}, 401),
    ("http", "/health/../adapters", {}, 401),
    ("websocket", "/v1/realtime", {}, 1008),
    ("http", "/adapters", {"authorization": "Bearer key"}, 200),
    ("http", "/health", {}, 200),
    ("lifespan", "", {}, 200),
]


@pytest.mark.parametrize(("kind", "path", "headers", "status"), DOOR)
def test_the_key_check_passes_requests_with_the_key(
    kind: str, path: str, headers: dict[str, str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "key")
    told: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        told.append(200)

    async def send(message: Any) -> None:
        told.append(message.get("status") or message.get("code"))

    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing is read")

    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "headers": sent}
    asyncio.run(KeyCheck(app)(scope, receive, send))
    assert told[0] == status
    assert (200 in told) == (status == 200)


def test_the_engine_starts_with_the_key_check() -> None:
    argv = command(EngineConfig(model="m"), 5)
    module, _, name = argv[argv.index("--middleware") + 1].rpartition(".")
    assert (module, name) == (KeyCheck.__module__, KeyCheck.__name__)


def test_a_versions_name_cannot_be_guessed_before_its_weights_exist() -> None:
    version = PolicyVersion("main", 3, 2, "/v3", "ab" * 32, 16, VersionState.CANDIDATE)
    assert version.adapter_name == f"main-v000003-{'ab' * 8}"
    assert replace(version, sha256="cd" * 32).adapter_name != version.adapter_name
    assert replace(version, sha256=None, path=None).adapter_name is None


@pytest.mark.parametrize("root", ["/evil", "", None])
def test_what_someone_else_loaded_under_a_versions_name_never_serves(
    store: Store, tmp_path: Path, root: str | None
) -> None:
    async def test() -> None:
        async with scripted_engine() as engine, EngineClient(engine.url, MODEL) as client:
            version = add_version(store, tmp_path, 1)
            name = version.adapter_name or ""
            engine.adapters[name] = root  # pyright: ignore[reportArgumentType]
            await ensure_loaded(client, version)
            assert engine.unloaded == [name]
            assert engine.adapters == {name: version.path}
            engine.unloads_to_fail = 1
            engine.adapters[name] = "/evil"
            with pytest.raises(EngineError):
                await ensure_loaded(client, version)

    asyncio.run(test())


def test_an_adapter_that_came_under_the_name_during_the_load_is_not_taken_for_ours(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> None:
        async with scripted_engine() as engine, EngineClient(engine.url, MODEL) as client:
            version = add_version(store, tmp_path, 1)
            name = version.adapter_name or ""
            engine.loading = asyncio.Event()
            loading = asyncio.create_task(ensure_loaded(client, version))
            await until(lambda: engine.loads == 1)
            engine.adapters[name] = "/evil"
            engine.loading.set()
            with pytest.raises(EngineError, match="already been loaded"):
                await loading
            assert engine.unloaded == [name]

    asyncio.run(test())


def test_what_an_earlier_release_loaded_is_unloaded_and_its_versions_serve(
    tmp_path: Path,
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    version = add_version(store, tmp_path, 1)
    store.versions.set_serving("main", 1)

    async def test() -> None:
        async with scripted_engine() as engine:
            engine.adapters["main-v000001"] = str(version.path)
            engine.adapters["someone-elses"] = "/other"
            async with running(engine.url, store, tmp_path) as p:
                await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
                assert set(engine.adapters) == {"someone-elses", adapter("main", 1, "v1")}
                answer = await p.http.get(f"{p.url}/v1/models")
                names = [model["id"] for model in json.loads(await answer.read())["data"]]
                assert names == [MODEL]  # neither what we load nor what others do

    asyncio.run(test())
    store.close()
