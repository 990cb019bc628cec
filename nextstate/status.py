"""What `nextstate status` shows: each part's health and the counts in the store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

import aiohttp

from nextstate.agreement import agreement
from nextstate.errors import EngineError, StartError
from nextstate.notices import read_notices
from nextstate.parts import read_parts
from nextstate.prometheus import counts_by
from nextstate.records import Json
from nextstate.settings import Settings
from nextstate.stages import engine_client
from nextstate.store import Store
from nextstate.wire import json_object


async def status(settings: Settings) -> Json:
    """One object with the counts and each part's health."""
    store = await asyncio.to_thread(Store, settings.store)
    lineages = settings.all_lineages
    serving = await asyncio.to_thread(store.serving_versions, lineages)
    counts = await asyncio.to_thread(store.counts)
    health = await _healthz(settings)
    return {
        "state_dir": str(settings.store.path),
        "proxy": _proxy_health(health),
        "engine": await _engine_health(settings, health),
        "parts": await asyncio.to_thread(read_parts, settings.store.path),
        "training": await asyncio.to_thread(read_notices, settings.store.path, lineages),
        "serving": {name: version.number for name, version in serving.items()},
        "counts": counts,
        "unrecorded": await _unrecorded(settings),
        "judge_agreement": judge_agreement(await asyncio.to_thread(store.labels)),
    }


def judge_agreement(labels: Mapping[str, Mapping[tuple[int, int], int]]) -> Json:
    """How each judge's votes agree with what people said of the same turns; {} without any.

    >>> judge_agreement({"rules": {(1, 1): 2, (0, 0): 1, (-1, 1): 1}})
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


async def _healthz(settings: Settings) -> Json | None:
    """What the proxy says of itself and the engine; None if it is down."""
    url = f"{settings.proxy_url}/healthz"
    try:
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            return (json_object(await answer.read()) or {}) | {"status": answer.status}
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


def _proxy_health(health: Json | None) -> str:
    if health is None:
        return "down"
    if health["status"] != 200:
        return f"answers {health['status']}"
    waiting = health.get("turns_waiting", 0)
    return f"up, {waiting} turns wait for the store" if waiting else "up"


async def _unrecorded(settings: Settings) -> Json:
    """Requests to generate that no turn holds, by the reason; {} if the proxy does not say."""
    url = f"{settings.proxy_url}/metrics"
    key = os.environ.get(settings.proxy.api_key_env) if settings.proxy.api_key_env else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        timeout = aiohttp.ClientTimeout(total=2)
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.get(url) as answer,
        ):
            text = await answer.text(errors="replace")
    except (aiohttp.ClientError, TimeoutError, OSError):
        return {}
    return dict(counts_by(text, "nextstate_requests_unrecorded_total", "reason"))


async def _engine_health(settings: Settings, health: Json | None) -> str:
    """As the proxy has found it; asked here while there is no proxy."""
    if problem := (health or {}).get("engine_problem"):
        return f"no use: {problem}"
    try:
        async with engine_client(settings) as engine:
            up = await engine.healthy()
    except (StartError, EngineError):
        up = False
    lacks = ", ".join((health or {}).get("learning_lacks") or ())
    return ("up" if up else "down") + (f"; learning lacks {lacks}" if up and lacks else "")
