"""One generation request through to the engine and its reply back, with a copy to the side."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from nextstate.errors import WrongEngineError
from nextstate.file_descriptors import out_of_descriptors
from nextstate.records import Json, PolicyVersion, Timings, new_id
from proxy.answers import Refused, error_response, is_redirect, redirected
from proxy.config import ProxyConfig
from proxy.dialects.chat import is_off
from proxy.exchange import Exchange
from proxy.linking.continuation import explicit_session, named_kind, names_conversation
from proxy.recorder import Recorder
from proxy.serving import MESSAGES, Direct, Serving, natively, serving_of
from proxy.sse import EventSplitter
from proxy.upstream import Answer, Cut, HeadCut, NotHttp, Upstream
from proxy.versions import Versions

log = logging.getLogger(__name__)

HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te"),
        *("trailer", "transfer-encoding", "upgrade", "host", "content-length", "expect"),
    }
)
_SENT_ON = frozenset(
    {
        *("accept", "user-agent", "endpoint-load-metrics-format"),
        *("x-request-id", "x-session-id", "traceparent", "tracestate"),
    }
)
"""What vLLM reads, but for what is set anew, and for what one client could say to the harm of
others: its priority, the rank that is to serve it, the key that is for the proxy."""
_NOT_SENT_BACK = HOP_BY_HOP | {
    *("location", "content-location", "refresh"),  # the engine's own address
    *("access-control-allow-origin", "access-control-allow-credentials"),  # ours to say
    "access-control-expose-headers",
}
HELD_BEFORE_HEADERS_S = 1.0
"""A streamed request that waits longer for the engine gets its headers and keep-alive comments."""
_REFUSED = (400, 422)
ATTEMPTS = 5
"""So often one request may find the engine's connection broken: it may be what breaks it."""
_DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class RelayCounts:
    """Shown under /metrics."""

    requests: int = 0
    failed: int = 0
    """Answered with an error of our own, because the engine did not answer."""
    cut: int = 0
    """Streams that the engine cut or that the client left."""
    unrecorded: Counter[str] = field(default_factory=Counter[str])
    """Requests to generate that no turn holds, by the reason."""


@dataclass(slots=True)
class Relay:
    """Serves what generates; holds no state of a request."""

    config: ProxyConfig
    versions: Versions
    recorder: Recorder
    upstream: Upstream
    out_of_files: Callable[[BaseException], Refused]
    """Counts that no connection to the engine can be opened, and says so."""
    counts: RelayCounts = field(default_factory=RelayCounts)

    async def generate(
        self, request: web.Request, body: Json, lineage: str, model: str
    ) -> web.StreamResponse:
        """Relays one request, which names `model`, and records its turn before its end is seen.

        Raises ValueError for one that cannot be written as JSON, as it is nested too deep.
        """
        self.counts.requests += 1
        async with self.versions.hold(lineage) as version:
            call = _Call(self, request, body, version, model)
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
        except Refused as refused:
            return self._refused(refused)
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
        except Refused as refused:
            answer = self._refused(refused)
            return answer if self._early is None else await self._end_early(_bytes(answer))
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

    async def _open(self, tried: int = 0) -> Answer:
        """The engine's answer, once there is one; waits for an engine that is down."""
        deadline = time.monotonic() + self.relay.config.hold_s
        for attempt in range(tried, ATTEMPTS):
            await self._wait_up(deadline)
            if (answer := await self._tried(fresh=attempt > 0)) is not None:
                return answer
        raise Refused(503, f"The inference engine closed the connection {ATTEMPTS} times.")

    async def _tried(self, *, fresh: bool) -> Answer | None:
        """One attempt; None if the request may be sent again. Raises Refused.

        It may on a fresh connection, as the other end may have closed the one that was kept; then
        only if the engine is down. Not once a part of an answer has come.
        """
        try:
            return await self._answer(fresh=fresh)
        except NotHttp as error:
            log.warning("turn=%s the engine speaks no HTTP: %r", self.turn_id, error)
            raise Refused(503, "The inference engine's answer is not HTTP.") from error
        except OSError as error:
            log.info("turn=%s the engine gave no answer: %r", self.turn_id, error)
            if out_of_descriptors(error):
                raise self.relay.out_of_files(error) from error
            within = isinstance(error, HeadCut)
            if not fresh and not within:
                return None
            if await self.relay.versions.is_well() or within:
                raise Refused(
                    503, "The inference engine closed the connection without an answer."
                ) from error
            return None

    async def _answer(self, *, fresh: bool) -> Answer:
        """One attempt: with the adapter brought back if it was lost, natively if that is needed."""
        abilities = self.relay.versions.engine.abilities
        if self.version.adapter_name is not None and not abilities.adapters:
            # Found out while the request waited.
            self.version = self.relay.versions.serves(self.version.lineage)
            self._serve(self.serving)
        upstream = await self._post(fresh=fresh)
        if upstream.status == 404 and await self.relay.versions.restored(self.version):
            upstream.close()
            upstream = await self._post()
        if upstream.status in _REFUSED and (plain := self._without_additions()) is not None:
            upstream.close()
            self._serve(plain)
            upstream = await self._post()
            if upstream.status == 200:
                self.relay.versions.engine_refuses_additions()
        if upstream.status != 200 and self.serving.path != self.request.path:
            upstream.close()
            self._serve_natively()
            upstream = await self._post()
        if is_redirect(upstream.status, upstream.headers):
            upstream.close()
            raise redirected(self.serving.path, upstream.status)
        return upstream

    def _without_additions(self) -> Serving | None:
        """The request as it came, if the engine may have refused what was added to it."""
        added = isinstance(self.serving, Direct) and self.serving.additions
        if not added or self.relay.versions.engine.abilities.tells_tokens:
            return None
        return Direct(self.request.path, self.body, self.model, None, additions=False)

    async def _open_with_keep_alive(self) -> Answer:
        """Like `_open`; while the engine is down the client gets its headers, then comments."""
        tried = 0
        if self.relay.versions.up:
            if (answer := await self._tried(fresh=False)) is not None:
                return answer
            tried = 1
        opening = asyncio.create_task(self._open(tried))
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
                await self.relay.versions.wait_admitted()
        except TimeoutError:
            raise Refused(
                503,
                "The inference engine is not available; the request was held and has timed out.",
            ) from None
        except WrongEngineError as error:
            raise Refused(503, f"The inference engine cannot be used: {error}.") from error

    async def _post(self, *, fresh: bool = False) -> Answer:
        target = self.serving.path
        query = self.request.rel_url.raw_query_string
        if query and target == self.request.path:
            target = f"{target}?{query}"
        headers = upstream_headers(self.request.headers)
        return await self.relay.upstream.post(target, headers, self._sent, fresh=fresh)

    def _exchange(self, cut: str | None) -> Exchange:
        serving = self.serving
        return Exchange(
            turn_id=self.turn_id,
            lineage=self.version.lineage,
            explicit_session=explicit_session(self.request.headers, self.body),
            request=serving.chat,
            capture=serving.capture,
            policy_version=self.relay.versions.number_of(serving.capture.model, self.version),
            timings=Timings(self.started_at, self._first_token_s, self._elapsed()),
            cut=cut is not None,
            untrainable=cut or serving.untrainable,
            vague_name=not names_conversation(self.request.headers, self.body),
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

    def _refused(self, refused: Refused) -> web.Response:
        self.relay.counts.failed += 1
        return error_response(self.request.path, refused.status, refused.message)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._clock


def _bytes(answer: web.Response) -> bytes:
    assert isinstance(answer.body, bytes)
    return answer.body


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
    """The client's headers as the engine gets them. Not every server takes two user agents."""
    sent: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        again = name.lower() == "user-agent" and name in sent
        if name.lower() in _SENT_ON and not again:
            sent.add(name, value)
    return sent


def client_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The engine's headers as the client gets them."""
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in _NOT_SENT_BACK
    )


def _is_messages(request: web.Request) -> bool:
    return request.path.startswith(MESSAGES)
