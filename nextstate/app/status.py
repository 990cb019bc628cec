"""What `nextstate status` shows: each part's health and the counts in the store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

import aiohttp

from nextstate.agreement import agreement
from nextstate.app.parts import read_parts
from nextstate.app.settings import Settings
from nextstate.app.stages import engine_client
from nextstate.errors import ConfigError, EngineError, StartError, WrongEngineError
from nextstate.prometheus import counts_by
from nextstate.records import Json
from nextstate.store.store import Store
from nextstate.training_status import read_training_status
from nextstate.wire import json_object


async def status(settings: Settings) -> Json:
    """One object with the counts and each part's health."""
    store = await asyncio.to_thread(Store, settings.store)
    lineages = settings.all_lineages
    serving = await asyncio.to_thread(store.serving_versions, lineages)
    counts = await asyncio.to_thread(store.counts)
    told = await _ask_proxy(settings, "/healthz")
    health = (json_object(told[1]) or {}) if told is not None else {}
    return {
        "state_dir": str(settings.store.path),
        "proxy": _proxy_health(told, health),
        "engine": await _engine_health(settings, health),
        "parts": await asyncio.to_thread(read_parts, settings.store.path),
        "training": await asyncio.to_thread(read_training_status, settings.store.path, lineages),
        "serving": {name: version.number for name, version in serving.items()},
        "counts": counts,
        "unrecorded": _unrecorded(settings, await _ask_proxy(settings, "/metrics")),
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


async def _ask_proxy(settings: Settings, path: str) -> tuple[int, bytes] | None:
    """The status and the body that the proxy answers, asked with its key; None if it is down."""
    variable = settings.proxy.api_key_env
    key = os.environ.get(variable) if variable else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=2)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.get(settings.proxy.url + path) as answer,
        ):
            return answer.status, await answer.read()
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


def _proxy_health(answer: tuple[int, bytes] | None, health: Json) -> str:
    if answer is None:
        return "down"
    if answer[0] != 200:
        return f"answers {answer[0]}"
    waiting = health.get("turns_waiting", 0)
    return f"up, {waiting} turns wait for the store" if waiting else "up"


def _unrecorded(settings: Settings, answer: tuple[int, bytes] | None) -> Json | str:
    """Requests to generate that no turn holds, by the reason, or why that is not known."""
    if answer is None:
        return {}
    status, text = answer
    if status == 401:
        return f"not told: [proxy] api_key_env = {settings.proxy.api_key_env!r} is not its key here"
    counts = text.decode(errors="replace")
    return dict(counts_by(counts, "nextstate_requests_unrecorded_total", "reason"))


async def _engine_health(settings: Settings, health: Json) -> str:
    """As the proxy has found it; asked here while there is no proxy."""
    if problem := health.get("engine_problem"):
        return f"no use: {problem}"
    if "engine" not in health:
        return await _ask_engine(settings)
    lacks = ", ".join(health.get("learning_lacks") or ())
    up = health["engine"] == "up"
    return ("up" if up else "down") + (f"; learning lacks {lacks}" if up and lacks else "")


async def _ask_engine(settings: Settings) -> str:
    try:
        async with engine_client(settings) as engine:
            return "up" if await engine.healthy() else "down"
    except WrongEngineError as error:
        return f"no use: {error}"
    except ConfigError as error:
        return f"not asked: {error}"
    except (StartError, EngineError):
        return "down"
