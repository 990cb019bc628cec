"""Where the engines are, and their key: from the configuration, or from their supervisor."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from yarl import URL

from nextstate.app.settings import Settings
from nextstate.config import secret
from nextstate.engine.client import EngineClient, zero_adapter_path
from nextstate.engine.defaults import sampling_defaults
from nextstate.errors import StartError
from nextstate.private_files import replace_file
from nextstate.records import PolicyVersion
from nextstate.store import Store


def engine_file(settings: Settings) -> Path:
    """The file with the addresses and the key of the managed engines; it exists while they run."""
    return settings.store.path / "engine.json"


def write_engine_file(settings: Settings, urls: Sequence[str], key: str | None) -> None:
    """Writes the engine file; only its owner can read it."""
    found = {"url": urls[0] if len(urls) == 1 else urls, "key": key}
    replace_file(engine_file(settings), json.dumps(found))


def engine_access(settings: Settings) -> tuple[list[str], str | None]:
    """The engines' addresses, and their key or None if they need none.

    Raises StartError if no managed engine runs, and ConfigError if a key is named but not set.
    """
    if settings.engine.mode == "external":
        return [*settings.engine.urls], secret(settings.engine.api_key_env, "[engine] api_key_env")
    try:
        found = json.loads(engine_file(settings).read_text())
        urls = found["url"] if isinstance(found["url"], list) else [found["url"]]
        return [str(url) for url in urls], found.get("key")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StartError(
            f"no engine runs on [store] dir = {settings.store.dir!r}: start one with "
            '`nextstate up`, or set [engine] mode = "external" and url'
        ) from None


def reached_hosts(settings: Settings) -> list[str]:
    """The hosts that a stage may reach: of the configuration, and of managed engines elsewhere."""
    urls: list[str] = []
    if settings.engine.mode == "managed":
        with suppress(StartError):
            urls = engine_access(settings)[0]
    return [*settings.hosts, *(host for url in urls if (host := URL(url).host))]


@asynccontextmanager
async def engine_clients(settings: Settings) -> AsyncGenerator[list[EngineClient]]:
    """A client of each engine, with its key. Raises as `engine_access` does."""
    urls, key = engine_access(settings)
    defaults = sampling_defaults(settings.engine)
    names = settings.engine.parts if settings.engine.mode == "managed" else ("",) * len(urls)
    async with AsyncExitStack() as opened:
        yield [
            await opened.enter_async_context(
                EngineClient(url, settings.engine.name, key, defaults, name)
            )
            for url, name in zip(urls, names, strict=False)
        ]


def zero_adapter(settings: Settings) -> Path:
    """The folder of the adapter that warms the engine up for the configured model."""
    rank = settings.learner.lora_rank
    return zero_adapter_path(settings.store.path, settings.engine.model_path, rank)


VersionChange = Callable[[Store, Sequence[EngineClient], PolicyVersion], Awaitable[object]]


async def change_version(
    settings: Settings, change: VersionChange, store: Store, version: PolicyVersion
) -> None:
    """Calls `publish`, `publish_candidate` or `withdraw` with the configured engines."""
    async with engine_clients(settings) as engines:
        await change(store, engines, version)
