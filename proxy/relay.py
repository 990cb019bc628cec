"""One chat request through to the engine and its reply back, with a copy to the side."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp
import orjson
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from nextstate.engine import ensure_loaded
from nextstate.errors import EngineError
from nextstate.records import Json, PolicyVersion, Timings
from nextstate.wire import json_object
from proxy.capture import Capture
from proxy.config import ProxyConfig
from proxy.envelope import Asked, client_chunk, client_reply, upstream_request
from proxy.linking import explicit_session
from proxy.recorder import Exchange, Recorder
from proxy.sse import EventSplitter, event_data
from proxy.versions import Versions

log = logging.getLogger(__name__)

HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te"),
        *("trailer", "transfer-encoding", "upgrade", "host", "content-length"),
    }
)
KEYS = frozenset(("authorization", "x-api-key"))
"""The client's key is for the proxy and never forwarded."""
HELD_BEFORE_HEADERS_S = 1.0
"""A streamed request that waits longer for the engine gets its headers and keep-alive comments."""
_RETRY_AFTER_S = 10


class EngineDown(Exception):
    """The engine did not come back within the configured time."""


@dataclass(slots=True)
class RelayCounts:
    """Shown under /metrics."""

    requests: int = 0
    failed: int = 0
    """Answered with a 503 of our own, because the engine did not come back in time."""
    cut: int = 0
    """Streams that the engine cut or that the client left."""


@dataclass(slots=True)
class Relay:
    """Serves chat completions; holds no state of a request."""

    config: ProxyConfig
    versions: Versions
    recorder: Recorder
    upstream: aiohttp.ClientSession
    counts: RelayCounts = field(default_factory=RelayCounts)

    async def chat(self, request: web.Request, body: Json) -> web.StreamResponse:
        """Relays one chat completion and records its turn before the client sees its end."""
        self.counts.requests += 1
        async with self.versions.hold() as version:
            call = _Call(self, request, body, version)
            if body.get("stream"):
                return await call.streamed()
            return await call.plain()


class _Call:
    """One request while it runs."""

    def __init__(
        self, relay: Relay, request: web.Request, body: Json, version: PolicyVersion
    ) -> None:
        self.relay = relay
        self.request = request
        self.body = body
        self.version = version
        self.asked = Asked.of(body)
        self.turn_id = f"turn_{uuid.uuid4().hex[:20]}"
        self.capture = Capture()
        self.started_at = time.time()
        self._clock = time.perf_counter()
        self._first_token_s: float | None = None
        self._early: web.StreamResponse | None = None
        """The response to a streamed request that had to wait for the engine."""

    async def plain(self) -> web.StreamResponse:
        """A reply in one body."""
        try:
            upstream = await self._open()
        except EngineDown:
            return self._unavailable()
        try:
            data = await upstream.read()
        finally:
            upstream.close()
        headers = self._headers(upstream.headers)
        reply = json_object(data) if upstream.status == 200 else None
        if reply is None:
            return web.Response(status=upstream.status, body=data, headers=headers)
        self._first_token_s = self._elapsed()
        self.capture.body(reply)
        sent = orjson.dumps(client_reply(reply, self.asked))
        await self.relay.recorder.record(self._exchange(None))
        return web.Response(body=sent, headers=headers)

    async def streamed(self) -> web.StreamResponse:
        """A reply as events, passed on as they arrive."""
        try:
            upstream = await self._open_with_keep_alive()
        except EngineDown:
            if self._early is None:
                return self._unavailable()
            return await self._end_early(orjson.dumps(_unavailable_body()))
        try:
            if upstream.status != 200:
                data = await upstream.read()
                if self._early is not None:
                    return await self._end_early(data)
                headers = self._headers(upstream.headers)
                return web.Response(status=upstream.status, body=data, headers=headers)
            response = self._early
            if response is None:
                response = web.StreamResponse(headers=self._headers(upstream.headers))
                await response.prepare(self.request)
            await self._relay_events(upstream, response)
            return response
        finally:
            upstream.close()

    async def _end_early(self, error: bytes) -> web.StreamResponse:
        """The headers are out already: the error goes out as an event."""
        assert self._early is not None
        await self._early.write(b"data: " + error + b"\n\n")
        await self._early.write_eof()
        return self._early

    async def _relay_events(
        self, upstream: aiohttp.ClientResponse, response: web.StreamResponse
    ) -> None:
        splitter = EventSplitter()
        choices = self.body.get("n") or 1
        held = _Held()
        try:
            async for data in upstream.content.iter_any():
                if self._first_token_s is None:
                    self._first_token_s = self._elapsed()
                passed: list[bytes] = []
                for event in splitter.feed(data):
                    chunk = self._captured(event)
                    # From the finish reason on nothing goes out before the turn is recorded.
                    if len(self.capture.finished) >= choices:
                        held.add(chunk, event, self.asked)
                    else:
                        passed.append(_sent(chunk, event, self.asked))
                if passed:
                    await response.write(b"".join(passed))
        except (aiohttp.ClientPayloadError, aiohttp.ServerConnectionError, TimeoutError) as error:
            await self._cut_off(response, held.bytes() + splitter.rest, error)
            return
        except (asyncio.CancelledError, OSError):
            self.relay.counts.cut += 1
            self.relay.recorder.submit(self._exchange("the client left before the end"))
            raise
        await self.relay.recorder.record(self._exchange(None))
        await response.write(held.bytes() + splitter.rest)
        await response.write_eof()

    async def _cut_off(self, response: web.StreamResponse, rest: bytes, error: Exception) -> None:
        """Passes a cut on as a cut: the client must not take a broken reply for a whole one."""
        self.relay.counts.cut += 1
        log.warning("turn=%s the engine cut the stream: %r", self.turn_id, error)
        await self.relay.recorder.record(self._exchange("the engine cut the reply"))
        await response.write(rest)
        if self.request.transport is not None:
            self.request.transport.abort()

    def _captured(self, event: bytes) -> Json | None:
        """The event's chunk, taken into the capture; None for [DONE], comments and non-JSON."""
        payload = event_data(event)
        if payload is None or payload == b"[DONE]":
            return None
        chunk = json_object(payload)
        if chunk is None:
            self.capture.error = "the stream held an event that is not a JSON object"
        else:
            self.capture.chunk(chunk)
        return chunk

    async def _open(self) -> aiohttp.ClientResponse:
        """The engine's answer, once there is one; waits for an engine that is down."""
        deadline = time.monotonic() + self.relay.config.hold_s
        while True:
            await self._wait_up(deadline)
            try:
                upstream = await self._post()
                if upstream.status == 404 and await self._restored():
                    upstream.close()
                    upstream = await self._post()
            except (aiohttp.ClientConnectionError, OSError) as error:
                log.info("turn=%s the engine is unreachable, holding: %r", self.turn_id, error)
                self.relay.versions.engine_failed()
                continue
            return upstream

    async def _open_with_keep_alive(self) -> aiohttp.ClientResponse:
        """Like `_open`; while the engine is down the client gets its headers, then comments."""
        opening = asyncio.create_task(self._open())
        pause = HELD_BEFORE_HEADERS_S
        try:
            while not (await asyncio.wait({opening}, timeout=pause))[0]:
                if self.relay.versions.up:
                    continue  # the engine works on it: its own headers will come
                if self._early is None:
                    self._early = web.StreamResponse(
                        headers={
                            "Content-Type": "text/event-stream; charset=utf-8",
                            **self._own_headers(),
                        }
                    )
                    await self._early.prepare(self.request)
                await self._early.write(b": waiting for the engine\n\n")
                pause = self.relay.config.keep_alive_s
        except BaseException:
            opening.add_done_callback(_close_result)
            opening.cancel()
            raise
        return opening.result()

    async def _wait_up(self, deadline: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self.relay.versions.wait_up()
        except TimeoutError:
            self.relay.counts.failed += 1
            raise EngineDown from None

    async def _post(self) -> aiohttp.ClientResponse:
        engine = self.relay.versions.engine
        model = self.version.adapter_name or engine.model
        return await self.relay.upstream.post(
            f"{engine.url}/v1/chat/completions",
            data=orjson.dumps(upstream_request(self.body, model)),
            headers=upstream_headers(self.request.headers) | {"Content-Type": "application/json"},
        )

    async def _restored(self) -> bool:
        """Brings back an adapter that the engine has lost; False when that fails too."""
        if self.version.adapter_name is None:
            return False
        try:
            await ensure_loaded(self.relay.versions.engine, self.version)
        except EngineError as error:
            log.warning("turn=%s the serving adapter cannot be restored: %s", self.turn_id, error)
            return False
        return True

    def _exchange(self, cut: str | None) -> Exchange:
        return Exchange(
            turn_id=self.turn_id,
            lineage=self.version.lineage,
            explicit_session=explicit_session(self.request.headers, self.body),
            request=self.body,
            capture=self.capture,
            policy_version=self.relay.versions.number_of(self.capture.model),
            timings=Timings(self.started_at, self._first_token_s, self._elapsed()),
            cut=cut,
        )

    def _headers(self, upstream: CIMultiDictProxy[str]) -> CIMultiDict[str]:
        headers = client_headers(upstream)
        headers.update(self._own_headers())
        return headers

    def _own_headers(self) -> dict[str, str]:
        return {
            "x-nextstate-turn": self.turn_id,
            "x-nextstate-version": str(self.version.number),
        }

    def _unavailable(self) -> web.Response:
        return web.json_response(
            _unavailable_body(), status=503, headers={"Retry-After": str(_RETRY_AFTER_S)}
        )

    def _elapsed(self) -> float:
        return time.perf_counter() - self._clock


class _Held:
    """The events from the finish reason on, as the client will get them."""

    def __init__(self) -> None:
        self._events: list[Json | bytes] = []

    def add(self, chunk: Json | None, event: bytes, asked: Asked) -> None:
        """Keeps one event; a usage chunk that goes leaves its fingerprint on the one before."""
        if chunk is None:
            self._events.append(event)
            return
        fingerprint = chunk.get("system_fingerprint")
        sent = client_chunk(chunk, asked)
        if sent is not None:
            self._events.append(sent)
        elif fingerprint is not None and self._events and isinstance(self._events[-1], dict):
            self._events[-1]["system_fingerprint"] = fingerprint

    def bytes(self) -> bytes:
        """All of them, as they go out."""
        return b"".join(e if isinstance(e, bytes) else _encoded(e) for e in self._events)


def _sent(chunk: Json | None, event: bytes, asked: Asked) -> bytes:
    if chunk is None:
        return event
    sent = client_chunk(chunk, asked)
    return b"" if sent is None else _encoded(sent)


def _encoded(chunk: Json) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _close_result(opening: asyncio.Task[aiohttp.ClientResponse]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def upstream_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The client's headers as the engine gets them: without keys and connection details."""
    return {
        name: value
        for name, value in headers.items()
        if name.lower() not in HOP_BY_HOP
        and name.lower() not in KEYS
        and name.lower() not in ("accept-encoding", "content-type")
    }


def client_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The engine's headers as the client gets them."""
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in HOP_BY_HOP
    )


def api_error(message: str, kind: str, code: int) -> Json:
    """An error body in the API's own format."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _unavailable_body() -> Json:
    return api_error(
        "The inference engine is not available; the request was held and has run out of time.",
        "ServiceUnavailableError",
        503,
    )
