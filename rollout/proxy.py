"""The proxy as a runner sees it: groups, calls of the model, rewards, the end of an episode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import aiohttp

from nextstate.episodes import EpisodeState, EpisodeStatus
from nextstate.errors import RefusedError, RolloutError
from nextstate.hooks import text_of
from nextstate.prometheus import metric_sum
from nextstate.records import Json
from nextstate.wire import json_object

_MOST_ANSWER_BYTES = 64 << 20
_EXTRA_S = 60.0
"""Beyond an episode's deadline, at which the proxy itself ends a call."""
_REQUESTS, _OF_EPISODES = "nextstate_requests_total", "nextstate_requests_of_episodes_total"
_GIVE_UP_S = 5.0
"""How long a runner that is stopped waits for the proxy."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An episode that may call the model."""

    episode: str
    state: EpisodeState
    base_url: str
    api_key: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of the model."""

    text: str
    turn: str | None
    """Its turn; None if it was not recorded."""


class ProxyClient:
    """Requests about episodes to one proxy. Every method raises RolloutError."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        key: str | None,
        model: str,
        deadline_s: float,
    ) -> None:
        self._http = http
        self._url = f"{url.rstrip('/')}/v1"
        self._key = key or "none"
        self.model = model
        self._of_people: float | None = None
        """Requests of people's agents that the proxy had counted at the last look."""
        self._timeout = aiohttp.ClientTimeout(total=deadline_s + _EXTRA_S, connect=_EXTRA_S)

    async def open_group(self, **asked: Any) -> list[Opened]:
        """Opens the episodes of one group, all or none."""
        given = {name: value for name, value in asked.items() if value is not None}
        answer, _ = await self._post(f"{self._url}/groups", self._key, given)
        return [_opened(one) for one in answer["episodes"]]

    async def open_episode(self, **asked: Any) -> Opened:
        """Opens one episode."""
        given = {name: value for name, value in asked.items() if value is not None}
        answer, _ = await self._post(f"{self._url}/episodes", self._key, given)
        return _opened(answer)

    async def check(self) -> None:
        """Raises RolloutError unless the proxy answers to this key."""
        url = f"{self._url}/models"
        status, _, _ = await self._fetch("GET", url, self._key)
        if status != 200:
            raise RefusedError(f"{url} answered {status}", status, "")

    async def people(self) -> bool:
        """Whether people's agents have asked for replies since this was asked the last time."""
        url = f"{self._url.removesuffix('/v1')}/metrics"
        status, data, _ = await self._fetch("GET", url, self._key)
        if status != 200:
            raise RefusedError(f"{url} answered {status}", status, "")
        page = data.decode(errors="replace")
        counts = [metric_sum(page, name) or 0.0 for name in (_REQUESTS, _OF_EPISODES)]
        theirs, before = counts[0] - counts[1], self._of_people
        self._of_people = theirs
        return before is not None and theirs > before

    async def can_begin(self, opened: Opened, needs_s: float) -> bool:
        """Whether no run has begun an episode, and it has so many seconds left.

        One that a killed run left half is closed as aborted.
        """
        if opened.state is not EpisodeState.OPEN:
            return False
        found, _ = await self._ask("GET", f"{self._url}/episodes/{opened.episode}", self._key)
        left_s = found["opened_at"] + found["deadline_s"] - time.time()
        if not found["calls"] and left_s > needs_s:
            return True
        await self.give_up(opened, EpisodeStatus.ABORTED)
        return False

    async def calls(self, opened: Opened) -> int:
        """How many calls of the model the episode has begun."""
        found, _ = await self._ask("GET", f"{self._url}/episodes/{opened.episode}", self._key)
        return int(found["calls"])

    async def state(self, episode: str) -> EpisodeState | None:
        """The state of an episode; None: there is none of this name."""
        try:
            found, _ = await self._ask("GET", f"{self._url}/episodes/{episode}", self._key)
        except RefusedError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        return EpisodeState(found["state"])

    async def call(self, opened: Opened, messages: Sequence[Json]) -> Reply:
        """The model's reply to messages, as a step of the episode."""
        body = {"model": self.model, "messages": messages}
        url = f"{opened.base_url}/chat/completions"
        answer, headers = await self._post(url, opened.api_key, body)
        try:
            content: object = answer["choices"][0]["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RolloutError(f"the reply has no choices[0].message: {answer!r:.200}") from error
        return Reply(text_of(content), headers.get("x-nextstate-turn"))

    async def close(
        self,
        opened: Opened,
        status: EpisodeStatus,
        outcome: float | None = None,
        observation: str | None = None,
        rewards: Sequence[tuple[str | int, float]] = (),
    ) -> None:
        """Sends the process rewards, (turn or number of the step, value) each, then closes."""
        url = f"{self._url}/episodes/{opened.episode}"
        if rewards:
            body = [
                {
                    "kind": "process",
                    "name": "step",
                    "turn" if isinstance(step, str) else "index": step,
                    "value": value,
                }
                for step, value in rewards
            ]
            await self._post(f"{url}/rewards", self._key, body)
        end = {"status": status, "outcome": outcome, "observation": observation}
        await self._post(f"{url}/close", self._key, end)

    async def ended(self, opened: Opened, status: EpisodeStatus) -> Json:
        """How an episode ended that nobody plays any more, as `GET /v1/episodes/ID` tells it.

        If it is still open, it ends with this status: from then on, whoever might still play it is
        refused.
        """
        try:
            await self.close(opened, status)
        except RefusedError as error:
            if error.status != HTTPStatus.CONFLICT:  # it has ended otherwise
                raise
        url = f"{self._url}/episodes/{opened.episode}"
        return (await self._ask("GET", url, self._key))[0]

    async def give_up(self, opened: Opened, status: EpisodeStatus) -> None:
        """Closes an episode without an outcome, if the proxy answers; else its deadline ends it.

        It does so also if the caller is cancelled meanwhile.
        """

        async def close() -> None:
            with suppress(RolloutError, TimeoutError):
                async with asyncio.timeout(_GIVE_UP_S):
                    await self.close(opened, status)

        closing = asyncio.create_task(close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await closing
            raise

    async def _post(self, url: str, key: str, body: object) -> tuple[Json, Mapping[str, str]]:
        return await self._ask("POST", url, key, body)

    async def _ask(
        self, method: str, url: str, key: str, body: object = None
    ) -> tuple[Json, Mapping[str, str]]:
        status, data, headers = await self._fetch(method, url, key, body)
        found = json_object(data)
        if status == 200 and found is not None:
            return found, headers
        raw: object = (found or {}).get("error")
        told = cast(Json, raw) if isinstance(raw, dict) else {}
        message = f"the proxy answered {status}: {told.get('message', 'no message')!s:.500}"
        raise RefusedError(message, status, str(told.get("type", "")))

    async def _fetch(
        self, method: str, url: str, key: str, body: object = None
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """The status, body and headers of an answer."""
        sent = {"Authorization": f"Bearer {key}"}
        try:
            async with self._http.request(
                method, url, json=body, headers=sent, timeout=self._timeout, allow_redirects=False
            ) as answer:
                data = await answer.content.read(_MOST_ANSWER_BYTES)
                while len(data) < _MOST_ANSWER_BYTES and not answer.content.at_eof():
                    data += await answer.content.read(_MOST_ANSWER_BYTES - len(data))
                return answer.status, data, answer.headers
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            what = str(error) or type(error).__name__
            raise RolloutError(
                f"no answer from the proxy at {self._url}: {what}; is `nextstate up` running?"
            ) from error


def _opened(answer: Json) -> Opened:
    state = EpisodeState(answer["state"])
    return Opened(answer["episode"], state, answer["base_url"], answer["api_key"])
