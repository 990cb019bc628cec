"""One generation request through to the engine and its reply back, with a copy to the side."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from nextstate.records import Json, PolicyVersion, Timings, new_id
from proxy.config import ProxyConfig
from proxy.dialects.chat import is_off
from proxy.exchange import Exchange
from proxy.linking import TURN_TYPE, explicit_session, named_kind
from proxy.recorder import Recorder
from proxy.serving import MESSAGES, Serving, natively, serving_of
from proxy.sse import EventSplitter
from proxy.upstream import Answer, Cut, NotHttp, Upstream
from proxy.versions import Versions

log = logging.getLogger(__name__)

HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te"),
        *("trailer", "transfer-encoding", "upgrade", "host", "content-length", "expect"),
    }
)
OURS = frozenset(
    {
        *("authorization", "x-api-key"),  # the client's key is for the proxy
        *("accept-encoding", "content-encoding", "content-type"),  # set anew
    }
)
"""Headers that are never forwarded."""
_NOT_SENT_ON = HOP_BY_HOP | OURS | {TURN_TYPE}
HELD_BEFORE_HEADERS_S = 1.0
"""A streamed request that waits longer for the engine gets its headers and keep-alive comments."""
RETRY_AFTER_S = 10
_ATTEMPTS = 5
"""So often one request may find the engine's connection broken: it may be what breaks it."""
_DONE = b"data: [DONE]\n\n"


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
    """Serves what generates; holds no state of a request."""

    config: ProxyConfig
    versions: Versions
    recorder: Recorder
    upstream: Upstream
    counts: RelayCounts = field(default_factory=RelayCounts)

    async def generate(
        self, request: web.Request, body: Json, lineage: str, model: str
    ) -> web.StreamResponse | None:
        """Relays one request, which names `model`, and records its turn before its end is seen.

        None if it cannot be written as JSON (nested too deep): the engine is to refuse it.
        """
        self.counts.requests += 1
        async with self.versions.hold(lineage) as version:
            try:
                call = _Call(self, request, body, version, model)
            except TypeError:
                return None
            if not is_off(body.get("stream")):
                return await call.streamed()
            return await call.plain()


class _Call:
    """One request while it runs."""

    def __init__(
        self,
        relay: Relay,
        request: web.Request,
        body: Json,
        version: PolicyVersion,
        model: str,
    ) -> None:
        self.relay = relay
        self.request = request
        self.body = body
        self.version = version
        self.model = model
        self.serving: Serving
        self._serve(serving_of(request.path, body, model, relay.versions.engine))
        self.turn_id = new_id("turn")
        self.started_at = time.time()
        self._clock = time.perf_counter()
        self._first_token_s: float | None = None
        self._early: web.StreamResponse | None = None
        """The response to a streamed request that had to wait for the engine."""

    def _serve(self, serving: Serving) -> None:
        self.serving = serving
        self._sent = serving.request(self.version.adapter_name or self.relay.versions.engine.model)

    def _serve_natively(self) -> None:
        """The engine's own words about a request are those of the route that the client asked."""
        self._serve(natively(self.request.path, self.body, self.model))

    async def plain(self) -> web.StreamResponse:
        """A reply in one body."""
        try:
            upstream, data, error = await self._whole()
            ended = error is None and upstream.status == 200
            sent = self.serving.reply(data) if ended else data
            if sent is None:
                self._serve_natively()
                upstream, data, error = await self._whole()
                ended = error is None and upstream.status == 200
                sent = self.serving.reply(data) if ended else data
        except EngineDown:
            return self._unavailable()
        if error is not None:
            return await self._broken_off(upstream, data, error)
        headers = self._headers(upstream.headers)
        if upstream.status != 200:
            return web.Response(status=upstream.status, body=data, headers=headers)
        self._first_token_s = self._elapsed()
        await self.relay.recorder.record(self._exchange(None))
        return web.Response(body=sent, headers=headers)

    async def _whole(self) -> tuple[Answer, bytes, Cut | None]:
        upstream = await self._open()
        try:
            return upstream, *await _read(upstream)
        finally:
            upstream.close()

    async def streamed(self) -> web.StreamResponse:
        """A reply as events, passed on as they arrive."""
        try:
            upstream = await self._open_with_keep_alive()
        except EngineDown:
            if self._early is None:
                return self._unavailable()
            return await self._end_early(orjson.dumps(self._unavailable_body()))
        try:
            if upstream.status != 200:
                data, error = await _read(upstream)
                if self._early is not None:
                    return await self._end_early(data)
                if error is not None:
                    return await self._broken_off(upstream, data, error)
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
        named = b"event: error\n" if _is_messages(self.request) else b""
        await self._early.write(named + b"data: " + error + b"\n\n")
        await self._early.write_eof()
        return self._early

    async def _relay_events(self, upstream: Answer, response: web.StreamResponse) -> None:
        splitter = EventSplitter()
        serving = self.serving
        finished, choices = serving.capture.finished, serving.choices
        held: list[bytes] = []
        try:
            while data := await upstream.read():
                if self._first_token_s is None:
                    self._first_token_s = self._elapsed()
                splitter.add(data)
                passed: list[bytes] = []
                while True:
                    if not held:
                        sent, splitter.at = serving.content(splitter.data, splitter.at)
                        passed.append(sent)
                    event = splitter.next()
                    if event is None:
                        break
                    sent = serving.event(event)
                    # From the finish reason on nothing goes out before the turn is recorded, nor
                    # the end of a stream that has none, as after an error.
                    ended = len(finished) >= choices or event.endswith(_DONE)
                    (held if ended else passed).append(sent)
                if sent := b"".join(passed):
                    await response.write(sent)
        except Cut as error:
            await self._cut_off(response, b"".join(held) + splitter.rest, error)
            return
        except (asyncio.CancelledError, OSError):
            self.relay.counts.cut += 1
            self.relay.recorder.submit(self._exchange("the client left before the end"))
            raise
        if serving.broken:
            await self._cut_off(response, b"".join(held), "an error in the stream")
            return
        await self.relay.recorder.record(self._exchange(None))
        await response.write_eof(b"".join(held) + splitter.rest)

    async def _cut_off(self, response: web.StreamResponse, rest: bytes, error: object) -> None:
        """Passes a cut on as a cut: the client must not take a broken reply for a whole one."""
        self.relay.counts.cut += 1
        log.warning("turn=%s the engine cut the stream: %r", self.turn_id, error)
        await self.relay.recorder.record(self._exchange("the engine cut the reply"))
        await response.write(rest)
        if self.request.transport is not None:
            self.request.transport.abort()

    async def _broken_off(self, upstream: Answer, data: bytes, error: Cut) -> web.StreamResponse:
        """Passes on what came of a whole answer, and breaks off where the engine did."""
        self.relay.counts.cut += 1
        log.warning("turn=%s the engine cut the reply: %r", self.turn_id, error)
        headers = self._headers(upstream.headers)
        response = web.StreamResponse(status=upstream.status, headers=headers)
        response.content_length = upstream.content_length
        await response.prepare(self.request)
        await response.write(data)
        if self.request.transport is not None:
            self.request.transport.abort()
        return response

    async def _open(self) -> Answer:
        """The engine's answer, once there is one; waits for an engine that is down."""
        deadline = time.monotonic() + self.relay.config.hold_s
        for _ in range(_ATTEMPTS):
            await self._wait_up(deadline)
            try:
                return await self._answer()
            except OSError as error:
                log.info("turn=%s the engine is unreachable, holding: %r", self.turn_id, error)
                self.relay.versions.engine_failed()
            except NotHttp as error:
                log.warning("turn=%s the engine speaks no HTTP: %r", self.turn_id, error)
                break
        self.relay.counts.failed += 1
        raise EngineDown

    async def _answer(self) -> Answer:
        """One attempt: with the adapter brought back if it was lost, natively if that is needed."""
        upstream = await self._post()
        if upstream.status == 404 and await self.relay.versions.restored(self.version):
            upstream.close()
            upstream = await self._post()
        if upstream.status != 200 and self.serving.path != self.request.path:
            upstream.close()
            self._serve_natively()
            upstream = await self._post()
        return upstream

    async def _open_with_keep_alive(self) -> Answer:
        """Like `_open`; while the engine is down the client gets its headers, then comments."""
        if self.relay.versions.up:
            try:
                return await self._answer()
            except (NotHttp, OSError) as error:
                log.info("turn=%s the engine is unreachable, holding: %r", self.turn_id, error)
                self.relay.versions.engine_failed()
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
        if self.relay.versions.up:
            return
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self.relay.versions.wait_up()
        except TimeoutError:
            self.relay.counts.failed += 1
            raise EngineDown from None

    async def _post(self) -> Answer:
        target = self.serving.path
        query = self.request.rel_url.raw_query_string
        if query and target == self.request.path:
            target = f"{target}?{query}"
        headers = upstream_headers(self.request.headers)
        return await self.relay.upstream.post(target, headers, self._sent)

    def _exchange(self, cut: str | None) -> Exchange:
        serving = self.serving
        return Exchange(
            turn_id=self.turn_id,
            lineage=self.version.lineage,
            explicit_session=explicit_session(self.request.headers, self.body),
            request=serving.chat,
            capture=serving.capture,
            policy_version=self.relay.versions.number_of(
                serving.capture.model, self.version.lineage
            ),
            timings=Timings(self.started_at, self._first_token_s, self._elapsed()),
            cut=cut is not None,
            untrainable=cut or serving.untrainable,
            kind=named_kind(self.request.headers),
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
            self._unavailable_body(), status=503, headers={"Retry-After": str(RETRY_AFTER_S)}
        )

    def _unavailable_body(self) -> Json:
        message = "The inference engine is not available; the request was held and has timed out."
        return api_error(self.request, message, "ServiceUnavailableError", 503)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._clock


async def _read(upstream: Answer) -> tuple[bytes, Cut | None]:
    """The body as far as it came, and what cut it off."""
    parts: list[bytes] = []
    try:
        while part := await upstream.read():
            parts.append(part)
    except Cut as error:
        return b"".join(parts), error
    return b"".join(parts), None


def _close_result(opening: asyncio.Task[Answer]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def upstream_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The client's headers as the engine gets them: without keys and connection details."""
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in _NOT_SENT_ON
    )


def client_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The engine's headers as the client gets them."""
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in HOP_BY_HOP
    )


def api_error(request: web.Request, message: str, kind: str, code: int) -> Json:
    """An error body in the format of the API that was asked."""
    if _is_messages(request):
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _is_messages(request: web.Request) -> bool:
    return request.path.startswith(MESSAGES)
