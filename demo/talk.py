"""The personas' conversations: several at once, over HTTP, with an OpenAI client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import openai
from openai.types.chat import ChatCompletionMessageParam

from demo.personas import Kind
from demo.world import HeldOut, World

log = logging.getLogger(__name__)

MAX_TOKENS = 96
READING_S = 0.4
"""Mean time that a persona reads a reply before it writes."""
VERSION_HEADER = "x-nextstate-version"
_ANSWER_TIMEOUT_S = 180.0
"""A real model on two cores that also train answers 16 at once in a minute."""


def client_for(base_url: str) -> openai.AsyncOpenAI:
    """An unmodified OpenAI client that never retries: every failure counts."""
    return openai.AsyncOpenAI(
        base_url=base_url, api_key="local", max_retries=0, timeout=_ANSWER_TIMEOUT_S
    )


@dataclass(slots=True)
class Talked:
    """The counts of the conversations so far."""

    replies: int = 0
    failed: int = 0
    """Requests that did not end with a whole reply."""
    reactions: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    versions: set[int] = field(default_factory=set[int])
    """Versions that have answered."""


class Talk:
    """Conversations that run until they are cancelled."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        model: str,
        world: World,
        parallel: int,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self.talked = Talked()
        self._client = client
        self._model = model
        self._world = world
        self._parallel = parallel
        self._max_tokens = max_tokens
        self._open = asyncio.Event()
        self._open.set()

    def pause(self) -> None:
        """Sends no further message; pending replies still arrive."""
        self._open.clear()

    def resume(self) -> None:
        """Continues after a pause."""
        self._open.set()

    async def run(self) -> None:
        """Talks until cancelled."""
        async with asyncio.TaskGroup() as workers:
            for number in range(self._parallel):
                workers.create_task(self._talk(number))

    async def _talk(self, number: int) -> None:
        rng = Random(number)
        for conversation in self._world.conversations(number):
            message = conversation.open()
            history: list[ChatCompletionMessageParam] = []
            while message is not None:
                await self._open.wait()
                if message.kind is not None:
                    self.talked.reactions[message.kind] += 1
                await asyncio.sleep(READING_S * rng.uniform(0.5, 1.5))
                history.append({"role": "user", "content": message.text})
                reply = await self._reply(history, 1 if conversation.is_over else self._max_tokens)
                if reply is None or conversation.is_over:
                    break
                history.append({"role": "assistant", "content": reply})
                message = conversation.answer(reply)

    async def _reply(
        self, history: list[ChatCompletionMessageParam], max_tokens: int
    ) -> str | None:
        try:
            raw = await self._client.chat.completions.with_raw_response.create(
                model=self._model, messages=history, max_tokens=max_tokens, stream=True
            )
            parts: list[str] = []
            finished = False
            async for chunk in raw.parse():
                for choice in chunk.choices:
                    parts.append(choice.delta.content or "")
                    finished = finished or choice.finish_reason is not None
        except openai.OpenAIError as error:
            self.talked.failed += 1
            log.warning("a request failed: %s", error)
            return None
        if not finished:
            self.talked.failed += 1
            log.warning("a reply was cut")
            return None
        self.talked.replies += 1
        self.talked.versions.add(int(raw.headers[VERSION_HEADER]))
        return "".join(parts)


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out question's reply and the version that gave it; None for a failed request."""

    task: HeldOut
    reply: str | None
    version: int


async def ask_all(
    client: openai.AsyncOpenAI,
    model: str,
    tasks: Sequence[HeldOut],
    parallel: int,
    max_tokens: int = MAX_TOKENS,
) -> list[Answer]:
    """Asks every task once in a fresh conversation, `parallel` at a time."""
    places = asyncio.Semaphore(parallel)

    async def ask(task: HeldOut) -> Answer:
        async with places:
            try:
                raw = await client.chat.completions.with_raw_response.create(
                    model=model,
                    messages=[{"role": "user", "content": task.question}],
                    max_tokens=max_tokens,
                )
            except openai.OpenAIError as error:
                log.warning("a request failed: %s", error)
                return Answer(task, None, -1)
        reply = raw.parse().choices[0].message.content or ""
        return Answer(task, reply, int(raw.headers[VERSION_HEADER]))

    return await asyncio.gather(*(ask(task) for task in tasks))
