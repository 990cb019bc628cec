"""A real vLLM serves an adapter of an encrypted store: from memory, for as long as it is loaded."""
# pyright: basic

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest
import torch

from demo.course import POLICY
from learner.adapters import Card, load_weights, save_adapter, save_zero_adapter
from learner.folders import version_path
from nextstate.config import StoreConfig
from nextstate.engine.adapter_files import WEIGHTS_FILE, remove_all_served, served_folder
from nextstate.engine.client import EngineClient, publish
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.encrypted import encrypt
from tests.learner.test_tiny_model import CONFIG
from tests.running_loop import Engine

pytestmark = pytest.mark.engine
MARK = b"\x11\x22\x33\x44" * 4
"""The first weights, as bytes: they stand in a plain file."""


def make_adapter(folder: Path, shapes: Path) -> str:
    """An adapter with much effect; returns the SHA-256 of its weights."""
    save_zero_adapter(str(POLICY), CONFIG, shapes)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(zero.shape, generator=generator)
        for name, zero in load_weights(shapes).items()
    }
    first = next(iter(weights.values()))
    first.view(-1)[:4] = torch.frombuffer(bytearray(MARK), dtype=torch.float32)
    return save_adapter(
        folder, weights, CONFIG, str(POLICY), Card("sealed", 1, 0, "binary", [], {})
    )


def plain_in(folder: Path) -> list[str]:
    return [f.name for f in folder.rglob("*") if f.is_file() and MARK in f.read_bytes()]


def test_it_is_served_from_memory_and_no_plain_byte_reaches_the_disk(
    native_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StoreConfig(dir=str(tmp_path / "state"))
    encrypt(config, monkeypatch)

    async def said(engine: EngineClient, name: str) -> list[int]:
        body = {"model": name, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
        answer = await engine.post("/v1/completions", {**body, "return_token_ids": True})
        return answer["choices"][0]["token_ids"]

    async def serve(store: Store) -> None:
        folder = version_path(config.path, "sealed", 1)
        sha256 = make_adapter(folder, tmp_path / "shapes")
        version = PolicyVersion("sealed", 1, 0, str(folder), sha256, 1, VersionState.CANDIDATE)
        store.versions.add(version, None)
        name = version.adapter_name
        assert name is not None
        async with EngineClient(
            native_engine.url, native_engine.model, native_engine.key
        ) as engine:
            await publish(store, [engine], version)
            served = Path(served_folder(str(folder)))
            assert served.parent.parent == Path("/dev/shm")
            assert plain_in(served) == [WEIGHTS_FILE]
            assert await said(engine, name) != await said(engine, native_engine.model)
            await engine.unload_adapter(name)
            assert plain_in(served) == []
            await engine.load_adapter(name, str(folder))  # as after a restart of the engine
            assert await said(engine, name) != await said(engine, native_engine.model)
            await engine.unload_adapter(name)
        assert plain_in(tmp_path) == []

    try:
        with closing(Store(config)) as store:
            asyncio.run(serve(store))
            assert store.versions.serving("sealed").number == 1
    finally:
        remove_all_served(config.path)
