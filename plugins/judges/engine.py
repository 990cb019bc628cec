"""A judge behind an OpenAI-compatible chat server: by default the base model that vLLM serves."""

from __future__ import annotations

import re
from typing import Any, cast

import aiohttp

from nextstate.error_text import refusal, safe_text
from nextstate.errors import BusyError, JudgeError
from nextstate.hooks import Evidence, JudgeKind, JudgeSettings
from nextstate.records import Json, Vote
from plugins.judges.prompting import RESPONSE_FORMAT, question

_SCHEMA_WORDS = re.compile(r"response_format|json_schema|structured|grammar", re.I)


class _NoSchemasError(JudgeError):
    """The server does not know `response_format`."""


class EngineJudge:
    """The `engine` kind."""

    name = "engine"
    deterministic = False

    def __init__(self, settings: JudgeSettings) -> None:
        if not settings.model or not settings.base_url:
            raise JudgeError(
                "the engine judge needs a model and a server: set [judge] model and base_url"
            )
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None
        self._has_schemas = True

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """One vote; raises JudgeError when the server or its answer fails."""
        asked = question(evidence, order=seed)
        body: Json = {
            "model": self._settings.model,
            "messages": asked.messages,
            "max_tokens": self._settings.max_tokens,
            # No seed: vLLM on a CPU crashes when a seeded request meets a chunked prefill.
            "temperature": self._settings.temperature,
            **self._settings.extra,
        }
        answer = await self._answer(body)
        return asked.vote(completion_text(answer), used_tokens(answer))

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def _answer(self, body: Json) -> Any:
        """The answer; asked with a schema unless the server has refused one."""
        if self._has_schemas:
            try:
                return await self._ask({"response_format": RESPONSE_FORMAT, **body})
            except _NoSchemasError:
                self._has_schemas = False
        return await self._ask(body)

    async def _ask(self, body: Json) -> Any:
        url = f"{self._settings.base_url.rstrip('/')}/chat/completions"
        if self._session is None:
            key = self._settings.api_key
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s),
                connector=aiohttp.TCPConnector(limit=0),  # the stage limits the votes at one time
            )
        try:
            async with self._session.post(url, json=body, allow_redirects=False) as response:
                if response.status != 200:
                    said = await response.text(errors="replace")
                    raise _refusal(response.status, said, "response_format" in body)
                return await response.json(content_type=None)
        except TimeoutError as error:
            raise JudgeError(
                f"the judge's server did not answer within {self._settings.timeout_s} s"
            ) from error
        except aiohttp.ClientError as error:
            raise BusyError(f"the judge's server at {url} failed: {safe_text(error)}") from error
        except ValueError as error:
            raise JudgeError(f"the judge's server at {url} sent no JSON") from error


def create(settings: JudgeSettings) -> JudgeKind:
    """The plugin's entry."""
    return EngineJudge(settings)


def is_busy(status: int) -> bool:
    """Whether the same request may succeed a moment after this HTTP status."""
    return status in (408, 409, 425, 429) or status >= 500


def _refusal(status: int, said: str, with_schema: bool) -> JudgeError:
    text = f"the judge's server answered {refusal(status, said)}"
    if is_busy(status):
        return BusyError(text)
    about_schema = with_schema and status in (400, 422) and _SCHEMA_WORDS.search(said)
    return _NoSchemasError(text) if about_schema else JudgeError(text)


def completion_text(answer: Any) -> str:
    """The text of a chat completion. Raises JudgeError when there is none or it was cut off."""
    try:
        choice = cast(Json, answer["choices"][0])
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise JudgeError("the judge's server sent no chat completion") from error
    if choice.get("finish_reason") == "length":
        raise JudgeError("the judge's answer was cut off: raise [judge] max_tokens")
    if not isinstance(text, str):
        raise JudgeError("the judge's completion has no text")
    return text


def used_tokens(answer: Any) -> int:
    """The prompt and completion tokens that a chat completion reports; 0 if it reports none.

    >>> used_tokens({"usage": {"prompt_tokens": 40, "completion_tokens": 2}})
    42
    >>> used_tokens({"usage": None})
    0
    """
    usage = cast(Json, answer.get("usage") or {})
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    return sum(count for count in counts if isinstance(count, int))
