"""What `nextstate status` shows: each part's health and the counts in the store."""

from __future__ import annotations

import asyncio

import aiohttp

from nextstate.errors import StartError
from nextstate.records import MAIN_LINEAGE, Json
from nextstate.settings import Settings
from nextstate.stages import engine_client
from nextstate.store import Store


async def status(settings: Settings) -> Json:
    """One object with the counts and each part's health."""
    store = await asyncio.to_thread(Store, settings.store)
    names = [MAIN_LINEAGE, *settings.lineages]
    serving = await asyncio.to_thread(store.serving_versions, names)
    counts = await asyncio.to_thread(store.counts)
    return {
        "state_dir": str(settings.store.path),
        "proxy": await _proxy_health(settings),
        "engine": await _engine_health(settings),
        "serving": {name: version.number for name, version in serving.items()},
        "counts": counts,
    }


async def _proxy_health(settings: Settings) -> str:
    url = f"http://{settings.proxy.host}:{settings.proxy.port}/healthz"
    try:
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            return "up" if answer.status == 200 else f"answers {answer.status}"
    except (aiohttp.ClientError, TimeoutError, OSError):
        return "down"


async def _engine_health(settings: Settings) -> str:
    try:
        async with engine_client(settings) as engine:
            return "up" if await engine.healthy() else "down"
    except StartError:
        return "down"
