"""What `nextstate status` shows: the health of each process and the counts in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from learner.rejections import MANY_REJECTIONS, why_paused
from nextstate.app.child_states import read_child_states
from nextstate.app.engine_access import engine_clients
from nextstate.app.episode_views import settled_text, settled_worth
from nextstate.app.exam_views import exams
from nextstate.app.judge_worth import agreement_text, judge_agreement, trained_worth
from nextstate.app.own_key import proxy_key
from nextstate.app.retention import read_keep
from nextstate.app.settings import Settings
from nextstate.app.tls import proxy_connector
from nextstate.app.waiting import signals, waits
from nextstate.app.watching import serving_watch, watch_text
from nextstate.errors import ConfigError, EngineError, StartError, WrongEngineError
from nextstate.prometheus import metric_sum, metric_values
from nextstate.records import Json
from nextstate.store import Store
from nextstate.training_status import read_training_status
from nextstate.wire import json_object, obj, objects
from rollout.progress import progress_text, read_progress


async def status(settings: Settings) -> Json:
    """The object of `nextstate status --json`."""
    store = await asyncio.to_thread(Store, settings.store)
    lineages = settings.all_lineages
    serving = await asyncio.to_thread(store.versions.serving_of, lineages)
    counts = await asyncio.to_thread(store.counts)
    answer = await _ask_proxy(settings, "/healthz")
    health = (json_object(answer[1]) or {}) if answer is not None else {}
    training = await asyncio.to_thread(_training, settings, store)
    return {
        "state_dir": str(settings.store.path),
        "proxy": _proxy_health(answer, health),
        "engine": await _engine_health(settings, health),
        "engines": {str(one["name"]): engine_text(one) for one in objects(health.get("engines"))},
        "parts": await asyncio.to_thread(read_child_states, settings.store.path),
        "training": training,
        "waits": {
            name: await asyncio.to_thread(waits, settings, store, name, counts)
            for name in lineages
            if name not in training
        },
        "serving": {name: version.number for name, version in serving.items()},
        "watch": await asyncio.to_thread(_watch, settings, store),
        "counts": counts,
        "review": await asyncio.to_thread(store.reviewing.counts),
        "held_back": await asyncio.to_thread(_held_back, settings, store),
        "kept": str(await asyncio.to_thread(read_keep, settings.store.path)),
        "unrecorded": _unrecorded(settings, await _ask_proxy(settings, "/metrics")),
        "rollout": await asyncio.to_thread(_rollout, settings),
        "exams": await asyncio.to_thread(exams, settings, store, settings.all_lineages),
        "environments": await asyncio.to_thread(settled_worth, store),
        "trained_judge": await asyncio.to_thread(trained_worth, settings),
        "judge_agreement": judge_agreement(await asyncio.to_thread(store.judging.labels)),
    }


def status_lines(found: Json) -> list[str]:
    """`status` as text: one value a line."""
    shown = {**found, "judge_agreement": agreement_text(found["judge_agreement"])}
    if found["trained_judge"] is None:
        del shown["trained_judge"]
    else:
        shown["trained_judge"] = found["trained_judge"]["text"]
    shown["environments"] = {n: settled_text(one) for n, one in obj(found["environments"]).items()}
    rollout = found["rollout"]
    shown["rollout"] = progress_text(rollout) if rollout else "none: see [rollout]"
    shown["watch"] = {name: watch_text(seen) for name, seen in obj(found["watch"]).items()}
    lines: list[str] = []
    for name, value in shown.items():
        if isinstance(value, dict):
            lines += [f"{name}/{key:{27 - len(name)}} {inner}" for key, inner in obj(value).items()]  # pyright: ignore[reportUnknownArgumentType]
        else:
            lines.append(f"{name:28} {value}")
    return lines


def _held_back(settings: Settings, store: Store) -> Json:
    """By lineage: the judged turns that wait by client, because the shares hold some back."""
    size, which = settings.learner.batch_size, signals(settings.learner)
    found = {name: store.training.held_back(name, size, *which) for name in settings.all_lineages}
    return {name: by_client for name, by_client in found.items() if by_client}


def _training(settings: Settings, store: Store) -> dict[str, str]:
    """By lineage: why it does not train. A pause is known also without a learner."""
    found = read_training_status(settings.store.path, settings.all_lineages)
    return found | pauses(store, settings.all_lineages)


def pauses(store: Store, lineages: Sequence[str]) -> dict[str, str]:
    """By lineage: who has paused it and how it goes on. Lineages that may train are left out."""
    found = {
        name: why_paused(
            name, store.versions.newest(name, MANY_REJECTIONS), store.versions.decisions(name)
        )
        for name in lineages
    }
    return {name: why for name, why in found.items() if why is not None}


def _rollout(settings: Settings) -> Json:
    """What the endless run has done since it began; {} without `[rollout]`, or before it began."""
    return read_progress(settings.store.path / "rollout") if settings.rollout.environment else {}


def _watch(settings: Settings, store: Store) -> Json:
    """By lineage: what the watch sees; {} with `[learner] watch = false`."""
    if not settings.learner.watch:
        return {}
    return {name: serving_watch(store, name) for name in settings.all_lineages}


async def _ask_proxy(settings: Settings, path: str) -> tuple[int, bytes] | None:
    """The status and body of the proxy's answer, asked with its key; None if it is down."""
    try:
        key = proxy_key(settings)
    except ConfigError:  # the answer says whether it needs one
        key = None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=2)
    try:
        async with (
            aiohttp.ClientSession(
                timeout=timeout, headers=headers, connector=proxy_connector(settings.proxy)
            ) as session,
            session.get(settings.proxy.url + path, allow_redirects=False) as answer,
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
    """By reason: generating requests that no turn records, since the proxy's start.

    A text if that is not known.
    """
    if answer is None:
        return {}
    status, body = answer
    if status == 401:
        variable = settings.proxy.api_key_env
        return f"unknown: the proxy asks for a key, and [proxy] api_key_env = {variable!r} has none"
    page = body.decode(errors="replace")
    found = metric_values(page, "nextstate_requests_unrecorded_total")
    counts = {labels["reason"]: int(count) for labels, count in found if count}
    lost = metric_sum(page, "nextstate_turns_lost_total")
    return counts | {"lost": int(lost)} if lost else counts


async def _engine_health(settings: Settings, health: Json) -> str:
    """The engine's health as the proxy sees it; without a proxy, the engine is asked here."""
    if problem := health.get("engine_problem"):
        return f"unusable: {problem}"
    if "engine" not in health:
        return await _ask_engine(settings)
    if health["engine"] != "up":
        return _down(settings, health.get("engine_trouble"))
    lacks = ", ".join(health.get("learning_lacks") or ())
    return f"up; learning lacks {lacks}" if lacks else "up"


def engine_text(one: Json) -> str:
    """What the proxy's `/healthz` says of one of several engines, in words."""
    return f"{one['state']}: {one['trouble']}" if one["trouble"] else str(one["state"])


async def _ask_engine(settings: Settings) -> str:
    try:
        async with engine_clients(settings) as engines:
            troubles = [engine.trouble for engine in engines if not await engine.healthy()]
            return _down(settings, "; ".join(troubles)) if len(troubles) == len(engines) else "up"
    except WrongEngineError as error:
        return f"unusable: {error}"
    except ConfigError as error:
        return f"unknown: {error}"
    except StartError:
        return "down"
    except EngineError as error:
        return _down(settings, str(error))


def _down(settings: Settings, trouble: str | None) -> str:
    """Says what is the matter with an external engine: the log of a managed one says it."""
    if not trouble or settings.engine.mode == "managed":
        return "down"
    where = ", ".join(settings.engine.urls)
    return f"down: [engine] url = {where!r} does not serve: {trouble}"
