"""The running proxy is asked for its model's context, and gets a first turn."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import aiohttp

from nextstate.app.connect.target import Target
from nextstate.app.settings import Settings
from nextstate.app.tls import client_context
from nextstate.config import secret
from nextstate.errors import ConfigError, StartError
from nextstate.records import MAIN_LINEAGE
from nextstate.wire import json_object, obj, objects, one_line

_ASKED = "Say hello."
_MOST_TOKENS = 16
_ANSWERS_WITHIN_S = 30.0
"""Beyond `hold_s`, for which the proxy waits for its engine."""


def target_of(settings: Settings, lineage: str, key_env: str = "") -> Target:
    """What the configuration says of the proxy. Raises ConfigError.

    `key_env` is the variable with the agent's own key; "": the configuration names one, or none.
    """
    if lineage not in settings.all_lineages:
        raise ConfigError(f"there is no lineage {lineage!r}: see [lineages.NAME]")
    model, variable = settings.engine.name, settings.proxy.api_key_env
    where = "[proxy] api_key_env"
    if lineage != MAIN_LINEAGE:
        own = settings.lineages[lineage]
        model = own.model or model
        if own.api_key_env:
            variable, where = own.api_key_env, f"[lineages.{lineage}] api_key_env"
    if key_env:
        variable, where = key_env, "--key-env"
    return Target(
        url=settings.proxy.url,
        model=model,
        key=secret(variable, where),
        key_variable=variable,
        context=settings.engine.max_model_len or None,
        tls=client_context(settings.proxy),
    )


async def with_context(target: Target, hold_s: float) -> Target:
    """The target with the context that the engine has, if the proxy is up and tells it.

    The proxy waits up to `hold_s` for an engine that loads its model.
    """
    timeout_s = hold_s + _ANSWERS_WITHIN_S
    try:
        async with _proxy(target, timeout_s) as http, http.get(f"{target.api}/models") as answer:
            said = json_object(await answer.read()) or {}
    except (aiohttp.ClientError, TimeoutError, OSError):
        return target
    found = [one.get("max_model_len") for one in objects(said.get("data"))]
    known = [length for length in found if isinstance(length, int) and length > 0]
    return dataclasses.replace(target, context=known[0]) if known else target


async def send(target: Target, hold_s: float) -> str | None:
    """Sends one side turn, which does not train, and returns its id.

    None if no proxy listens. Raises StartError if it answers with an error.
    """
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": _ASKED}],
        "max_tokens": _MOST_TOKENS,
    }
    headers = {"X-Turn-Type": "side", "X-Session-Id": "nextstate-connect"}
    url = f"{target.api}/chat/completions"
    try:
        async with (
            _proxy(target, hold_s + _ANSWERS_WITHIN_S) as http,
            http.post(url, json=body, headers=headers) as answer,
        ):
            said = await answer.read()
    except aiohttp.ClientConnectorError:
        return None
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise StartError(
            f"{target.url} did not answer a first turn ({type(error).__name__}): see "
            "`nextstate status`"
        ) from error
    if answer.status != 200:
        told = obj((json_object(said) or {}).get("error")).get("message")
        raise StartError(
            f"{target.url} answered a first turn with {answer.status}"
            + (f": {one_line(told):.300}" if isinstance(told, str) else "")
            + (". Another program may have this port" if told is None else "")
        )
    turn = answer.headers.get("x-nextstate-turn")
    if turn is None:
        raise StartError(
            f"{target.url} answered, but recorded no turn: see [privacy] record, and whether "
            "another program has [proxy] port"
        )
    return turn


@asynccontextmanager
async def _proxy(target: Target, timeout_s: float) -> AsyncGenerator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(
        timeout=timeout, headers=headers, connector=aiohttp.TCPConnector(ssl=target.tls)
    ) as http:
        yield http
