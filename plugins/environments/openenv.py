"""The environment `openenv`: a server that speaks OpenEnv's WebSocket protocol.

A task has these fields beside its id:

    url           the server, as http://127.0.0.1:8000
    reset         what the server's reset gets beside the seed, as {"split": "train", "index": 3}
                  (optional)
    instruction   a text before the first observation (optional)
    action        the field of an action that takes the reply's text; without it a reply is the
                  action itself, as a JSON object (optional)
    show          the field of an observation that the agent sees; without it all of it, as JSON
                  (optional)
    outcome       what of the server's rewards is the outcome: `last`, that of the step that ended
                  the episode, or `sum` (optional; last)
    solved        the reward from which on the task is solved: the outcome is divided by it
                  (optional; 1)

What the server gives for a step that does not end the episode is the step's process reward. If it
ends the episode without a reward, the outcome is not known, and the episode has failed.
An action that the server refuses is the agent's mistake; any other error of it is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NoReturn, cast
from urllib.parse import urlsplit

import aiohttp

from nextstate.errors import ConfigError, RolloutError, StartError
from nextstate.hooks import Acted, Scored
from nextstate.records import Json
from plugins.environments.long_texts import beginning_of
from plugins.environments.solved_at import solved_at

_FIELDS: Mapping[str, type] = {
    "url": str,
    "reset": dict,
    "instruction": str,
    "action": str,
    "show": str,
    "outcome": str,
    "solved": object,
}
_OUTCOMES = ("last", "sum")
_MOST_MESSAGE_BYTES = 16 << 20
_CONNECT_S, _CLOSE_S = 30.0, 5.0
_FULL = "CAPACITY_REACHED"
_MISTAKES = ("VALIDATION_ERROR", "INVALID_JSON")


class OpenEnv:
    """One session of a server."""

    def __init__(self) -> None:
        self._http: aiohttp.ClientSession | None = None
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        self._rewards: list[float] = []
        self._last: float | None = 0.0
        """The reward of the step that ended the episode; None: it had none."""

    async def reset(self, task: Json, seed: int) -> str:
        self._task = task
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        url = f"{task['url'].rstrip('/')}/ws"
        try:
            self._ws = await self._http.ws_connect(
                url,
                max_msg_size=_MOST_MESSAGE_BYTES,
                timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_S),  # pyright: ignore[reportCallIssue]
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RolloutError(f"no OpenEnv server at {url}: {error}") from error
        given = {"seed": seed, **task.get("reset", {})}
        answer, code = await self._ask({"type": "reset", "data": given})
        if code:
            self._failed(answer, code)
        shown = self._shown(answer)
        instruction = task.get("instruction")
        return f"{instruction}\n\n{shown}".strip() if instruction else shown

    async def step(self, action: str) -> Acted:
        name = self._task.get("action")
        data = {name: action} if name else _object(action)
        if data is None:
            return Acted("Expected one JSON object, and nothing else.", -1.0, False)
        answer, code = await self._ask({"type": "step", "data": data})
        if code in _MISTAKES:
            told = answer.get("errors") or answer.get("message")
            return Acted(
                beginning_of(f"error: {json.dumps(told, ensure_ascii=False)}"), -1.0, False
            )
        if code:
            self._failed(answer, code)
        done, reward = answer.get("done") is True, _number(answer.get("reward"))
        if reward is not None:
            self._rewards.append(reward)
        if done:
            self._last = reward
        return Acted(self._shown(answer), None if done else reward, done)

    async def score(self) -> Scored:
        of_all = self._task.get("outcome", "last") == "sum"
        if self._last is None and not (of_all and self._rewards):
            raise RolloutError(
                "the OpenEnv server ended the episode without a reward, so its outcome is not "
                'known: let the server give one, or set "outcome": "sum" if earlier steps had one'
            )
        found = math.fsum(self._rewards) if of_all else self._last or 0.0
        return Scored(found / solved_at(self._task))

    async def close(self) -> None:
        if self._ws is not None:
            await self._ws.close()
        if self._http is not None:
            await self._http.close()

    async def _ask(self, message: Json) -> tuple[Json, str]:
        """The data of the answer, and the code of an error or an empty text."""
        assert self._ws is not None
        try:
            await self._ws.send_str(json.dumps(message))
            received = await self._ws.receive()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise RolloutError(f"the OpenEnv server went away: {error}") from error
        if received.type is not aiohttp.WSMsgType.TEXT:
            raise RolloutError(f"the OpenEnv server ended the session: {received.type.name}")
        found = _object(cast(str, received.data)) or {}
        data = cast(object, found.get("data"))
        if not isinstance(data, dict) or found.get("type") not in ("observation", "error"):
            raise RolloutError(f"the OpenEnv server answered {received.data!r:.200}")
        fields = cast(Json, data)
        code = str(fields.get("code") or "error") if found["type"] == "error" else ""
        return fields, code

    def _shown(self, answer: Json) -> str:
        observation, name = cast(object, answer.get("observation")), self._task.get("show")
        if name:
            if not isinstance(observation, dict) or name not in observation:
                raise RolloutError(f"show = {name!r}: the observation is {observation!r:.200}")
            observation = cast(Json, observation)[name]
        if not isinstance(observation, str):
            observation = json.dumps(observation, ensure_ascii=False)
        return beginning_of(observation)

    def _failed(self, answer: Json, code: str) -> NoReturn:
        told = f"the OpenEnv server answered {code}: {str(answer.get('message'))!r:.300}"
        if code == _FULL:
            told += "; lower --parallel, or raise max_concurrent_envs of the server"
        raise RolloutError(told)


class OpenEnvKind:
    """Makes sessions of the servers that tasks name."""

    def __init__(self) -> None:
        self._servers: set[str] = set()

    def check_task(self, task: Json) -> None:
        for name, value in task.items():
            if name not in _FIELDS:
                raise ConfigError(f"unknown field {name!r:.80}: known are {', '.join(_FIELDS)}")
            if not isinstance(value, _FIELDS[name]):
                kind = "an object" if _FIELDS[name] is dict else "a text"
                raise ConfigError(f"{name} = {value!r:.80}: expected {kind}")
        url: str = task.get("url", "")
        try:
            parts = urlsplit(url)
            is_server = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            is_server = False
        if not is_server:
            raise ConfigError(f"url = {url!r:.80}: expected a server, as http://127.0.0.1:8000")
        if task.get("outcome", "last") not in _OUTCOMES:
            raise ConfigError(f"outcome = {task['outcome']!r:.80}: expected last or sum")
        solved_at(task)
        self._servers.add(url.rstrip("/"))

    async def check_machine(self) -> None:
        limit = aiohttp.ClientTimeout(total=_CONNECT_S)
        async with aiohttp.ClientSession(timeout=limit) as http:
            for url in sorted(self._servers):
                try:
                    async with http.get(f"{url}/health") as answer:
                        status = answer.status
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    raise StartError(f"no OpenEnv server at {url}: {error}") from error
                if status != 200:
                    raise StartError(f"{url}/health answered {status}: expected an OpenEnv server")

    def make(self) -> OpenEnv:
        return OpenEnv()


def create(settings: object) -> OpenEnvKind:
    return OpenEnvKind()


def _object(text: str) -> Json | None:
    """A JSON object; None for any other text."""
    if len(text) > _MOST_MESSAGE_BYTES:
        return None
    try:
        found: object = json.loads(text.strip(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return cast(Json, found) if isinstance(found, dict) else None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _number(value: object) -> float | None:
    """A reward as a finite number; None if there is none."""
    if not isinstance(value, int | float):
        return None
    number = float(value)
    return number if math.isfinite(number) else None
