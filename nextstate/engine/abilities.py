"""Finds out what an engine can do. Any OpenAI server is relayed; not every one can train.

The requests also warm the engine up. The first generation with log-probs and the first with an
adapter compile or allocate: measured, they stalled every stream for 3.5 s.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path

from nextstate.engine.client import WARM_UP_ADAPTER, Abilities, EngineClient, first_choice
from nextstate.engine.defaults import EXPLICIT
from nextstate.engine.messages_behaviour import learn_messages_behaviour
from nextstate.errors import AnswerError, WrongEngineError
from nextstate.records import Json
from nextstate.wire import obj

log = logging.getLogger(__name__)

LOG_PROBS, TOKEN_IDS = "log-probs", "token ids (vLLM's return_token_ids)"
ADAPTERS = (
    "runtime adapters (vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, on this "
    "machine's state folder)"
)
SAMPLED_LOG_PROBS = "the sampler's log-probs (vLLM with --logprobs-mode processed_logprobs)"
_SAME_LOGPROB = 1e-3
_NOT_TOLD = (KeyError, IndexError, TypeError, ValueError, AttributeError)
_REFUSES_KEY = (401, 403)
_NOT_NOW = (408, 429, 503)
_NO_ROUTE = (404, 405, 501)
_NO_SERVER = "what answers at [engine] url is no OpenAI server"
_CHAT = "/v1/chat/completions"
_ONE_TOKEN: Json = {"max_tokens": 1, "return_token_ids": True}


async def look(
    engine: EngineClient, zero_adapter: Path | None = None, *, adapters: bool = False
) -> Abilities:
    """Asks for a token in each way that is used, and loads the adapter in `zero_adapter`.

    Without that folder nothing is loaded. A server that returns no token ids is asked about
    adapters only if `adapters` are needed, because only vLLM has that route.

    Raises WrongEngineError if a person has to change something before any request can be sent to
    the server, EngineError if it may serve later.
    """
    served = await _served(engine)
    try:
        return await _abilities(engine, zero_adapter, adapters)
    except AnswerError as error:
        _check_redirect(error)
        if not 400 <= error.status < 500 or error.status in _NOT_NOW:
            raise
        lacks = f"chat: it answered {error.status}"
        if engine.model not in served:  # some servers take any name
            lacks = f"the model {engine.model!r} ([engine] model or served_model_name)"
        return Abilities(False, False, False, (lacks,), served)


async def sampling_lacks(engine: EngineClient) -> tuple[str, ...]:
    """What is wrong with the sampling of an engine that tells log-probs, as a person reads it.

    Three questions for one token show it: at twice the temperature the sampler's log-probs differ,
    raw ones do not; and without any settings they are those of the defaults that we know. Only the
    likeliest token is compared, so the learner's own check is the stricter one.
    """
    plain = await _likeliest(engine, EXPLICIT)
    hot = await _likeliest(engine, {**EXPLICIT, "temperature": 2.0})
    if plain is None or hot is None:
        return ()
    if abs(plain - hot) < _SAME_LOGPROB and plain < -_SAME_LOGPROB:
        return (SAMPLED_LOG_PROBS,)
    by_default = await _likeliest(engine, {})
    as_known = await _likeliest(engine, {**EXPLICIT, **engine.sampling_defaults})
    if by_default is None or as_known is None or abs(by_default - as_known) < _SAME_LOGPROB:
        return ()
    return (f"the sampling defaults of its model, {engine.sampling_defaults or 'none'}",)


async def _likeliest(engine: EngineClient, settings: Json) -> float | None:
    """The log-prob of the likeliest first token after a small prompt."""
    asked: Json = {"model": engine.model, "prompt": "The", "max_tokens": 1, "logprobs": 1}
    with suppress(AnswerError, *_NOT_TOLD):
        choice = first_choice(await engine.post("/v1/completions", asked | settings))
        return max(map(float, choice["logprobs"]["top_logprobs"][0].values()))
    return None


async def _served(engine: EngineClient) -> tuple[str, ...]:
    """The models that a server lists. Raises WrongEngineError if it is no OpenAI server."""
    try:
        return tuple(model.id for model in await engine.models())
    except AnswerError as error:
        _check_key(error)
        if error.status in _NOT_NOW or (error.status >= 500 and error.status not in _NO_ROUTE):
            raise
        if error.status != 200 and await _chats(engine):
            return ()
        models = "lists no models" if error.status == 200 else f"is {error.status}"
        raise WrongEngineError(f"{_NO_SERVER}: /v1/models {models}") from error


async def _chats(engine: EngineClient) -> bool:
    """Whether a server that lists no models answers a chat with ours."""
    try:
        return bool(first_choice(await engine.post(_CHAT, _hello(engine) | {"max_tokens": 1})))
    except AnswerError as error:
        _check_key(error)
        _check_redirect(error)
        return False


async def _abilities(engine: EngineClient, zero_adapter: Path | None, needed: bool) -> Abilities:
    lacks: list[str] = []
    choice: Json = {}
    additions = True
    with suppress(AnswerError):  # chat decides
        choice = await engine.generate_once(engine.model)
    if not choice:
        lacks.append("/v1/completions (for the warm-up)")
        choice, additions = await _chat(engine)
    if not obj(choice.get("logprobs")):
        lacks.append(LOG_PROBS)
    tells_tokens = bool(choice.get("token_ids"))
    if not tells_tokens:
        lacks.append(TOKEN_IDS)
    else:
        engine.messages_behaviour = await learn_messages_behaviour(engine)
    adapters = (tells_tokens or needed) and await _takes_adapters(engine, zero_adapter)
    if not adapters:
        lacks.append(ADAPTERS)
    return Abilities(adapters, tells_tokens, additions, tuple(lacks))


async def _chat(engine: EngineClient) -> tuple[Json, bool]:
    """The choice of a chat reply, and whether the server accepts our additions to a request."""
    asked, additions = _hello(engine) | _ONE_TOKEN | {"logprobs": True}, True
    try:
        choice = first_choice(await engine.post(_CHAT, asked))
    except AnswerError as error:
        _check_key(error)
        if error.status in _NOT_NOW:
            raise
        asked, additions = _hello(engine) | {"max_tokens": 1}, False
        choice = first_choice(await engine.post(_CHAT, asked))
    if not choice:
        raise WrongEngineError(f"{_NO_SERVER}: {_CHAT} answers without choices")
    return choice, additions


def _hello(engine: EngineClient) -> Json:
    return {"model": engine.model, "messages": [{"role": "user", "content": "hi"}]}


def _check_redirect(error: AnswerError) -> None:
    if 300 <= error.status < 400:
        raise WrongEngineError(
            f"the engine answers with a redirect ({error.status}), which is not followed: [engine] "
            "url must be the address that it serves on"
        ) from error


def _check_key(error: AnswerError) -> None:
    if error.status in _REFUSES_KEY:
        raise WrongEngineError(
            f"the engine refuses our key ({error.status}): name the environment variable that "
            "holds its key in [engine] api_key_env"
        ) from error


async def _takes_adapters(engine: EngineClient, zero_adapter: Path | None) -> bool:
    if zero_adapter is None or not await asyncio.to_thread(zero_adapter.is_dir):
        return await engine.has_route("/v1/load_lora_adapter")
    try:
        await engine.load_adapter(WARM_UP_ADAPTER, str(zero_adapter))
    except AnswerError as error:
        if error.status in _NOT_NOW:
            raise
        log.warning("the engine takes no adapters: %s", error)
        return False
    await engine.generate_once(WARM_UP_ADAPTER)
    await engine.unload_adapter(WARM_UP_ADAPTER)
    return True
