"""The proxy's routes: the relay under /v1/, and NextState's own addresses beside it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from string import punctuation
from typing import cast
from urllib.parse import quote

import aiohttp
import orjson
from aiohttp import web
from sqlalchemy.exc import SQLAlchemyError
from yarl import URL

from nextstate.engine import EngineClient
from nextstate.errors import NextStateError, RecordError, StoreError
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import MAIN_LINEAGE, Json, PolicyVersion
from nextstate.settling import Reception
from nextstate.store import Store
from nextstate.wire import json_object, objects
from proxy.config import ProxyConfig
from proxy.feedback import A_MINUTE, Allowance, Said, read_feedback
from proxy.guard import administers, leads_out, refusal
from proxy.lineages import Lineages
from proxy.linking import session_names
from proxy.metrics import counts_of, exposition
from proxy.recorder import Recorder
from proxy.relay import RETRY_AFTER_S, Relay, api_error, client_headers, upstream_headers
from proxy.serving import CHAT, COMPLETIONS, DIALECTS, MESSAGES, compact
from proxy.sse import EventSplitter
from proxy.upstream import CONNECT_TIMEOUT_S, IDLE_S, Upstream
from proxy.versions import Versions
from proxy.writer_process import WriterProcess

log = logging.getLogger(__name__)

_CALLER: web.RequestKey[str] = web.RequestKey("lineage", str)
_OPEN_PATHS = frozenset(("/healthz",))
_WRITER_S = 10.0
"""How long the start waits for the writer: it takes half a second, and more on a busy machine."""
_DRAIN_S = 10.0
_BEAT_S = 1.0
_CHECKPOINT_S = 0.5

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Proxy:
    """The parts behind the routes."""

    def __init__(
        self,
        config: ProxyConfig,
        store: Store,
        engine: EngineClient,
        profile: str,
        *,
        writer: WriterProcess,
        zero_adapter: Path,
        record: bool,
        lineages: Lineages,
        engine_key: str | None,
        worker: str | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.engine = engine
        self.lineages = lineages
        self.versions = Versions(store, engine, lineages.names, zero_adapter, worker or "")
        self.recorder = Recorder(
            writer,
            store.config,
            profile,
            config.record_queue,
            config.record_timeout_s,
            enabled=record,
        )
        self._profile: AgentProfile = load_plugin("agents", profile, None)
        self._engine_key = engine_key
        self._worker = worker
        self._allowance = Allowance()
        self._relay: Relay | None = None
        self._session: aiohttp.ClientSession
        """For what is passed on as it is."""

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
        for path in (CHAT, COMPLETIONS, *DIALECTS):
            app.router.add_post(path, self._generate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/feedback", self._feedback)
        app.router.add_route("*", "/v1/{path:.*}", self._pass)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _running(self, app: web.Application) -> AsyncGenerator[None]:
        headers = {"Authorization": f"Bearer {self._engine_key}"} if self._engine_key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
        )
        # Compressed, an answer could not be read.
        fixed = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        async with self._session, Upstream(self.engine.url, headers | fixed) as upstream:
            self._relay = Relay(self.config, self.versions, self.recorder, upstream)
            tasks = [
                asyncio.create_task(self.recorder.run()),
                asyncio.create_task(self.versions.run()),
                asyncio.create_task(_every(_CHECKPOINT_S, self.store.checkpoint)),
            ]
            if self._worker is not None:
                tasks.append(asyncio.create_task(_every(_BEAT_S, self._beat)))
            for task in tasks:
                task.add_done_callback(_end_if_failed)
            # Or the first replies would end before anything could take their turns.
            await self.recorder.wait_open(_WRITER_S)
            yield
            await self.recorder.drain(_DRAIN_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._worker is not None:
                await asyncio.to_thread(self.store.leave, self._worker)

    def _beat(self) -> None:
        counts = counts_of(self.relay.counts, self.recorder.counts, self.versions)
        self.store.beat(self._worker or "", self.versions.in_use(), counts)

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _OPEN_PATHS:
            return await handler(request)
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        sent = bearer if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        caller = self.lineages.caller(sent)
        if caller is None:
            message = "Wrong or missing API key: send it as a bearer key."
            return _refused(request, 401, "AuthenticationError", message)
        request[_CALLER] = caller
        try:
            return await handler(request)
        except aiohttp.ClientConnectionResetError:
            return web.Response(status=499)  # the client has left: nobody reads this
        except web.HTTPRequestEntityTooLarge:
            return self._too_large(request)
        except web.RequestPayloadError as error:
            message = f"The request body cannot be read: {error}."
            return _refused(request, 400, "BadRequestError", message)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        body = json_object(data)
        if (refused := self._guard(request, _as_the_engine_reads(data, body))) is not None:
            return refused
        if body is None or request.content_type != "application/json":
            return await self._forward(request, data)  # the engine says what is wrong with it
        if body.get("model") in (None, "") and request.path != MESSAGES:
            body["model"] = self.engine.model  # as the engine takes it, but not in this dialect
        lineage = self._lineage(request, body)
        if lineage is None:
            return await self._forward(request, data)
        relayed = await self.relay.generate(request, body, lineage, body["model"])
        return relayed or await self._forward(request, data)

    def _guard(self, request: web.Request, body: Json | None) -> web.Response | None:
        """The answer to a request that must not reach the engine, or None."""
        if body is None:
            return None
        found = refusal(
            body,
            max_choices=self.config.max_choices,
            names_adapter=self.versions.is_adapter(str(body.get("model"))),
        )
        if found is None:
            return None
        return _refused(request, found.status, found.kind, found.message)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        caller = request[_CALLER]

        def shown(body: bytes) -> bytes:
            listed = json_object(body)
            if listed is None or "data" not in listed:
                return body
            is_adapter = self.versions.is_adapter
            theirs = [m for m in objects(listed["data"]) if not is_adapter(str(m.get("id")))]
            base = [m for m in theirs if m.get("id") == self.engine.model]
            names = self.lineages.models(caller)
            listed["data"] = theirs + [{**m, "id": name} for m in base for name in names]
            return compact(listed)

        return await self._forward(request, None, shown)

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        if leads_out(request.path):
            return _refused(request, 404, "NotFoundError", f"There is no {request.path}.")
        if administers(request.path):
            message = f"{request.path} administers the engine: it is not for agents."
            return _refused(request, 403, "PermissionDeniedError", message)
        if request.method != "POST" or request.content_type != "application/json":
            return await self._forward(request, None)
        data = await request.read()
        body = json_object(data)
        if (refused := self._guard(request, _as_the_engine_reads(data, body))) is not None:
            return refused
        lineage = self._lineage(request, body)
        if body is None or lineage is None:
            return await self._forward(request, data)
        async with self.versions.hold(lineage) as version:
            served, named = version.adapter_name or self.engine.model, str(body.get("model"))
            if served == named:
                return await self._forward(request, data)
            try:
                sent = orjson.dumps({**body, "model": served})
            except TypeError:  # nested deeper than orjson writes: the engine is to refuse it
                return await self._forward(request, data)

            def renamed(part: bytes) -> bytes:
                # Quotes inside of a JSON string are escaped: this is always a key and its value.
                return part.replace(_named(served), _named(named))

            return await self._forward(request, sent, renamed, version)

    def _lineage(self, request: web.Request, body: Json | None) -> str | None:
        """The lineage that a request's model belongs to, or None."""
        model = None if body is None else body.get("model")
        return self.lineages.of(request[_CALLER], model) if isinstance(model, str) else None

    def _too_large(self, request: web.Request) -> web.Response:
        message = f"The request is larger than [proxy] max_body_mb = {self.config.max_body_mb}."
        return _refused(request, 413, "BadRequestError", message)

    def _target(self, request: web.Request) -> URL:
        """Where a request goes at the engine: its path as the client wrote it."""
        path = quote(str(request.rel_url), safe=punctuation, errors="surrogateescape")
        return URL(f"{self.engine.url}{path}", encoded=True)  # yarl would resolve and decode it

    async def _forward(
        self,
        request: web.Request,
        data: bytes | None,
        changed: Callable[[bytes], bytes] | None = None,
        version: PolicyVersion | None = None,
    ) -> web.StreamResponse:
        """Passes a request and its reply on as they are, but for what `changed` does to a reply.

        `changed` gets a whole body, or each event of a stream. `version` is what the request names:
        if the engine does not know its adapter, it is brought back.
        """
        response: web.StreamResponse | None = None
        try:
            async with await self._answer(request, data) as upstream:
                headers = client_headers(upstream.headers)
                response = web.StreamResponse(status=upstream.status, headers=headers)
                if changed is not None and upstream.content_type != "text/event-stream":
                    body = await upstream.read()
                    if upstream.status == 404 and version is not None:
                        unknown = str(version.adapter_name).encode() in body
                        if unknown and await self.versions.restored(version):
                            return await self._forward(request, data, changed)
                    return web.Response(status=upstream.status, body=changed(body), headers=headers)
                response.content_length = upstream.content_length
                await response.prepare(request)
                splitter = EventSplitter()
                async for chunk in upstream.content.iter_any():
                    if changed is None:
                        await response.write(chunk)
                    else:
                        await response.write(b"".join(map(changed, splitter.feed(chunk))))
                await response.write(splitter.rest)
                await response.write_eof()
                return response
        except (aiohttp.ClientError, TimeoutError) as error:
            if response is not None:
                return await _cut_off(request, response, error)
            if isinstance(error.__cause__, web.HTTPRequestEntityTooLarge):
                raise error.__cause__ from None
            if isinstance(request.content.exception(), web.RequestPayloadError):
                return _refused(request, 400, "BadRequestError", "The request body cannot be read.")
            log.warning("%s %s: the engine is unreachable: %r", request.method, request.path, error)
            message = "The inference engine is unreachable."
            return _refused(request, 503, "ServiceUnavailableError", message)

    async def _body(self, request: web.Request) -> AsyncGenerator[bytes]:
        """A request's body as it comes, within the limit."""
        limit = self.config.max_body_mb * 1024 * 1024
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > limit:
                raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=size)
            yield chunk

    async def _answer(self, request: web.Request, data: bytes | None) -> aiohttp.ClientResponse:
        """The engine's answer, once its head has come; waits for an engine that is down.

        What need not be streamed is sent once more if the connection breaks before an answer.
        """
        headers = upstream_headers(request.headers)
        if "Content-Type" in request.headers:
            headers["Content-Type"] = request.headers["Content-Type"]
        streamed = self._body(request) if data is None and request.can_read_body else None
        deadline = asyncio.get_running_loop().time() + self.config.hold_s

        async def ask() -> aiohttp.ClientResponse:
            if not self.versions.up:
                async with asyncio.timeout_at(deadline):
                    await self.versions.wait_up()
            return await self._session.request(
                request.method,
                self._target(request),
                data=data if streamed is None else streamed,
                headers=headers,
                allow_redirects=False,
            )

        try:
            return await ask()
        except aiohttp.ClientConnectionError as error:
            if streamed is not None:
                raise
            log.info("%s %s: the engine is unreachable: %r", request.method, request.path, error)
            self.versions.engine_failed()
            return await ask()

    async def _feedback(self, request: web.Request) -> web.StreamResponse:
        try:
            said = read_feedback(await request.read())
        except RecordError as error:
            return _refused(request, 400, "BadRequestError", f"Feedback: {error}.")
        if wait_s := self._allowance.wait_s(request[_CALLER]):
            message = f"This key gave feedback more than {A_MINUTE:g} times in a minute."
            return _refused(request, 429, "RateLimitError", message, wait_s)
        try:
            found = await asyncio.to_thread(self._receive, said, request[_CALLER])
        except StoreError:  # it was forgotten at this moment
            found = None
        except (SQLAlchemyError, OSError) as error:
            log.warning("feedback on turn=%s could not be stored: %s", said.turn_id, error)
            message = "The store cannot be written now."
            return _refused(request, 503, "ServiceUnavailableError", message)
        if found is None:
            where = f"turn {said.turn_id!r}" if said.turn_id else f"turn in {said.session_id!r}"
            return _refused(request, 404, "NotFoundError", f"There is no {where}.")
        return web.json_response(asdict(found))

    def _receive(self, said: Said, caller: str) -> Reception | None:
        """Settles feedback; None when the caller has no such turn."""
        theirs = [name for name in self.lineages.names if self.lineages.sees(caller, name)]
        turn = said.turn_id
        if turn is None:
            assert said.session_id is not None
            turn = self.store.newest_turn(session_names(said.session_id, self._profile), theirs)
        elif self.store.lineage_of(turn) not in theirs:
            turn = None
        return None if turn is None else self.store.give_feedback(said.of(turn))

    async def _healthz(self, request: web.Request) -> web.StreamResponse:
        serving = {name: version.number for name, version in self.versions.serving.items()}
        return web.json_response(
            {
                "proxy": "up",
                "engine": "up" if self.versions.up else "down",
                "version": serving[MAIN_LINEAGE],
                "lineages": serving,
            }
        )

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        try:
            stored = await asyncio.to_thread(self.store.counts)
            others = await asyncio.to_thread(self.store.others, self._worker or "")
        except (NextStateError, SQLAlchemyError, OSError) as error:
            log.warning("counting the store failed: %s", error)
            stored, others = {}, []
        counts = Counter(counts_of(self.relay.counts, self.recorder.counts, self.versions))
        for _, theirs in others:
            counts.update(theirs)
        text = exposition(counts, self.versions, stored)
        return web.Response(text=text, content_type="text/plain", charset="utf-8")


def _end_if_failed(task: asyncio.Task[None]) -> None:
    """Ends the process, as from outside, when what it cannot serve without has failed."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("%s has failed: the proxy ends", task.get_coro(), exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


async def _every(pause_s: float, work: Callable[[], None]) -> None:
    """Does the store's housekeeping now and again; a failure is logged and tried again."""
    while True:
        try:
            await asyncio.to_thread(work)
        except (NextStateError, SQLAlchemyError, OSError) as error:
            log.warning("%s failed: %s", work.__name__, error)
        await asyncio.sleep(pause_s)


def _as_the_engine_reads(data: bytes, body: Json | None) -> Json | None:
    """What a lenient parser makes of a body that ours refuses: NaN, UTF-16, a lone surrogate."""
    if body is not None:
        return body
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return cast(Json, found) if isinstance(found, dict) else None


def _named(model: str) -> bytes:
    return b'"model":' + orjson.dumps(model)


def _refused(
    request: web.Request, status: int, kind: str, message: str, retry_after_s: int | None = None
) -> web.Response:
    if status == 503:
        retry_after_s = RETRY_AFTER_S
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    error = api_error(request, message, kind, status)
    return web.json_response(error, status=status, headers=headers)


async def _cut_off(
    request: web.Request, response: web.StreamResponse, error: BaseException
) -> web.StreamResponse:
    """Passes a cut on as a cut: the client must not take a broken answer for a whole one.

    Of one that was to be renamed as a whole nothing but the head goes out.
    """
    log.warning("%s %s: the answer was cut: %r", request.method, request.path, error)
    if not response.prepared:
        await response.prepare(request)
    if request.transport is not None:
        request.transport.abort()
    return response
