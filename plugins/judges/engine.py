"""A judge behind an OpenAI-compatible chat server: by default the base model that vLLM serves.

A vote is one word, read from its log-probs (plugins/judges/one_word.py). The model's words are
those of a trained judge if there is one. A hint has to be written: the base model is asked for one
where the vote is -1. A server that tells no log-probs, or does not know our fields, is asked for
written votes from then on.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import aiohttp

from nextstate.error_text import refusal, safe_text
from nextstate.errors import BusyError, JudgeError
from nextstate.hooks import Calibration, Evidence, JudgeKind, JudgeSettings, TrainedJudge
from nextstate.records import Json, Vote
from plugins.judges.one_word import (
    OBVIOUS,
    OPTIONS,
    ORDERS,
    SURE,
    calibrated_on,
    probabilities,
    word_logprobs,
    word_question,
)
from plugins.judges.prompting import RESPONSE_FORMAT, question

log = logging.getLogger(__name__)

_SCHEMA_WORDS = re.compile(r"response_format|json_schema|structured|grammar", re.I)
_OPTION_WORDS = re.compile(
    r"log_?prob|structured|choice|chat_template|unrecogni[sz]ed|unknown|unexpected|extra|"
    r"not (?:supported|permitted|allowed)|unsupported",
    re.I,
)
_Told = tuple[list[dict[int, float]], int, int]
"""Log-probs by order, all tokens, and those that were written."""


class _NoSchemasError(JudgeError):
    """The server does not know `response_format`."""


class _NoWordsError(JudgeError):
    """The server tells no log-probs of a word."""


class _NoModelError(JudgeError):
    """The server does not know the model."""


class _UnreachableError(BusyError):
    """The server is down."""


class EngineJudge:
    """The `engine` kind."""

    name = "engine"

    def __init__(self, settings: JudgeSettings) -> None:
        if not settings.model or not settings.base_url:
            raise JudgeError(
                "the engine judge needs a model and a server: set [judge] model and base_url"
            )
        self._settings = settings
        self._urls = [
            f"{url.rstrip('/')}/chat/completions"
            for url in (settings.base_url, *settings.further_urls)
        ]
        """Those of all servers, the next one first."""
        self._session: aiohttp.ClientSession | None = None
        self._has_schemas = True
        self._has_words = True
        self._looking = asyncio.Lock()
        self._understanding: Calibration | None = None
        """Of the base model, once its answers to the obvious questions were seen."""

    @property
    def deterministic(self) -> bool:
        """True while votes are read from log-probs: the next one would be the same."""
        return self._has_words

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """One vote; raises JudgeError when the server or its answer fails."""
        if self._has_words:
            try:
                return await self._vote_by_word(evidence, seed)
            except _NoWordsError as error:
                self._has_words = False
                log.warning("votes are written out from now on: %s", error)
        return await self.written_vote(evidence, seed)

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def _vote_by_word(self, evidence: Evidence, seed: int) -> Vote:
        trained = self._settings.trained()
        if trained is None:
            calibration, tokens, written = await self._understood()
            told = await self._words(evidence, self._settings.model)
        else:
            calibration, tokens, written = trained.calibration, 0, 0
            told = await self._trained_words(evidence, trained)
        shares = probabilities(told[0], calibration)
        score = max(shares, key=shares.__getitem__)
        sure = shares[score] >= SURE
        name = self.name if trained is None else trained.name
        tokens, written = tokens + told[1], written + told[2]
        vote = Vote(score if sure else 0, None, sure, tokens, written, name)
        return await self._with_hint(vote, evidence, seed) if vote.score < 0 else vote

    async def _with_hint(self, vote: Vote, evidence: Evidence, seed: int) -> Vote:
        """The vote with a hint, if one is wanted and the base model writes one for this score."""
        if not self._settings.hints:
            return vote
        try:
            said = await self.written_vote(evidence, seed)
        except BusyError:
            raise
        except JudgeError:  # a hint may be missing
            return vote
        hint = said.hint if said.score == vote.score else None
        tokens, written = vote.tokens + said.tokens, vote.written + said.written
        return replace(vote, hint=hint, tokens=tokens, written=written)

    async def _understood(self) -> tuple[Calibration, int, int]:
        """What the base model makes of the obvious questions, and the tokens that it took now."""
        async with self._looking:
            if self._understanding is not None:
                return self._understanding, 0, 0
            told = [await self._words(evidence, self._settings.model) for evidence, _ in OBVIOUS]
            answers = [(t[0], score) for t, (_, score) in zip(told, OBVIOUS, strict=True)]
            self._understanding = calibrated_on(answers, balanced=True)
            return self._understanding, sum(t[1] for t in told), sum(t[2] for t in told)

    async def _trained_words(self, evidence: Evidence, trained: TrainedJudge) -> _Told:
        try:
            return await self._words(evidence, trained.model)
        except _NoModelError:  # it was never loaded, or the engine is a new one
            await trained.load()
            return await self._words(evidence, trained.model)

    async def _words(self, evidence: Evidence, model: str) -> _Told:
        asked = [
            {**OPTIONS, "model": model, "messages": word_question(evidence, order)}
            for order in ORDERS
        ]
        answers = await asyncio.gather(
            *(self._ask({**body, **self._settings.extra}) for body in asked)
        )
        found = [word_logprobs(answer) for answer in answers]
        costs = [used_tokens(answer) for answer in answers]
        told = [logprobs for logprobs in found if logprobs is not None]
        if len(told) < len(found):
            raise _NoWordsError("the judge's server tells no log-probs")
        return told, sum(tokens for tokens, _ in costs), sum(written for _, written in costs)

    async def written_vote(self, evidence: Evidence, seed: int) -> Vote:
        """A vote that the base model writes out, with a hint. Raises JudgeError."""
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
        return asked.vote(completion_text(answer), *used_tokens(answer))

    async def _answer(self, body: Json) -> Any:
        """The answer; asked with a schema unless the server has refused one."""
        if self._has_schemas:
            try:
                return await self._ask({"response_format": RESPONSE_FORMAT, **body})
            except _NoSchemasError:
                self._has_schemas = False
        return await self._ask(body)

    async def _ask(self, body: Json) -> Any:
        """The answer of the server whose turn it is, or of another one if it cannot be reached."""
        for left in reversed(range(len(self._urls))):
            url = self._urls[0]
            if len(self._urls) > 1:
                self._urls.append(self._urls.pop(0))
            try:
                return await self._ask_at(url, body)
            except _UnreachableError:
                if not left:
                    raise
        raise AssertionError("there is a server")

    async def _ask_at(self, url: str, body: Json) -> Any:
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
                    raise _refusal(response.status, said, body)
                return await response.json(content_type=None)
        except TimeoutError as error:
            raise JudgeError(
                f"the judge's server did not answer within {self._settings.timeout_s} s"
            ) from error
        except aiohttp.ClientError as error:
            kind = BusyError
            if isinstance(error, aiohttp.ClientConnectionError):
                kind = _UnreachableError
            raise kind(f"the judge's server at {url} failed: {safe_text(error)}") from error
        except ValueError as error:
            raise JudgeError(f"the judge's server at {url} sent no JSON") from error


def create(settings: JudgeSettings) -> JudgeKind:
    """The plugin's entry."""
    return EngineJudge(settings)


def is_busy(status: int) -> bool:
    """Whether the same request may succeed a moment after this HTTP status."""
    return status in (408, 409, 425, 429) or status >= 500


def redirected(status: int) -> str:
    """What is wrong with a server that answers with a redirect."""
    return (
        f"its server answered with a redirect ({status}), which is not followed: set [judge] "
        "base_url to the address that it serves on"
    )


def _refusal(status: int, said: str, body: Mapping[str, Any]) -> JudgeError:
    if 300 <= status < 400:
        return JudgeError(f"the engine judge failed: {redirected(status)}")
    text = f"the judge's server answered {refusal(status, said)}"
    if is_busy(status):
        return BusyError(text)
    if status == 404:
        return _NoModelError(text)
    if status in (400, 422):
        if "response_format" in body and _SCHEMA_WORDS.search(said):
            return _NoSchemasError(text)
        if "top_logprobs" in body and _OPTION_WORDS.search(said):
            return _NoWordsError(text)
    return JudgeError(text)


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


def used_tokens(answer: Any) -> tuple[int, int]:
    """The tokens that a chat completion reports: all, and the completion's; 0 if it tells none.

    >>> used_tokens({"usage": {"prompt_tokens": 40, "completion_tokens": 2}})
    (42, 2)
    >>> used_tokens({"usage": None})
    (0, 0)
    """
    usage = cast(Json, answer.get("usage") or {})
    read, written = (
        count if isinstance(count := usage.get(name), int) else 0
        for name in ("prompt_tokens", "completion_tokens")
    )
    return read + written, written
