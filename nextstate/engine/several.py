"""What one asks of several engines that serve the same model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nextstate.engine.client import EngineClient
from nextstate.errors import AnswerError, EngineError
from nextstate.records import Json


async def live_requests(engines: Sequence[EngineClient]) -> int:
    """Requests that run or wait in all engines that answer. Raises EngineError if none does."""
    found = await asyncio.gather(
        *(engine.live_requests() for engine in engines), return_exceptions=True
    )
    errors: list[BaseException] = []
    live = 0
    for one in found:
        if isinstance(one, BaseException):
            errors.append(one)
        else:
            live += one
    for error in errors:
        if len(errors) == len(found) or not isinstance(error, EngineError):
            raise error
    return live


class Renderers:
    """Renders prompts on any engine that answers: all have the same tokenizer."""

    def __init__(self, engines: Sequence[EngineClient]) -> None:
        self._engines = [*engines]

    async def tokenize(
        self, messages: list[Json], tools: list[Json] | None, extra: Json
    ) -> list[int]:
        """See `EngineClient.tokenize`. The one that answered last is asked first."""
        for engine in self._engines[:-1]:
            try:
                return await engine.tokenize(messages, tools, extra)
            except AnswerError:
                raise
            except EngineError:  # it is down: the next one is asked first from now on
                self._engines.append(self._engines.pop(0))
        return await self._engines[0].tokenize(messages, tools, extra)
