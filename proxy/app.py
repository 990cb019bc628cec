"""The proxy's routes: the relay under /v1/, and NextState's own addresses beside it."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web

from nextstate.engine import EngineClient
from nextstate.errors import NextStateError, StoreError
from nextstate.hooks import AgentProfile
from nextstate.records import MAIN_LINEAGE, Json, Verdict
from nextstate.store import FEEDBACK, Store
from nextstate.wire import json_object, objects
from proxy.config import ProxyConfig
from proxy.guard import refusal
from proxy.metrics import exposition
from proxy.recorder import Recorder
from proxy.relay import Relay, api_error, client_headers, upstream_headers
from proxy.versions import Versions

log = logging.getLogger(__name__)

_ADMIN = frozenset(
    ("load_lora_adapter", "unload_lora_adapter", "reset_prefix_cache", "sleep", "wake_up")
)
_OPEN_PATHS = frozenset(("/healthz",))
_CONNECT_TIMEOUT_S = 5.0
_DRAIN_S = 10.0
_CHUNK_BYTES = 1 << 16

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Proxy:
    """The parts behind the routes."""

    def __init__(
        self,
        config: ProxyConfig,
        store: Store,
        engine: EngineClient,
        profile: AgentProfile,
        *,
        zero_adapter: Path,
        record: bool,
        client_key: str | None,
        engine_key: str | None,
    ) -> None:
        self.config = config
        self.store = store
        self.engine = engine
        self.versions = Versions(store, engine, MAIN_LINEAGE, zero_adapter)
        self.recorder = Recorder(
            store, profile, config.record_queue, config.record_timeout_s, enabled=record
        )
        self._client_key = client_key
        self._engine_key = engine_key
        self._relay: Relay | None = None

    @property
    def relay(self) -> Relay:
        """The relay, once the application runs."""
        assert self._relay is not None
        return self._relay

    def app(self) -> web.Application:
        """The aiohttp application; run it with `handler_cancellation=True`."""
        limit = self.config.max_body_mb * 1024 * 1024
        app = web.Application(client_max_size=limit, middlewares=[self._authorize])
        app.cleanup_ctx.append(self._running)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/feedback", self._feedback)
        app.router.add_route("*", "/v1/{path:.*}", self._pass)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _running(self, app: web.Application) -> AsyncGenerator[None]:
        headers = {"Authorization": f"Bearer {self._engine_key}"} if self._engine_key else {}
        session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            auto_decompress=False,
        )
        async with session:
            self._relay = Relay(self.config, self.versions, self.recorder, session)
            tasks = [
                asyncio.create_task(self.recorder.run()),
                asyncio.create_task(self.versions.run()),
            ]
            yield
            await self.recorder.drain(_DRAIN_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._client_key is not None and request.path not in _OPEN_PATHS:
            sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
            sent = sent or request.headers.get("x-api-key", "")
            if not hmac.compare_digest(sent.encode(), self._client_key.encode()):
                return _refused(
                    401, "AuthenticationError", "Wrong or missing API key: send it as a bearer key."
                )
        return await handler(request)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        try:
            data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return self._too_large()
        body = json_object(data)
        if (refused := self._guard(body)) is not None:
            return refused
        if body is None or body.get("model") != self.engine.model:
            return await self._forward(request, data)  # the engine says what is wrong with it
        return await self.relay.chat(request, body)

    def _guard(self, body: Json | None) -> web.Response | None:
        """The answer to a request that must not reach the engine, or None."""
        if body is None:
            return None
        found = refusal(
            body,
            max_choices=self.config.max_choices,
            names_adapter=self.versions.is_adapter(str(body.get("model"))),
        )
        return None if found is None else _refused(found.status, found.kind, found.message)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        response = await self._forward(request, None, keep=True)
        body = response.body if isinstance(response, web.Response) else None
        listed = json_object(body) if isinstance(body, bytes) else None
        if listed is None or "data" not in listed:
            return response
        listed["data"] = [
            m for m in objects(listed["data"]) if not self.versions.is_adapter(str(m.get("id")))
        ]
        return web.Response(
            status=response.status,
            body=orjson.dumps(listed),
            headers={k: v for k, v in response.headers.items() if k.lower() != "content-length"},
        )

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        if request.match_info["path"].strip("/") in _ADMIN:
            return _refused(403, "PermissionError", "This route administers the engine.")
        if request.method != "POST" or not request.content_type.endswith("json"):
            return await self._forward(request, None)
        try:
            data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return self._too_large()
        return self._guard(json_object(data)) or await self._forward(request, data)

    def _too_large(self) -> web.Response:
        message = f"The request is larger than [proxy] max_body_mb = {self.config.max_body_mb}."
        return _refused(413, "BadRequestError", message)

    async def _forward(
        self, request: web.Request, data: bytes | None, keep: bool = False
    ) -> web.StreamResponse:
        """Passes a request and its reply on as they are; `keep` gives the body back in one."""
        headers = upstream_headers(request.headers)
        if "Content-Type" in request.headers:
            headers["Content-Type"] = request.headers["Content-Type"]
        sent = data if data is not None else (request.content if request.can_read_body else None)
        try:
            async with self.relay.upstream.request(
                request.method,
                f"{self.engine.url}{request.rel_url}",
                data=sent,
                headers=headers,
                allow_redirects=False,
            ) as upstream:
                answer_headers = client_headers(upstream.headers)
                if keep:
                    body = await upstream.read()
                    return web.Response(status=upstream.status, body=body, headers=answer_headers)
                response = web.StreamResponse(status=upstream.status, headers=answer_headers)
                response.content_length = upstream.content_length
                await response.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError) as error:
            log.warning("%s %s: the engine is unreachable: %r", request.method, request.path, error)
            return _refused(503, "ServiceUnavailableError", "The inference engine is unreachable.")

    async def _feedback(self, request: web.Request) -> web.StreamResponse:
        body = json_object(await request.read()) or {}
        turn, score, hint = body.get("turn_id"), body.get("score"), body.get("hint")
        if not isinstance(turn, str) or score not in (-1, 0, 1):
            message = 'Expected {"turn_id": "turn_…", "score": 1, 0 or -1, "hint": optional text}.'
            return _refused(400, "BadRequestError", message)
        if hint is not None and not isinstance(hint, str):
            return _refused(400, "BadRequestError", "hint is a text or absent.")
        verdict = Verdict(turn, (), score, FEEDBACK, hint or None)
        try:
            await asyncio.to_thread(self.store.settle_verdict, verdict)
        except StoreError as error:
            return _refused(404, "NotFoundError", f"{error}.")
        return web.json_response({"turn": turn, "score": score, "hint": verdict.hint})

    async def _healthz(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(
            {
                "proxy": "up",
                "engine": "up" if self.versions.up else "down",
                "version": self.versions.serving.number,
            }
        )

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        try:
            stored = await asyncio.to_thread(self.store.counts)
        except (NextStateError, OSError) as error:
            log.warning("counting the store failed: %s", error)
            stored = {}
        text = exposition(self.relay.counts, self.recorder.counts, self.versions, stored)
        return web.Response(text=text, content_type="text/plain", charset="utf-8")


def _refused(status: int, kind: str, message: str) -> web.Response:
    return web.json_response(api_error(message, kind, status), status=status)
