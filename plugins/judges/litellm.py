"""A judge at any provider that litellm knows; the model's name is litellm's.

The import takes seconds, so it waits for the first vote. litellm may not fetch its price list, send
telemetry, follow a redirect or retry: the judge stage retries.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from functools import cache
from typing import Any

from nextstate.error_text import refusal, safe_text
from nextstate.errors import BusyError, JudgeError
from nextstate.hooks import Evidence, JudgeKind, JudgeSettings
from nextstate.records import Json, Vote
from plugins.judges.engine import completion_text, is_busy, redirected, used_tokens
from plugins.judges.prompting import RESPONSE_FORMAT, question


class _Redirected(Exception):
    """The provider answered with a redirect: where it leads, nobody allowed."""


class LitellmJudge:
    """The `litellm` kind."""

    name = "litellm"
    deterministic = False

    def __init__(self, settings: JudgeSettings) -> None:
        if not settings.model:
            raise JudgeError("the litellm judge needs a model: set [judge] model")
        self._settings = settings
        self._importing = asyncio.Lock()
        self._litellm: Any = None

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """One vote; raises JudgeError when the provider or its answer fails."""
        settings = self._settings
        litellm = await self._loaded()
        asked = question(evidence, order=seed)
        request: Json = {
            "model": settings.model,
            "messages": asked.messages,
            "api_base": settings.base_url or None,
            "api_key": settings.api_key,
            "timeout": settings.timeout_s,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "seed": seed,
            "drop_params": True,
            "num_retries": 0,
            "max_retries": 0,
            **settings.extra,
        }
        if litellm.supports_response_schema(model=settings.model):
            request.setdefault("response_format", RESPONSE_FORMAT)
        # litellm raises openai's errors, and bare ones for models that it does not know.
        openai = importlib.import_module("openai")
        try:
            answer = await litellm.acompletion(**request)
        except (openai.OpenAIError, ValueError, OSError) as error:
            if (why := _redirect(error)) is not None:
                raise JudgeError(f"litellm model {settings.model!r} failed: {why}") from None
            kind = BusyError if _may_pass(error, openai) else JudgeError
            raise kind(f"litellm model {settings.model!r} failed: {_described(error)}") from error
        completion = answer.model_dump()
        return asked.vote(completion_text(completion), *used_tokens(completion))

    async def close(self) -> None:
        """Closes litellm's connections."""
        if self._litellm is not None:
            await self._litellm.close_litellm_async_clients()

    async def _loaded(self) -> Any:
        async with self._importing:
            if self._litellm is None:
                self._litellm = await asyncio.to_thread(_import_quietly)
        return self._litellm


def _may_pass(error: Exception, openai: Any) -> bool:
    """Whether the same request may succeed a moment later."""
    status = getattr(error, "status_code", None)
    lost = isinstance(error, openai.APIConnectionError | OSError)
    return lost or (isinstance(status, int) and is_busy(status))


def _described(error: Exception) -> str:
    """Only the kind of a failure: litellm's own text may quote the request."""
    status = getattr(error, "status_code", None)
    return f"{type(error).__name__} {refusal(status, str(error))}" if status else safe_text(error)


def create(settings: JudgeSettings) -> JudgeKind:
    """The plugin's entry."""
    return LitellmJudge(settings)


def _redirect(error: BaseException | None) -> _Redirected | None:
    """The redirect behind an error of litellm's, if there is one."""
    while error is not None and not isinstance(error, _Redirected):
        error = error.__cause__ or error.__context__
    return error


@cache
def _follow_no_redirect() -> None:
    """Makes httpx raise `_Redirected`: litellm's clients follow, and have no option against it."""
    httpx: Any = importlib.import_module("httpx")
    send, send_async = httpx.Client.send, httpx.AsyncClient.send

    def once(client: Any, request: Any, **more: Any) -> Any:
        response = send(client, request, **more | {"follow_redirects": False})
        if response.has_redirect_location:
            response.close()
            raise _Redirected(redirected(response.status_code))
        return response

    async def once_async(client: Any, request: Any, **more: Any) -> Any:
        response = await send_async(client, request, **more | {"follow_redirects": False})
        if response.has_redirect_location:
            await response.aclose()
            raise _Redirected(redirected(response.status_code))
        return response

    httpx.Client.send, httpx.AsyncClient.send = once, once_async


def _import_quietly() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else the import goes to the internet
    _follow_no_redirect()
    litellm: Any = importlib.import_module("litellm")
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    for name in ("LiteLLM", "LiteLLM Proxy", "LiteLLM Router"):  # a line a vote; errors we tell
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return litellm
