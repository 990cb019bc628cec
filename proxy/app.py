"""The proxy's routes: the relay under /v1/, and NextState's own addresses beside it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Protocol

import aiohttp
from aiohttp import web

from nextstate.engine.client import EngineClient
from nextstate.errors import NextStateError, WaitError
from nextstate.keys import BEGINNING, Scope, hashed
from nextstate.records import MAIN_LINEAGE, Json
from nextstate.store import Store
from nextstate.store.episodes import API_KEY, Named
from proxy.allowance import REQUESTS_A_MINUTE, REQUESTS_AT_ONCE, Allowance
from proxy.answers import Refused, error_response
from proxy.bodies import refuse_coded, unreadable
from proxy.browsers import foreign, is_preflight, preflight_headers, shared_with
from proxy.config import ProxyConfig
from proxy.dispatch import Dispatch
from proxy.engine_call import Engine
from proxy.episode_calls import EPISODE, EpisodeCalls
from proxy.episodes import EpisodeRoutes
from proxy.feedback import FeedbackRoute
from proxy.intervals import INTERVALS, Intervals
from proxy.keys import ANYBODY, GRANT, Grant, Keys, sent_key
from proxy.lineages import CALLER, Lineages
from proxy.metrics import EXPOSITION, counts_of, exposition
from proxy.paths import EPISODES, EXAMS, GENERATING, GROUPS, is_ours
from proxy.recorder import Recorder
from proxy.relay import Relay
from proxy.scopes import needed
from proxy.server import Connections, Runner
from proxy.tries import Tries
from proxy.versions import Versions
from proxy.writer_process import WriterProcess

log = logging.getLogger(__name__)

_OF_EPISODES = frozenset((Scope.CHAT,))
"""What an episode's own key may do."""
_FOR_WHAT_IT_HOLDS = frozenset((400, 404, 413, 415))
"""The statuses of requests that are refused for what they hold."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pages(Protocol):
    """Web pages beside the API, which decide themselves who may see them."""

    def serves(self, path: str) -> bool:
        """Whether a path is theirs."""
        ...

    async def handle(self, request: web.Request) -> web.StreamResponse: ...

    async def close(self) -> None:
        """Ends the answers that have no end of their own."""
        ...


class Proxy:
    """The parts behind the routes."""

    def __init__(
        self,
        config: ProxyConfig,
        store: Store,
        engines: Sequence[EngineClient],
        profile: str,
        *,
        writer: WriterProcess,
        zero_adapter: Path,
        record: bool,
        lineages: Lineages,
        engine_key: str | None,
        own_key: str | None = None,
        worker: str | None = None,
        intervals: Intervals = INTERVALS,
        of_episodes: Json | None = None,
    ) -> None:
        """`of_episodes` are fields of each request to the engine that is a call of an episode."""
        self.config = config
        self.store = store
        self.engines = engines
        self.lineages = lineages
        self.keys = Keys(lineages, store.keys, own_key, closed=not config.loopback)
        self.tries = Tries()
        self.requests = Allowance(REQUESTS_AT_ONCE, REQUESTS_A_MINUTE)
        # Compressed, an answer could not be read.
        headers = {"Accept-Encoding": "identity"}
        if engine_key:
            headers["Authorization"] = f"Bearer {engine_key}"
        self.versions = Versions(
            store, engines, lineages.names, zero_adapter, worker, intervals, headers
        )
        self.recorder = Recorder(
            writer, store.config, profile, config.record_timeout_s, enabled=record
        )
        self._worker = worker
        self._of_episodes = of_episodes or {}
        self._intervals = intervals
        self.connections = Connections()
        self.feedback = FeedbackRoute(store, lineages, profile, config.max_body_mb, writer.redactor)
        self.calls = EpisodeCalls(store, self.keys, worker, writer.redactor)
        self.episodes = EpisodeRoutes(
            store,
            lineages,
            self.recorder,
            self.calls,
            self.versions,
            config.max_body_mb,
            intervals.drain_s,
            writer.redactor,
        )
        self._own_routes: dict[str, dict[str, Handler]] = {
            EPISODES: {"POST": self.episodes.open},
            GROUPS: {"POST": self.episodes.open_group},
            EXAMS: {"POST": self.episodes.hold_exams},
            "/healthz": {"GET": self._healthz, "HEAD": self._healthz},
            "/metrics": {"GET": self._metrics, "HEAD": self._metrics},
            "/health": {"GET": self._health, "HEAD": self._health},
            "/ping": {"GET": self._health, "HEAD": self._health, "POST": self._health},
            "/v1/feedback": {"POST": self.feedback.handle},
        }
        self.pages: Pages | None = None
        # Once the application runs:
        self.relay: Relay
        self.dispatch: Dispatch

    def runner(self) -> web.AppRunner:
        """Runs the application on a server with vLLM's idea of HTTP, deadlines and a limit."""
        return Runner(self.app(), self.connections, self._intervals)

    def app(self) -> web.Application:
        """The aiohttp application, for `runner`."""
        limit = self.config.max_body_mb * 1024 * 1024
        app = web.Application(client_max_size=limit)
        app.cleanup_ctx.append(self._running)
        app.on_response_prepare.append(self._share)
        app.on_shutdown.append(self._close_pages)
        # One route, so that no answer is the router's own. Who waits with a body is asked for it
        # where it is read.
        app.router.add_route("*", "/{path:.*}", self._handle, expect_handler=_ask_later)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        """The answer to any request; what goes wrong is said in the API's words."""
        try:
            if self.pages is not None and self.pages.serves(request.path):
                return await self.pages.handle(request)
            answered = await self._authorize(request)
            return await self._route(request) if answered is None else answered
        except Refused as error:
            if request.path in GENERATING and error.status in _FOR_WHAT_IT_HOLDS:
                self.relay.counts.unrecorded["refused"] += 1
            return error_response(
                request.path, error.status, error.message, error.kind, error.wait_s
            )
        except aiohttp.ClientConnectionResetError:
            return web.Response(status=499)  # the client has left: nobody reads this
        except web.RequestPayloadError as error:
            return unreadable(request, error)

    async def _authorize(self, request: web.Request) -> web.StreamResponse | None:
        """Finds out what a request may do. Answers a browser's preflight. Raises Refused."""
        headers = request.headers
        grant, by_key = await self._grant(request, sent_key(headers))
        preflight = is_preflight(request.method, headers)
        # After a preflight may follow a request with a lineage's key.
        without_key = grant is ANYBODY and not (preflight and self.keys.apart)
        if without_key and (why := foreign(headers, self.config.host)) is not None:
            raise Refused(403, why)
        if preflight:
            return web.Response(status=204, headers=preflight_headers(headers))
        scope = needed(request.method, request.path)
        if grant is not None:
            request[CALLER], request[GRANT] = grant.lineage, grant
            self._check(request, grant, scope)
        elif scope is not None:
            raise Refused(401, "Wrong or missing API key: send it as a bearer key.")
        refuse_coded(request)
        if grant is not None and not is_ours(request.path):
            episode = await self.calls.named(headers, grant, by_key)
            if episode is not None:
                request[EPISODE], request[CALLER] = episode, episode.lineage
        return None

    async def _grant(self, request: web.Request, sent: str) -> tuple[Grant | None, Named | None]:
        """(what a request with this key may do, the episode whose key it is). Raises Refused."""
        anybody = None if self.keys.needed else ANYBODY
        if not sent:
            return anybody, None
        address, hash_ = request.remote or "", hashed(sent)
        grant, by_key = self.keys.find(hash_), None
        # A key that a program drew is found by nobody's tries: they are no reason to refuse it.
        ours = sent.startswith(API_KEY) if grant is None else not grant.chosen
        if self.keys.needed and not ours and (wait_s := self.tries.wait_s(address, hash_)):
            message = f"Many wrong API keys came from your address: wait {wait_s} seconds."
            raise Refused(429, message, wait_s=wait_s)
        try:
            by_key = await self.calls.of_key(sent) if grant is None else None
        except Refused as error:
            if error.status == 401:
                self.tries.failed(address, hash_)
            raise
        if by_key is not None:
            grant = Grant(f"episode {by_key.id}", by_key.lineage, _OF_EPISODES, limited=False)
        if grant is not None:
            self.tries.succeeded(address, hash_)
        elif self.keys.needed:
            self.tries.failed(address, hash_)
        elif sent.startswith(BEGINNING):
            anybody = None  # a key that was removed is nobody's: its client is not everybody
        return grant or anybody, by_key

    def _check(self, request: web.Request, grant: Grant, scope: Scope | None) -> None:
        """Raises Refused for what a key may not do, or not so often."""
        if scope is None:
            return
        if not grant.may(scope):
            if grant.scopes is _OF_EPISODES:
                why = f"An episode's key calls the model only, not {request.path[:200]}."
                raise Refused(403, why)
            raise Refused(
                403,
                f"{request.path[:200]} needs a key with the scope {scope}, and this one has "
                f"{', '.join(sorted(grant.scopes))}: see `nextstate keys`.",
            )
        if grant.limited and (wait_s := self.requests.wait_s(grant.who)):
            message = (
                f"This key sent more than {REQUESTS_A_MINUTE:g} requests a minute: wait {wait_s} s."
            )
            raise Refused(429, message, wait_s=wait_s)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        path, method = request.path, request.method
        if not is_ours(path):
            return await self.dispatch.handle(request)
        taken = self._own_routes.get(path) or self.episodes.routes_of_one(path)
        if method not in taken:
            raise Refused(405, f"{path} takes {' or '.join(taken)}, not {method}.")
        return await taken[method](request)

    async def _running(self, app: web.Application) -> AsyncGenerator[None]:
        async with AsyncExitStack() as opened:
            for replica in self.versions.replicas:
                await opened.enter_async_context(replica.upstream)
            engine = Engine(self.config, self.versions, self._out_of_files, self._intervals)
            self.relay = Relay(engine, self.recorder, self._of_episodes)
            self.dispatch = Dispatch(self.relay, self.keys, self.calls)
            keys_s, beat_s = self._intervals.keys_s, self._intervals.beat_s
            if self.store.database.tells_changes:
                keys_s, beat_s = self._intervals.told_keys_s, self._intervals.told_beat_s
            tasks = [
                asyncio.create_task(self.recorder.run()),
                asyncio.create_task(self.versions.run()),
                asyncio.create_task(_every(keys_s, self.keys.refresh)),
                asyncio.create_task(_every(self._intervals.checkpoint_s, self.store.checkpoint)),
            ]
            if self._worker is not None:
                with suppress(WaitError):  # what one of this name held before a kill is free
                    await asyncio.to_thread(self.store.workers.leave, self._worker)
                tasks.append(asyncio.create_task(_every(beat_s, self._beat)))
            for task in tasks:
                task.add_done_callback(_end_if_failed)
            # Without it the first replies would end before their turns can be recorded.
            await self.recorder.wait_ready(self._intervals.writer_s)
            yield
            await self.recorder.drain(self._intervals.drain_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.versions.whole.close()
            if self._worker is not None:
                with suppress(WaitError):  # the others notice when its signs of life end
                    await asyncio.to_thread(self.store.workers.leave, self._worker)

    async def _close_pages(self, app: web.Application) -> None:
        if self.pages is not None:
            await self.pages.close()

    def _counts(self) -> dict[str, float]:
        return counts_of(self.relay.counts, self.recorder.counts, self.versions, self.connections)

    def _beat(self) -> None:
        self.store.workers.beat(self._worker or "", self.versions.in_use(), self._counts())
        self.calls.free_ended()

    async def _share(self, request: web.Request, response: web.StreamResponse) -> None:
        """Lets the page that asked read the answer. Another site's page was refused."""
        if self.pages is not None and self.pages.serves(request.path):
            return  # not even the pages of this machine's other programs
        if "Origin" in request.headers and response.status != 403:
            response.headers.update(shared_with(request.headers, self.keys.needed))

    def _out_of_files(self, error: BaseException) -> Refused:
        self.connections.ran_out(error)
        return Refused(503, "The proxy has no files left for a connection to the engine.")

    def health(self) -> Json:
        """What `/healthz` tells everybody."""
        return {
            "proxy": "up",
            "engine": "up" if self.versions.up else "down",
            "engine_problem": self.versions.wrong,
            "learning_lacks": self.versions.lacks,
            "turns_waiting": self.recorder.counts.waiting,
        }

    def health_in_full(self) -> Json:
        """The same, and each of several engines."""
        return {**self.health(), "engines": self._engines()}

    def _engines(self) -> list[Json]:
        versions = self.versions
        return [] if versions.alone else [replica.health() for replica in versions.replicas]

    async def _healthz(self, request: web.Request) -> web.StreamResponse:
        found = self.health()
        caller = request.get(CALLER)
        if caller is not None:
            serving = {name: self.versions.serves(name).number for name in self.versions.serving}
            found["version"] = serving[caller]
            found["engine_trouble"] = self.versions.trouble
            found["engines"] = self._engines()
            found["lineages"] = {
                name: number for name, number in serving.items() if self.lineages.sees(caller, name)
            }
            found["connections"] = {
                "open": len(self.connections.opened),
                "limit": self.connections.limit,
            }
        return web.json_response(found)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        """What the engine answers to a probe, at once: an empty 200, or a 503."""
        if not self.versions.up:
            raise Refused(503, "The inference engine is not available.")
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        if request.get(CALLER, MAIN_LINEAGE) != MAIN_LINEAGE:
            raise Refused(403, "The metrics are of all lineages: use a key that is bound to none.")
        try:
            stored = await asyncio.to_thread(self.store.counts)
            worker = self._worker or ""  # another machine's proxies are asked themselves
            ours = "".join(worker.partition("@")[1:])
            others = await asyncio.to_thread(self.store.workers.others, worker, ours)
        except (NextStateError, OSError) as error:
            log.warning("counting the store failed: %s", error)
            stored, others = {}, []
        counts = Counter[str]()
        for theirs in (self._counts(), *(found for _, found in others)):
            counts.update(theirs)
        text = exposition(counts, self.versions, stored)
        return web.Response(body=text.encode(), headers={"Content-Type": EXPOSITION})


def _end_if_failed(task: asyncio.Task[None]) -> None:
    """Ends the process with SIGTERM if a task that it needs has failed."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("%s has failed: the proxy ends", task.get_coro(), exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


async def _every(pause_s: float, work: Callable[[], None]) -> None:
    """Calls `work` again and again. A failure is logged and tried again."""
    while True:
        try:
            await asyncio.to_thread(work)
        except (NextStateError, OSError) as error:
            log.warning("%s failed: %s", work.__name__, error)
        await asyncio.sleep(pause_s)


async def _ask_later(_: web.Request) -> None:
    """Leaves `Expect: 100-continue` to whoever reads the body."""
