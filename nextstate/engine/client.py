"""Drives vLLM over HTTP: health, tokenizing, loading adapters, publishing a version.

Each version's adapter has a name and a path that no earlier version had. Loading under an old name
can reuse the prefix cache of the old weights (vLLM issue 42125). A new adapter has once answered
for another one (issue 47724), so a probe checks which one answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import aiohttp
from yarl import URL

from nextstate.config import server_address
from nextstate.engine.adapter_files import (
    prepare_served,
    remove_served,
    served_folder,
    verify_adapter,
)
from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.engine.whole import bring_up
from nextstate.error_text import refusal, safe_text
from nextstate.errors import AdapterError, AnswerError, EngineError, WrongEngineError
from nextstate.file_descriptors import out_of_descriptors
from nextstate.prometheus import metric_sum
from nextstate.records import Decisions, Json, PolicyVersion
from nextstate.store import Store
from nextstate.store.ledger import SOMEBODY
from nextstate.wire import json_object, objects, write_json

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 60.0
_LOADS = 3
"""How often loading is tried: a version that returns to service may be unloaded at that moment."""
GLANCE_TIMEOUT_S = 5.0
"""For questions that a server answers at once unless it is overloaded."""
_LIVE_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting")
SLOW_S = 15.0
"""How much longer than the first of several engines another one may take to load a version."""
WARM_UP_ADAPTER = "nextstate-warm-up"
_NO_ROUTE = (404, 405, 501)
_IDLE_S = 4.0
"""uvicorn, under vLLM, closes connections that are idle for 5 s."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of the engine's model list."""

    id: str
    parent: str | None
    """The base model's name when this is an adapter."""
    root: str | None
    """The folder or hub name that it was loaded from."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an engine can do beyond answering chat."""

    adapters: bool = True
    """Loads adapters at run time."""
    tells_tokens: bool = True
    """Returns token ids when asked: then it is vLLM and accepts all our additions."""
    additions: bool = True
    """Accepts requests with the fields that we add."""
    lacks: tuple[str, ...] = ()
    """What learning needs and the engine lacks, as a person reads it."""
    served: tuple[str, ...] = ()
    """The models that it lists, if it does not answer with ours."""


def first_choice(reply: Json) -> Json:
    """The first choice of a reply; {} if it has none."""
    choices = objects(reply.get("choices"))
    return choices[0] if choices else {}


class EngineClient:
    """A connection to one vLLM server. Every method raises EngineError when the server fails."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> None:
        self.address = server_address(url)
        """With the user and password that it may hold."""
        shown = URL(self.address)
        self.url = str(shown.with_user(None)) if shown.user else self.address
        """The same without them, as logs may show it."""
        self.name = name or f"{shown.host}:{shown.port}{shown.path.rstrip('/')}"
        """What people see of it: where it is, or what the supervisor calls it."""
        self.model = model
        """The name under which the base model answers."""
        self.sampling_defaults: Json = dict(sampling_defaults or {})
        """What it uses for the sampling settings that a request leaves out, as far as is known."""
        self.fingerprint: str | None = None
        """The fingerprint in the server's replies, once one has been seen."""
        self.max_model_len: int | None = None
        """Tokens of its longest context, once its models have been listed."""
        self.abilities = Abilities()
        """Once the server has been looked at."""
        self.messages_behaviour = MessagesBehaviour()
        """What its /v1/messages does, once the server has been looked at."""
        self.trouble = ""
        """Why it was not healthy when that was last so."""
        self._api_key = api_key
        headers: dict[str, str] = {}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        elif shown.user:
            login = f"{shown.user}:{shown.password or ''}".encode()
            headers["Authorization"] = f"Basic {b64encode(login).decode()}"
        self._session = aiohttp.ClientSession(
            headers=headers, connector=aiohttp.TCPConnector(keepalive_timeout=_IDLE_S)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()

    def twin(self, url: str, model: str, name: str = "") -> EngineClient:
        """A client of another engine that has the same key and defaults and serves `model`."""
        return EngineClient(url, model, self._api_key, self.sampling_defaults, name)

    async def healthy(self, timeout_s: float = GLANCE_TIMEOUT_S) -> bool:
        """Whether the server says that it can serve now.

        Raises EngineError if it cannot be asked, for example without free file descriptors, and
        WrongEngineError if TLS fails.
        """
        status = await self._status("/health", timeout_s)
        if status in _NO_ROUTE:
            status = await self._status("/v1/models", timeout_s)
        return status is not None and status < 500  # even a refusal shows that it serves

    async def has_route(self, path: str) -> bool:
        """Whether the server has a route that does not take GET."""
        return await self._status(path, GLANCE_TIMEOUT_S) == 405

    async def _status(self, path: str, timeout_s: float) -> int | None:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.get(
                self.url + path, timeout=timeout, allow_redirects=False
            ) as answer:
                self.trouble = f"{path} answered {answer.status}"
                return answer.status
        except aiohttp.ClientSSLError as error:
            raise WrongEngineError(
                f"its TLS is missing or not trusted: {error.__cause__}; is it http://?"
            ) from error
        except aiohttp.ClientResponseError as error:
            raise WrongEngineError("what answers does not speak HTTP; is it https://?") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if out_of_descriptors(error):
                raise EngineError(f"{self.url}{path} cannot be asked: {error}") from error
            self.trouble = str(error) or type(error).__name__
            return None

    async def models(self) -> list[ServedModel]:
        """The base model and every adapter that is loaded."""
        answer = await self._call("GET", "/v1/models", None)
        if not isinstance(answer.get("data"), list):
            raise AnswerError(f"{self.url}/v1/models answered without a list of models", 200)
        try:
            cards = objects(answer["data"])
            lengths = [card.get("max_model_len") for card in cards if card["id"] == self.model]
            self.max_model_len = next((n for n in lengths if isinstance(n, int)), None)
            return [ServedModel(card["id"], card.get("parent"), card.get("root")) for card in cards]
        except KeyError as error:
            raise AnswerError(f"{self.url}/v1/models lists models without {error}", 200) from error

    async def live_requests(self) -> int:
        """Requests that run or wait in the engine now, from agents, the judge and probes."""
        text = await self._request("GET", "/metrics", None, GLANCE_TIMEOUT_S)
        try:
            found = [metric_sum(text.decode(), name) for name in _LIVE_GAUGES]
            counts = [int(count) for count in found if count is not None]
        except (UnicodeDecodeError, ValueError, OverflowError) as error:
            raise EngineError(f"{self.url}/metrics cannot be read: {error}") from error
        if len(counts) != len(_LIVE_GAUGES):
            raise EngineError(
                f"{self.url}/metrics lacks {' or '.join(_LIVE_GAUGES)}: start vLLM without "
                '--disable-log-stats, or set [learner] schedule = "always" or a time'
            )
        return sum(counts)

    async def has_model(self, name: str) -> bool:
        """Whether the base model or an adapter of that name is loaded."""
        return any(model.id == name for model in await self.models())

    async def holds(self, name: str, path: str) -> bool:
        """Whether the adapter in folder `path` is loaded under `name`.

        An adapter from another folder under that name is not ours and is unloaded.
        """
        path = await asyncio.to_thread(served_folder, path)
        found = [model for model in await self.models() if model.id == name]
        if not found or found[0].root == path:
            return bool(found)
        log.error(
            "adapter %s is loaded from %r, not from ours, %r: it is unloaded",
            name,
            found[0].root,
            path,
        )
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        return False

    async def load_adapter(self, name: str, path: str) -> None:
        """Loads the adapter in folder `path` under `name`. Does nothing if it is loaded already."""
        served = await asyncio.to_thread(prepare_served, path)
        body = {"lora_name": name, "lora_path": served}
        try:
            await self._call("POST", "/v1/load_lora_adapter", body)
        except EngineError:
            # vLLM refuses one that is loaded. Requests that miss it at the same time all come here.
            if not await self.holds(name, path):
                raise

    async def unload_adapter(self, name: str) -> None:
        """Unloads the adapter `name`, if it is loaded."""
        roots = [model.root for model in await self.models() if model.id == name]
        if not roots:
            return
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        await asyncio.to_thread(remove_served, roots[0] or "")

    async def probe(self, name: str) -> None:
        """Generates one token with `name`, and checks that `name` answered. Also warms it up."""
        body = {"model": name, "prompt": [0], "max_tokens": 1, "temperature": 0}
        answer = await self._call("POST", "/v1/completions", body)
        if answer.get("model") != name:
            raise EngineError(f"asked vLLM for {name!r}, and {answer.get('model')!r} answered")

    async def generate_once(self, name: str) -> Json:
        """The choice of one token, generated as for turns. The first time is slow."""
        body = {"model": name, "prompt": [0], "max_tokens": 1}
        answer = await self.post(
            "/v1/completions", body | {"logprobs": 1, "return_token_ids": True}
        )
        self.fingerprint = answer.get("system_fingerprint")
        return first_choice(answer)

    async def post(self, path: str, body: Json) -> Json:
        """The JSON object that a route answers with; {} for any other answer."""
        return await self._call("POST", path, body)

    async def tokenize(
        self, messages: list[Json], tools: list[Json] | None, extra: Json
    ) -> list[int]:
        """The token ids of the prompt that vLLM renders from `messages` and `tools`.

        `extra` holds further fields of a chat request that change the rendering, such as
        `chat_template_kwargs`.
        """
        body: Json = {
            "model": self.model,
            "messages": messages,
            "add_generation_prompt": True,
            **extra,
        }
        if tools:
            body["tools"] = tools
        answer = await self._call("POST", "/tokenize", body)
        tokens = answer.get("tokens")
        if not isinstance(tokens, list):
            raise EngineError(f"{self.url}/tokenize answered without tokens")
        return cast("list[int]", tokens)

    async def count_tokens(self, messages: list[Json], extra: Json) -> int:
        """How many tokens /v1/messages makes of a request's messages and its `extra` fields."""
        body = {"model": self.model, "messages": messages, **extra}
        answer = await self._call("POST", "/v1/messages/count_tokens", body)
        counted = answer.get("input_tokens")
        if not isinstance(counted, int):
            raise EngineError(f"{self.url}/v1/messages/count_tokens counted no tokens")
        return counted

    async def _call(self, method: str, path: str, body: Json | None) -> Json:
        text = await self._request(method, path, body, PROBE_TIMEOUT_S)
        return json_object(text) or {}  # vLLM's adapter routes answer with plain text

    async def _request(self, method: str, path: str, body: Json | None, timeout_s: float) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        data = None if body is None else write_json(body)
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.request(
                method,
                self.url + path,
                data=data,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as answer:
                text = await answer.read()
                if answer.status != 200:
                    said = text.decode(errors="replace")
                    why = f"{answer.status}: {' '.join(said[:300].split())}"
                    if body is not None and "messages" in body:
                        why = refusal(answer.status, said)  # it may quote the conversation
                    raise AnswerError(f"{method} {self.url}{path} answered {why}", answer.status)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineError(f"{method} {self.url}{path} failed: {safe_text(error)}") from error
        return text


async def ensure_loaded(engine: EngineClient, version: PolicyVersion) -> None:
    """Loads the version's adapter if it is missing and probes it; the base needs neither.

    Raises AdapterError, before the engine has seen the file, if it is not the one registered.
    """
    name, path = version.adapter_name, version.path
    if name is None or version.sha256 is None:
        return
    if version.is_whole_model:
        raise EngineError(
            f"version {version.number} is a whole model, and this engine loads adapters: set "
            "[learner] lora_rank = 0, or return to the base with `nextstate rollback 0`"
        )
    if path is None:
        raise AdapterError(f"the adapter of version {version.number} was deleted to make room")
    for left in reversed(range(_LOADS)):
        if not await engine.holds(name, path):
            await asyncio.to_thread(verify_adapter, Path(path), version.sha256)
            await engine.load_adapter(name, path)
        try:
            return await engine.probe(name)
        except EngineError:
            if not left or await engine.holds(name, path):
                raise


def zero_adapter_path(state_dir: Path, model_path: str, rank: int) -> Path:
    """The folder of a model's zero adapter."""
    model = hashlib.sha256(model_path.encode()).hexdigest()[:12]
    return state_dir / "warm-up" / f"{model}-rank{rank}"


async def load_everywhere(
    engines: Sequence[EngineClient], version: PolicyVersion, state_dir: Path
) -> None:
    """`ensure_loaded` in every engine that is up; a whole model gets an engine of its own.

    One that is down, or that takes much longer than the first one, is left out: the proxy sends it
    nothing of the version until it has loaded it. Raises EngineError if none has, AdapterError as
    `ensure_loaded` does.
    """
    if version.is_whole_model:
        return await bring_up(state_dir, engines[0], version)
    if len(engines) == 1:
        return await ensure_loaded(engines[0], version)
    loads = {asyncio.create_task(ensure_loaded(one, version)): one for one in engines}
    try:
        waiting: set[asyncio.Task[None]] = {*loads}
        while waiting and not any(load.done() and load.exception() is None for load in loads):
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if waiting:
            await asyncio.wait(waiting, timeout=SLOW_S)
    finally:
        for load in loads:
            load.cancel()
    found = await asyncio.gather(*loads, return_exceptions=True)
    errors = [error for error in found if error is not None]
    for error in errors:
        if not isinstance(error, EngineError | asyncio.CancelledError):
            raise error
    if len(errors) == len(found):
        raise errors[0]
    for one, error in zip(loads.values(), found, strict=True):
        if error is not None:
            why = error if isinstance(error, EngineError) else f"it took more than {SLOW_S:g} s"
            log.warning("version=%d %s is left out for now: %s", version.number, one.url, why)


async def publish(
    store: Store, engines: Sequence[EngineClient], version: PolicyVersion, by: str = SOMEBODY
) -> None:
    """Puts a version into service for a person: adapter on disk → loaded → probed → serving.

    Running requests keep their version. The proxy unloads it when they have ended. Raises
    ConflictError if a person has chosen another one meanwhile, which stays.
    """
    decided = (await asyncio.to_thread(store.versions.decisions, version.lineage)).choices
    await load_everywhere(engines, version, store.dir)
    ours = version.lineage, version.number
    if not await asyncio.to_thread(store.versions.set_serving, *ours, by, decided):
        raise AdapterError(
            f"the adapter of version {version.number} was deleted meanwhile: choose another one of "
            "`nextstate versions`"
        )


async def publish_candidate(
    store: Store, engines: Sequence[EngineClient], version: PolicyVersion
) -> None:
    """Puts a version that training made into service, in its parent's place only.

    If another version was put into service meanwhile, that one stays.
    """
    await load_everywhere(engines, version, store.dir)
    if await asyncio.to_thread(store.versions.serve_candidate, version):
        return
    log.warning("version=%d lineage=%s was overtaken", version.number, version.lineage)
    if version.adapter_name is None or version.is_whole_model:  # whose engine ends by itself
        return
    for engine in engines:
        try:
            await engine.unload_adapter(version.adapter_name)
        except EngineError as error:
            if len(engines) == 1:
                raise
            log.info("%s keeps an adapter until it is looked at again: %s", engine.url, error)


async def withdraw(
    store: Store,
    engines: Sequence[EngineClient],
    rejected: PolicyVersion,
    decisions: Decisions | None = None,
) -> PolicyVersion:
    """Takes a version out of service, for its `reason`, by the same steps as a rollback.

    Its nearest ancestor with an intact adapter takes its place, unless a person has chosen a
    version after `decisions`, which are those until now if None. Returns the version that serves.
    """
    if decisions is None:
        decisions = await asyncio.to_thread(store.versions.decisions, rejected.lineage)
    for version in await asyncio.to_thread(store.versions.ancestors, rejected):
        try:
            await load_everywhere(engines, version, store.dir)
        except AdapterError as error:
            log.error(
                "version=%d lineage=%s cannot be used: %s", version.number, version.lineage, error
            )
            continue
        replace = store.versions.replace_serving
        await asyncio.to_thread(replace, rejected, version.number, decisions.choices)
        break
    return await asyncio.to_thread(store.versions.serving, rejected.lineage)
