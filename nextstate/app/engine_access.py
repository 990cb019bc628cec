"""Where the engine is and its key: from the configuration, or from the supervisor that runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from nextstate.app.settings import Settings
from nextstate.config import secret
from nextstate.engine.client import EngineClient, zero_adapter_path
from nextstate.engine.defaults import sampling_defaults
from nextstate.errors import StartError
from nextstate.records import PolicyVersion
from nextstate.store import Store


def engine_file(settings: Settings) -> Path:
    """The file with the address and the key of a managed engine; it exists while that runs."""
    return settings.store.path / "engine.json"


def write_engine_file(settings: Settings, url: str, key: str | None) -> None:
    """Writes the engine file; only its owner can read it."""
    file = engine_file(settings)
    draft = file.with_suffix(f".{os.getpid()}")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump({"url": url, "key": key}, opened)
    draft.replace(file)


def engine_access(settings: Settings) -> tuple[str, str | None]:
    """The engine's address, and its key or None if it needs none.

    Raises StartError if no managed engine runs, and ConfigError if a key is named but not set.
    """
    if settings.engine.mode == "external":
        return settings.engine.url, secret(settings.engine.api_key_env, "[engine] api_key_env")
    try:
        found = json.loads(engine_file(settings).read_text())
        return str(found["url"]), found.get("key")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StartError(
            f"no engine runs on [store] dir = {settings.store.dir!r}: start one with "
            '`nextstate up`, or set [engine] mode = "external" and url'
        ) from None


def engine_client(settings: Settings) -> EngineClient:
    """A client of the engine, with its key; inside a running event loop."""
    url, key = engine_access(settings)
    defaults = sampling_defaults(settings.engine)
    return EngineClient(url, settings.engine.name, key, defaults)


def zero_adapter(settings: Settings) -> Path:
    """The folder of the adapter that warms the engine up for the configured model."""
    rank = settings.learner.lora_rank
    return zero_adapter_path(settings.store.path, settings.engine.model_path, rank)


VersionChange = Callable[[Store, EngineClient, PolicyVersion], Awaitable[object]]


async def change_version(
    settings: Settings, change: VersionChange, store: Store, version: PolicyVersion
) -> None:
    """Calls `publish`, `publish_candidate` or `withdraw` with the configured engine."""
    async with engine_client(settings) as engine:
        await change(store, engine, version)
