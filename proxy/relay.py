"""The way of a reply back to the client: passed on as it comes, and recorded before its end.

`Relay.generate` is for requests whose replies become turns, `Relay.pass_on` for all others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from nextstate.records import Json, PolicyVersion, Timings, new_id
from proxy.answers import Refused, error_response
from proxy.dialects.chat import is_off
from proxy.engine_call import Engine, EngineCall, client_headers
from proxy.episode_calls import EPISODE
from proxy.exchange import Exchange
from proxy.keys import GRANT
from proxy.linking.names import explicit_session, named_kind, names_conversation
from proxy.metrics import Times
from proxy.recorder import Recorder
from proxy.routing import conversation_key
from proxy.serving import MESSAGES, Passed, Recorded, recorded_form
from proxy.sse import EventSplitter
from proxy.upstream import Answer, Cut
from proxy.versions import Held

log = logging.getLogger(__name__)

_HELD_BEFORE_HEADERS_S = 1.0
"""A streamed request that waits longer for the engine gets its headers and keep-alive comments."""
_EVENTS = "text/event-stream"
_DONE = b"data: [DONE]\n\n"
_CUT_IN_TIME = "its episode's deadline_s passed before the end"
_OVER_TIME = (
    "The episode's deadline_s has passed during this call, which is cut: close it as truncated."
)


@dataclass(slots=True)
class RelayCounts:
    """Shown under /metrics."""

    requests: int = 0
    of_episodes: int = 0
    """Those of them that are calls in episodes: nobody waits for their replies."""
    failed: int = 0
    """Requests that the proxy answered with an error because the engine did not answer."""
    cut: int = 0
    """Streams that the engine cut or that the client left."""
    unrecorded: Counter[str] = field(default_factory=Counter[str])
    """Requests to generate that no turn holds, by the reason."""
    first_token: Times = field(default_factory=Times)
    reply: Times = field(default_factory=Times)
    """How long replies took, also those that were cut."""


@dataclass(slots=True)
class Relay:
    """Relays requests to the engines. It holds no state of a request."""

    engine: Engine
    recorder: Recorder
    of_episodes: Json = field(default_factory=dict[str, Any])
    """Fields of each request to the engine that is a call of an episode."""
    counts: RelayCounts = field(default_factory=RelayCounts)

    async def generate(
        self,
        request: web.Request,
        body: Json,
        lineage: str,
        model: str,
        *,
        version: PolicyVersion | None = None,
        seconds: float | None = None,
        recorded: bool = True,
    ) -> web.StreamResponse:
        """Relays one request, which names `model`, and records its turn before its end is seen.

        `version` serves it, or, with None, what serves the lineage. After `seconds` it is cut. If
        it is not to be `recorded`, nothing of it is kept.
        Raises ValueError if the request is nested too deep to be written as JSON.
        """
        self.counts.requests += 1
        if not (recorded and self.recorder.enabled):
            self.counts.unrecorded["recording_off"] += 1
        versions, episode = self.engine.versions, request.get(EPISODE)
        key = None
        if not versions.alone:
            key = conversation_key(request.headers, body, lineage, episode and episode.id)
        with versions.hold(lineage, version, key) as held:
            self.counts.of_episodes += episode is not None
            sampling: Json = {} if episode is None else episode.sampling
            engine = held.replica.client
            more = {} if episode is None else self.of_episodes
            serving = recorded_form(request.path, body, model, engine, sampling, more)
            generation = _Generation(self, request, body, serving, held, recorded)
            streams = not is_off(body.get("stream"))
            work = generation.streamed if streams else generation.plain
            return await (work() if seconds is None else generation.in_time(work, seconds))

    async def pass_on(
        self,
        request: web.Request,
        serving: Passed,
        held: Held | None = None,
        refused: str | None = None,
    ) -> web.StreamResponse:
        """Relays one request without a record.

        `held` has the version that the request names. The client gets `refused` as an error if the
        engine does not refuse the request itself. Raises Refused if the engine gives no answer,
        ValueError as `generate` does.
        """
        held = held or self.engine.versions.unheld()
        answer = await EngineCall(self.engine, request, serving, held).open()
        try:
            if refused is not None and answer.status < 400:
                return error_response(request.path, 400, refused)
            headers = client_headers(answer.headers)
            is_stream = answer.headers.get("Content-Type", "").lower().startswith(_EVENTS)
            if serving.changes and not is_stream:
                data, error = await _read(answer)
                # Of a broken answer only the head goes out: what came is not renamed.
                data = serving.reply(data) if error is None else b""
                return await _whole_answer(request, answer, headers, data, error)
            return await _pass_body(request, answer, headers, serving if serving.changes else None)
        finally:
            answer.close()


class _Generation:
    """One request while its reply is generated."""

    def __init__(
        self,
        relay: Relay,
        request: web.Request,
        body: Json,
        serving: Recorded,
        held: Held,
        recorded: bool,
    ) -> None:
        self._relay = relay
        self._recorded = recorded and relay.recorder.enabled
        self._request = request
        self._body = body
        self._call: EngineCall[Recorded] = EngineCall(relay.engine, request, serving, held)
        self._turn_id = new_id("turn")
        self._started_at = time.time()
        self._clock = time.perf_counter()
        self._first_token_s: float | None = None
        self._early: web.StreamResponse | None = None
        """The response to a streamed request that had to wait for the engine."""
        self._prepared: web.StreamResponse | None = None
        """The response whose head is out."""
        self._limit: asyncio.Timeout | None = None
        """The end of its episode's time."""

    @property
    def _serving(self) -> Recorded:
        return self._call.serving

    @property
    def _version(self) -> PolicyVersion:
        assert self._call.version is not None
        return self._call.version

    async def in_time(
        self, work: Callable[[], Awaitable[web.StreamResponse]], seconds: float
    ) -> web.StreamResponse:
        """What `work` returns; after `seconds` it is cut, and the client is told why."""
        self._limit = asyncio.timeout(seconds)
        try:
            async with self._limit:
                return await work()
        except TimeoutError:
            if not self._limit.expired():
                raise
        response = self._refused(Refused(400, _OVER_TIME, "EpisodeBudgetError"))
        if self._prepared is None:
            return response
        assert isinstance(response.body, bytes)
        return await self._end_early(self._prepared, response.body)

    async def plain(self) -> web.StreamResponse:
        """A reply in one body."""
        try:
            while True:
                answer, data, error = await self._whole()
                if error is not None or answer.status != 200:
                    return await self._pass_whole(answer, data, error)
                sent = self._serving.reply(data)
                if sent is not None:
                    break
                plainer = self._serving.plainer()
                assert plainer is not None
                self._call.use(plainer)
        except Refused as refused:
            return self._refused(refused)
        self._first_token_s = self._elapsed()
        await self._record(None)
        return web.Response(body=sent, headers=self._headers(answer))

    async def _whole(self) -> tuple[Answer, bytes, Cut | None]:
        answer = await self._call.open()
        try:
            return answer, *await _read(answer)
        finally:
            answer.close()

    async def streamed(self) -> web.StreamResponse:
        """A reply as events, passed on as they arrive."""
        try:
            answer = await self._open_with_keep_alive()
        except Refused as refused:
            response = self._refused(refused)
            if self._early is None:
                return response
            assert isinstance(response.body, bytes)
            return await self._end_early(self._early, response.body)
        try:
            if answer.status != 200:
                data, error = await _read(answer)
                if self._early is not None:
                    return await self._end_early(self._early, data)
                return await self._pass_whole(answer, data, error)
            response = self._early
            if response is None:
                response = web.StreamResponse(headers=self._headers(answer))
                await response.prepare(self._request)
            self._prepared = response
            await self._relay_events(answer, response)
            return response
        finally:
            answer.close()

    async def _pass_whole(
        self, answer: Answer, data: bytes, error: Cut | None
    ) -> web.StreamResponse:
        if error is not None:
            self._relay.counts.cut += 1
        return await _whole_answer(self._request, answer, self._headers(answer), data, error)

    async def _end_early(self, early: web.StreamResponse, error: bytes) -> web.StreamResponse:
        """Sends an error as an event: the headers are out already."""
        name = b"event: error\n" if self._request.path.startswith(MESSAGES) else b""
        await early.write(name + b"data: " + error + b"\n\n")
        await early.write_eof()
        return early

    async def _relay_events(self, answer: Answer, response: web.StreamResponse) -> None:
        splitter = EventSplitter()
        serving = self._serving
        finished, choices = serving.capture.finished, serving.choices
        held: list[bytes] = []
        try:
            while data := await answer.read():
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
                    # From the finish reason on nothing goes out before the turn is recorded. The
                    # same holds for the end of a stream without one, for example after an error.
                    ended = len(finished) >= choices or event.endswith(_DONE)
                    (held if ended else passed).append(sent)
                if sent := b"".join(passed):
                    await response.write(sent)
        except Cut as error:
            await self._cut_off(response, b"".join(held) + splitter.rest, error)
            return
        except (asyncio.CancelledError, OSError):
            self._relay.counts.cut += 1
            why = "the client left before the end"
            if self._limit is not None and self._limit.expired():
                why = _CUT_IN_TIME
            exchange = self._exchange(why)
            if self._recorded:
                self._relay.recorder.submit(exchange)
            raise
        if serving.broken:
            await self._cut_off(response, b"".join(held), "an error in the stream")
            return
        await self._record(None)
        await response.write_eof(b"".join(held) + splitter.rest)

    async def _cut_off(self, response: web.StreamResponse, rest: bytes, error: object) -> None:
        """Passes a cut on as a cut: the client must not take a broken reply for a whole one."""
        self._relay.counts.cut += 1
        log.warning("turn=%s the engine cut the stream: %r", self._turn_id, error)
        await self._record("the engine cut the reply")
        await response.write(rest)
        _abort(self._request)

    async def _open_with_keep_alive(self) -> Answer:
        """`EngineCall.open`; while the engine is down the client gets headers, then comments."""
        versions = self._relay.engine.versions
        tried = 0
        if versions.up:
            if (answer := await self._call.attempt(fresh=False)) is not None:
                return answer
            tried = 1
        opening = asyncio.create_task(self._call.open(tried))
        pause = _HELD_BEFORE_HEADERS_S
        try:
            while not (await asyncio.wait({opening}, timeout=pause))[0]:
                if versions.up:
                    continue  # the engine works on it: its own headers will come
                if self._early is None:
                    headers = {"Content-Type": f"{_EVENTS}; charset=utf-8", **self._own_headers()}
                    self._early = self._prepared = web.StreamResponse(headers=headers)
                    await self._early.prepare(self._request)
                await self._early.write(b": waiting for the engine\n\n")
                pause = self._relay.engine.intervals.keep_alive_s
        except BaseException:
            opening.add_done_callback(_close_result)
            opening.cancel()
            raise
        return opening.result()

    async def _record(self, cut: str | None) -> None:
        exchange = self._exchange(cut)
        if self._recorded:
            await self._relay.recorder.record(exchange)

    def _exchange(self, cut: str | None) -> Exchange:
        serving, headers = self._serving, self._request.headers
        name, own = explicit_session(headers, self._body), names_conversation(headers, self._body)
        episode, grant = self._request.get(EPISODE), self._request.get(GRANT)
        if episode is not None and (not own or name == episode.id):
            name = None  # what it names is not a conversation within the episode
        number = self._relay.engine.versions.number_of(serving.capture.model, self._version)
        timings = Timings(self._started_at, self._first_token_s, self._elapsed())
        self._relay.counts.reply.add(timings.total_s)
        if timings.first_token_s is not None:
            self._relay.counts.first_token.add(timings.first_token_s)
        return Exchange(
            turn_id=self._turn_id,
            lineage=self._version.lineage,
            explicit_session=name,
            request=serving.chat,
            capture=serving.capture,
            policy_version=number,
            timings=timings,
            cut=cut is not None,
            untrainable=cut or serving.untrainable,
            vague_name=not own,
            kind=named_kind(headers),
            defaults=self._call.replica.client.sampling_defaults,
            episode=episode and episode.id,
            held_out=episode is not None and episode.held_out,
            client="" if grant is None or episode is not None else grant.client,
            engine=self._call.replica.name,
        )

    def _headers(self, answer: Answer) -> CIMultiDict[str]:
        headers = client_headers(answer.headers)
        headers.update(self._own_headers())
        return headers

    def _own_headers(self) -> dict[str, str]:
        version = {"x-nextstate-version": str(self._version.number)}
        return {"x-nextstate-turn": self._turn_id, **version} if self._recorded else version

    def _refused(self, refused: Refused) -> web.Response:
        self._relay.counts.failed += 1
        return error_response(self._request.path, refused.status, refused.message, refused.kind)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._clock


async def _read(answer: Answer) -> tuple[bytes, Cut | None]:
    """The body as far as it came, and what cut it off."""
    parts: list[bytes] = []
    try:
        while part := await answer.read():
            parts.append(part)
    except Cut as error:
        return b"".join(parts), error
    return b"".join(parts), None


async def _pass_body(
    request: web.Request, answer: Answer, headers: CIMultiDict[str], serving: Passed | None
) -> web.StreamResponse:
    """Passes a body on as it comes, its events changed by `serving`."""
    response = web.StreamResponse(status=answer.status, headers=headers)
    response.content_length = answer.content_length
    await response.prepare(request)
    splitter = EventSplitter()
    try:
        while data := await answer.read():
            if serving is not None:
                data = b"".join(map(serving.reply, splitter.feed(data)))
            await response.write(data)
    except Cut as error:
        log.warning("%s %s: the engine cut the answer: %s", request.method, request.path, error)
        _abort(request)
        return response
    await response.write_eof(splitter.rest)
    return response


async def _whole_answer(
    request: web.Request,
    answer: Answer,
    headers: CIMultiDict[str],
    data: bytes,
    error: Cut | None,
) -> web.StreamResponse:
    """An answer with the body `data`; broken off after it if the engine broke off."""
    if error is None:
        return web.Response(status=answer.status, body=data, headers=headers)
    log.warning("%s %s: the engine cut the answer: %s", request.method, request.path, error)
    response = web.StreamResponse(status=answer.status, headers=headers)
    response.content_length = answer.content_length
    await response.prepare(request)
    await response.write(data)
    _abort(request)
    return response


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _close_result(opening: asyncio.Task[Answer]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
