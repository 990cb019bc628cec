"""What `nextstate status` shows: each part's health and the counts in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import aiohttp

from nextstate.agreement import agreement
from nextstate.errors import StartError
from nextstate.notices import read_notices
from nextstate.parts import read_parts
from nextstate.records import Json
from nextstate.settings import Settings
from nextstate.stages import engine_client
from nextstate.store import Store


async def status(settings: Settings) -> Json:
    """One object with the counts and each part's health."""
    store = await asyncio.to_thread(Store, settings.store)
    lineages = settings.all_lineages
    serving = await asyncio.to_thread(store.serving_versions, lineages)
    counts = await asyncio.to_thread(store.counts)
    return {
        "state_dir": str(settings.store.path),
        "proxy": await _proxy_health(settings),
        "engine": await _engine_health(settings),
        "parts": await asyncio.to_thread(read_parts, settings.store.path),
        "training": await asyncio.to_thread(read_notices, settings.store.path, lineages),
        "serving": {name: version.number for name, version in serving.items()},
        "counts": counts,
        "judge_agreement": judge_agreement(await asyncio.to_thread(store.labels)),
    }


def judge_agreement(labels: Mapping[str, Sequence[tuple[int, int]]]) -> Json:
    """How each judge's votes agree with what people said of the same turns; {} without any.

    >>> judge_agreement({"rules": [(1, 1), (1, 1), (0, 0), (-1, 1)]})
    {'rules': {'labels': 4, 'accuracy': 0.75, 'kappa': 0.5556}}
    """
    found = {judge: agreement(pairs) for judge, pairs in labels.items()}
    return {
        judge: {"labels": a.cases, "accuracy": round(a.accuracy, 4), "kappa": round(a.kappa, 4)}
        for judge, a in found.items()
    }


def agreement_shown(found: Json) -> Json | str:
    """`judge_agreement` for people.

    >>> agreement_shown({"rules": {"labels": 4, "accuracy": 0.75, "kappa": 0.5556}})
    {'rules': '4 labels, accuracy 0.75, κ 0.56'}
    """
    if not found:
        return "no labels yet: `nextstate feedback` on a judged turn is one"
    return {
        judge: f"{a['labels']} labels, accuracy {a['accuracy']:.2f}, κ {a['kappa']:.2f}"
        for judge, a in found.items()
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
