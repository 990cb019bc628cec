"""Driving vLLM over HTTP: health, tokenizing, adapters in and out, and publishing a version.

An adapter is loaded under a name and a path that no earlier version had. Loading in place under an
old name can reuse the prefix cache of the weights it replaces (vLLM issue 42125), and a new adapter
has once answered for another (issue 47724): hence new names, and a probe that checks who answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import orjson

from nextstate.adapters import verify_adapter
from nextstate.errors import AdapterError, EngineError
from nextstate.prometheus import gauge_sum
from nextstate.records import Json, PolicyVersion
from nextstate.store import Store
from nextstate.wire import json_object, objects

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 60.0
_LOADS = 3
"""So often a version is loaded: one that comes back may just have drained, and is unloaded then."""
GLANCE_TIMEOUT_S = 5.0
"""For what a server answers at once unless it is overloaded."""
_LIVE_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting")
WARM_UP_ADAPTER = "nextstate-warm-up"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of the engine's model list."""

    id: str
    parent: str | None
    """The base model's name when this is an adapter."""
    root: str | None
    """The folder or hub name that it was loaded from."""


class EngineClient:
    """A connection to one vLLM server. Every method raises EngineError when the server fails."""

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.model = model
        """The name under which the base model answers."""
        self.fingerprint: str | None = None
        """What the server calls itself in its replies, once one has been seen."""
        self.max_model_len: int | None = None
        """Tokens of its longest context, once its models have been listed."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session = aiohttp.ClientSession(headers=headers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()

    async def healthy(self, timeout_s: float = GLANCE_TIMEOUT_S) -> bool:
        """Whether the server says that it can serve now."""
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.get(f"{self.url}/health", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def models(self) -> list[ServedModel]:
        """The base model and every adapter that is loaded."""
        answer = await self._call("GET", "/v1/models", None)
        try:
            cards = objects(answer["data"])
            lengths = [card.get("max_model_len") for card in cards if card["id"] == self.model]
            self.max_model_len = next((n for n in lengths if isinstance(n, int)), None)
            return [ServedModel(card["id"], card.get("parent"), card.get("root")) for card in cards]
        except KeyError as error:
            raise EngineError(f"{self.url}/v1/models lists models without {error}") from error

    async def live_requests(self) -> int:
        """Requests that run or wait now, whoever sent them: an agent, the judge, a probe."""
        text = await self._request("GET", "/metrics", None, GLANCE_TIMEOUT_S)
        try:
            found = [gauge_sum(text.decode(), name) for name in _LIVE_GAUGES]
            counts = [int(count) for count in found if count is not None]
        except (UnicodeDecodeError, ValueError, OverflowError) as error:
            raise EngineError(f"{self.url}/metrics cannot be read: {error}") from error
        if len(counts) != len(_LIVE_GAUGES):
            raise EngineError(
                f"{self.url}/metrics lacks {' or '.join(_LIVE_GAUGES)}: start vLLM without "
                '--disable-log-stats, or set [learner] schedule = "always" or "window"'
            )
        return sum(counts)

    async def has_model(self, name: str) -> bool:
        """Whether the base model or an adapter of that name is loaded."""
        return any(model.id == name for model in await self.models())

    async def load_adapter(self, name: str, path: str) -> None:
        """Loads the adapter in folder `path` under `name`; an adapter that is there stays."""
        body = {"lora_name": name, "lora_path": path}
        try:
            await self._call("POST", "/v1/load_lora_adapter", body)
        except EngineError:
            # vLLM refuses one that is there; requests that miss it at once all come here.
            if not await self.has_model(name):
                raise

    async def unload_adapter(self, name: str) -> None:
        """Unloads the adapter `name`; one that is not there is no error."""
        if not await self.has_model(name):
            return
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def probe(self, name: str) -> None:
        """Generates one token with `name`, which warms it, and checks that it was `name`."""
        body = {"model": name, "prompt": [0], "max_tokens": 1, "temperature": 0}
        answer = await self._call("POST", "/v1/completions", body)
        if answer.get("model") != name:
            raise EngineError(f"asked vLLM for {name!r}, and {answer.get('model')!r} answered")

    async def generate_once(self, name: str) -> None:
        """Generates one token with log-probs, as turns are served; the first time is slow."""
        body = {"model": name, "prompt": [0], "max_tokens": 1, "logprobs": 1}
        answer = await self._call("POST", "/v1/completions", body)
        self.fingerprint = answer.get("system_fingerprint")

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
        return list(answer["tokens"])

    async def _call(self, method: str, path: str, body: Json | None) -> Json:
        text = await self._request(method, path, body, PROBE_TIMEOUT_S)
        return json_object(text) or {}  # vLLM's adapter routes answer in plain words

    async def _request(self, method: str, path: str, body: Json | None, timeout_s: float) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        data = None if body is None else orjson.dumps(body)
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=timeout
            ) as answer:
                text = await answer.read()
                if answer.status != 200:
                    raise EngineError(
                        f"{method} {self.url}{path} answered {answer.status}: "
                        f"{text[:300].decode(errors='replace')}"
                    )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineError(f"{method} {self.url}{path} failed: {error!r}") from error
        return text


async def ensure_loaded(engine: EngineClient, version: PolicyVersion) -> None:
    """Loads the version's adapter if it is missing and probes it; the base needs neither.

    Raises AdapterError, before the engine has seen the file, if it is not the one registered.
    """
    if version.adapter_name is None or version.path is None or version.sha256 is None:
        return
    for left in reversed(range(_LOADS)):
        if not await engine.has_model(version.adapter_name):
            await asyncio.to_thread(verify_adapter, Path(version.path), version.sha256)
            await engine.load_adapter(version.adapter_name, version.path)
        try:
            return await engine.probe(version.adapter_name)
        except EngineError:
            if not left or await engine.has_model(version.adapter_name):
                raise


async def warm_up(engine: EngineClient, zero_adapter: Path) -> None:
    """Pays for the first generation with log-probs and with an adapter before an agent waits.

    Both compile or allocate on first use; measured, they stalled every stream for 3.5 s and more.
    `zero_adapter` is a folder with an adapter that changes nothing; without it only the base is
    warmed.
    """
    await engine.generate_once(engine.model)
    await engine.models()
    if not await asyncio.to_thread(zero_adapter.is_dir):
        return
    await engine.load_adapter(WARM_UP_ADAPTER, str(zero_adapter))
    await engine.generate_once(WARM_UP_ADAPTER)
    await engine.unload_adapter(WARM_UP_ADAPTER)


def zero_adapter_path(state_dir: Path, model_path: str, rank: int) -> Path:
    """Where the zero adapter of a model lies."""
    model = hashlib.sha256(model_path.encode()).hexdigest()[:12]
    return state_dir / "warm-up" / f"{model}-rank{rank}"


async def publish(store: Store, engine: EngineClient, version: PolicyVersion) -> None:
    """Adapter on disk → loaded → probed → serving: how a person puts a version into service.

    Requests that run keep their version; the proxy unloads it once they have ended.
    """
    await ensure_loaded(engine, version)
    await asyncio.to_thread(store.set_serving, version.lineage, version.number)


async def publish_candidate(store: Store, engine: EngineClient, version: PolicyVersion) -> None:
    """`publish` for what training made: only in its parent's place.

    Where another version was put into service meanwhile, that one stays.
    """
    await ensure_loaded(engine, version)
    if await asyncio.to_thread(store.serve_candidate, version):
        return
    log.warning("version=%d lineage=%s was overtaken", version.number, version.lineage)
    if version.adapter_name is not None:
        await engine.unload_adapter(version.adapter_name)


async def withdraw(store: Store, engine: EngineClient, rejected: PolicyVersion) -> PolicyVersion:
    """Takes a version out of service, for its `reason`, by the same steps as a rollback.

    Its nearest ancestor whose adapter is whole serves in its place, unless another version serves
    by now. Returns the version that serves.
    """
    for version in await asyncio.to_thread(store.ancestors, rejected):
        try:
            await ensure_loaded(engine, version)
        except AdapterError as error:
            log.error("version=%d lineage=%s is no use: %s", version.number, version.lineage, error)
            continue
        await asyncio.to_thread(store.replace_serving, rejected, version.number)
        break
    return await asyncio.to_thread(store.serving, rejected.lineage)
