"""The proxy's routes: the relay under /v1/, and NextState's own addresses beside it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import cast

import aiohttp
import orjson
from aiohttp import web
from sqlalchemy.exc import SQLAlchemyError

from nextstate.engine.client import EngineClient
from nextstate.errors import NextStateError, RecordError, StoreError, WaitError
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import MAIN_LINEAGE, Json
from nextstate.store.settling import Reception
from nextstate.store.store import Store
from nextstate.wire import json_object, objects, read_json, write_json
from proxy.answers import Refused, error_response
from proxy.bodies import read_body, refuse_coded, unreadable
from proxy.browsers import foreign, is_preflight, preflight_headers, shared_with
from proxy.config import ProxyConfig
from proxy.feedback import A_MINUTE, Allowance, Said, read_feedback
from proxy.guard import administers, leads_out, refusal, tame
from proxy.lineages import Lineages
from proxy.linking.continuation import session_names
from proxy.metrics import counts_of, exposition
from proxy.pass_through import Passing
from proxy.paths import GENERATING, MODELS, PROBED, resembles_generating
from proxy.recorder import Recorder
from proxy.relay import Relay
from proxy.server import Gate, Runner
from proxy.serving import MESSAGES, compact
from proxy.upstream import Upstream
from proxy.versions import Versions
from proxy.writer_process import WriterProcess

log = logging.getLogger(__name__)

_CALLER: web.RequestKey[str] = web.RequestKey("lineage", str)
_JSON = "application/json"
_GENERATES = ("/v1/chat/completions/batch", "/v1/audio/", "/v1/systemone")
"""What generates in a form that no turn can hold."""
_OPEN_PATHS = frozenset(("/healthz", "/health", "/ping"))
"""Need no key."""
_FOR_WHAT_IT_HOLDS = frozenset((400, 404, 413, 415))
"""What a request is refused with that another one in its place would not be."""
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
        self.gate = Gate()
        self._allowance = Allowance()
        self._relay: Relay | None = None
        self._passing: Passing
        """For what is passed on as it is, once the application runs."""

    @property
    def relay(self) -> Relay:
        """The relay, once the application runs."""
        assert self._relay is not None
        return self._relay

    def runner(self) -> web.AppRunner:
        """Runs the application on a server with vLLM's idea of HTTP, deadlines and a limit."""
        return Runner(self.app(), self.gate)

    def app(self) -> web.Application:
        """The aiohttp application, for `runner`."""
        limit = self.config.max_body_mb * 1024 * 1024
        app = web.Application(client_max_size=limit, middlewares=[self._answered, self._authorize])
        app.cleanup_ctx.append(self._running)
        app.on_response_prepare.append(self._share)
        # One route, so that no answer is the router's own. Who waits with a body is asked for it
        # where it is read.
        app.router.add_route("*", "/{path:.*}", self._route, expect_handler=_ask_later)
        return app

    async def _route(self, request: web.Request) -> web.StreamResponse:
        path, method = request.path, request.method
        ours: dict[str, dict[str, Handler]] = {
            "/healthz": {"GET": self._healthz, "HEAD": self._healthz},
            "/metrics": {"GET": self._metrics, "HEAD": self._metrics},
            "/health": {"GET": self._health, "HEAD": self._health},
            "/ping": {"GET": self._health, "HEAD": self._health, "POST": self._health},
            "/v1/feedback": {"POST": self._feedback},
        }
        if path in ours:
            handler = ours[path].get(method)
            if handler is None:
                raise Refused(405, f"{path} takes {' or '.join(ours[path])}, not {method}.")
            return await handler(request)
        if path in GENERATING and method == "POST":
            return await self._generate(request)
        if path == MODELS and method == "GET":
            return await self._models(request)
        known = path.startswith("/v1/") or path in PROBED
        if not known or leads_out(path) or resembles_generating(path):
            raise Refused(404, f"There is no {path[:200]}.")
        return await self._pass(request)

    async def _running(self, app: web.Application) -> AsyncGenerator[None]:
        # Compressed, an answer could not be read.
        headers = {"Accept-Encoding": "identity"}
        if self._engine_key:
            headers["Authorization"] = f"Bearer {self._engine_key}"
        async with (
            Passing(self.config, self.versions, headers, self._out_of_files) as self._passing,
            Upstream(self.engine.url, headers | {"Content-Type": _JSON}) as upstream,
        ):
            self._relay = Relay(
                self.config, self.versions, self.recorder, upstream, self._out_of_files
            )
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
                with suppress(WaitError):  # the others take a silent one for gone
                    await asyncio.to_thread(self.store.leave, self._worker)

    def _counts(self) -> dict[str, int]:
        return counts_of(self.relay.counts, self.recorder.counts, self.versions, self.gate)

    def _beat(self) -> None:
        self.store.beat(self._worker or "", self.versions.in_use(), self._counts())

    @web.middleware
    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Puts what goes wrong in a request into the API's words."""
        try:
            return await handler(request)
        except Refused as error:
            if request.path in GENERATING and error.status in _FOR_WHAT_IT_HOLDS:
                self.relay.counts.unrecorded["refused"] += 1
            return error_response(request.path, error.status, error.message)
        except aiohttp.ClientConnectionResetError:
            return web.Response(status=499)  # the client has left: nobody reads this
        except web.RequestPayloadError as error:
            return unreadable(request, error)

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        sent = bearer if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        caller = self.lineages.caller(sent)
        without_key = self.lineages.main_key is None and caller in (None, MAIN_LINEAGE)
        preflight = is_preflight(request.method, request.headers)
        if preflight and self.lineages.apart:
            without_key = False  # the request that follows may bring a lineage's key
        if without_key and (why := foreign(request.headers, self.config.host)) is not None:
            raise Refused(403, why)
        if preflight:
            return web.Response(status=204, headers=preflight_headers(request.headers))
        if caller is not None:
            request[_CALLER] = caller
        elif request.path not in _OPEN_PATHS:
            raise Refused(401, "Wrong or missing API key: send it as a bearer key.")
        refuse_coded(request)
        return await handler(request)

    async def _share(self, request: web.Request, response: web.StreamResponse) -> None:
        """Lets the page that asked read what it gets; a foreign one was refused."""
        if response.status != 403:
            has_key = self.lineages.main_key is not None
            response.headers.update(shared_with(request.headers, has_key))

    def _out_of_files(self, error: BaseException) -> Refused:
        self.gate.ran_out(error)
        return Refused(503, "The proxy has no files left for a connection to the engine.")

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        data = await read_body(request, self.config.max_body_mb)
        try:
            body = read_json(data)
        except ValueError as error:
            return await self._unserved(request, data, "body", f"The body is no JSON: {error}.")
        if not isinstance(body, dict):
            return await self._unserved(request, data, "body", "The body is no JSON object.")
        if request.content_type != _JSON:
            message = f"Content-Type: {request.content_type}: expected {_JSON}."
            return await self._unserved(request, data, "content_type", message)
        body = cast(Json, body)
        self._guard(body)
        lineage = self._lineage(request, body)
        if lineage is None:
            served = ", ".join((self.engine.model, *self.lineages.models(request[_CALLER])))
            message = f"The model `{body.get('model')!s:.200}` is not served here: use {served}."
            return await self._unserved(request, data, "model", message)
        self._tame(request, body, lineage)
        try:
            return await self.relay.generate(request, body, lineage, body["model"])
        except ValueError as error:
            raise Refused(400, f"The body cannot be passed on: {error}.") from error

    async def _unserved(
        self, request: web.Request, data: bytes, reason: str, message: str
    ) -> web.StreamResponse:
        """The engine's own answer to a request that it has to refuse.

        An engine that takes it all the same would answer with its base model, for which nobody
        asked: then the answer is `message`.
        """
        self.relay.counts.unrecorded[reason] += 1
        return await self._passing.forward(request, data, refused=message)

    def _tame(self, request: web.Request, body: Json, lineage: str) -> None:
        generates = request.path in GENERATING or request.path.startswith(_GENERATES)
        tame(body, lineage, salted=generates and self.lineages.apart)

    def _guard(self, body: Json) -> None:
        """Raises Refused for a request that must not reach the engine."""
        found = refusal(
            body,
            max_choices=self.config.max_choices,
            names_adapter=self.versions.is_adapter(str(body.get("model"))),
        )
        if found is not None:
            raise found

    async def _models(self, request: web.Request) -> web.StreamResponse:
        caller = request[_CALLER]

        def shown(body: bytes) -> bytes:
            listed = json_object(body)
            if listed is None or "data" not in listed:
                return body
            # No other model that the engine has generates here; its root may be a folder.
            base = [m for m in objects(listed["data"]) if m.get("id") == self.engine.model]
            names = (self.engine.model, *self.lineages.models(caller))
            root = self.engine.model
            listed["data"] = [{**m, "id": name, "root": root} for m in base for name in names]
            return compact(listed)

        return await self._passing.forward(request, None, shown)

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        if administers(request.path):
            message = f"{request.path} administers the engine: it is not for agents."
            return _refused(request, 403, "PermissionDeniedError", message)
        generates = request.path.startswith(_GENERATES)
        if generates:
            self.relay.counts.unrecorded["route"] += 1
        if request.method != "POST" or request.content_type.startswith("multipart/"):
            if generates and self.versions.serves(request[_CALLER]).adapter_name is not None:
                message = f"{request.path} takes a form: the serving version cannot answer it."
                return _refused(request, 400, "BadRequestError", message)
            return await self._passing.forward(request, None)
        data = await read_body(request, self.config.max_body_mb)
        try:
            body = read_json(data)
        except ValueError:  # the engine says what is wrong with it
            return await self._passing.forward(request, data)
        if not isinstance(body, dict):
            return await self._passing.forward(request, data)
        body = cast(Json, body)
        self._guard(body)
        lineage = self._lineage(request, body)
        if lineage is None:
            return await self._passing.forward(request, data)
        self._tame(request, body, lineage)
        async with self.versions.hold(lineage) as version:
            served, named = version.adapter_name or self.engine.model, str(body["model"])
            try:
                sent = write_json({**body, "model": served})
            except ValueError as error:
                raise Refused(400, f"The body cannot be passed on: {error}.") from error

            def renamed(part: bytes) -> bytes:
                # Quotes inside of a JSON string are escaped: this is always a key and its value.
                return part.replace(_named(served), _named(named))

            return await self._passing.forward(request, sent, renamed, version)

    def _lineage(self, request: web.Request, body: Json) -> str | None:
        """The lineage that a request's model belongs to, or None; names it where it is left out."""
        if body.get("model") in (None, "") and not request.path.startswith(MESSAGES):
            body["model"] = self.engine.model  # as the engine takes it, but not in this dialect
        model = body.get("model")
        return self.lineages.of(request[_CALLER], model) if isinstance(model, str) else None

    async def _feedback(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/json":
            found = request.headers.get("Content-Type", "none")
            raise Refused(415, f"Content-Type: {found[:100]!r}: feedback is application/json.")
        try:
            said = read_feedback(await read_body(request, self.config.max_body_mb))
        except RecordError as error:
            return _refused(request, 400, "BadRequestError", f"Feedback: {error}.")
        if wait_s := self._allowance.wait_s(request[_CALLER]):
            message = f"This key gave feedback more than {A_MINUTE:g} times in a minute."
            response = _refused(request, 429, "RateLimitError", message)
            response.headers["Retry-After"] = str(wait_s)
            return response
        try:
            found = await asyncio.to_thread(self._receive, said, request[_CALLER])
        except (WaitError, SQLAlchemyError, OSError) as error:
            log.warning("feedback on turn=%s could not be stored: %s", said.turn_id, error)
            message = "The store cannot be written now."
            return _refused(request, 503, "ServiceUnavailableError", message)
        except StoreError:  # it was forgotten at this moment
            found = None
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
        found: Json = {
            "proxy": "up",
            "engine": "up" if self.versions.up else "down",
            "engine_problem": self.versions.wrong,
            "learning_lacks": self.engine.abilities.lacks,
            "turns_waiting": self.recorder.counts.waiting,
        }
        caller = request.get(_CALLER)
        if caller is not None:
            serving = {name: self.versions.serves(name).number for name in self.versions.serving}
            found["version"] = serving[caller]
            found["lineages"] = {
                name: number for name, number in serving.items() if self.lineages.sees(caller, name)
            }
            found["connections"] = {"open": len(self.gate.fronts), "limit": self.gate.limit}
        return web.json_response(found)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        """As the engine answers a probe, and at once: 200 and nothing, or a 503."""
        if not self.versions.up:
            raise Refused(503, "The inference engine is not available.")
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        try:
            stored = await asyncio.to_thread(self.store.counts)
            others = await asyncio.to_thread(self.store.others, self._worker or "")
        except (NextStateError, SQLAlchemyError, OSError) as error:
            log.warning("counting the store failed: %s", error)
            stored, others = {}, []
        counts = Counter(self._counts())
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


def _named(model: str) -> bytes:
    return b'"model":' + orjson.dumps(model)


def _refused(request: web.Request, status: int, kind: str, message: str) -> web.Response:
    return error_response(request.path, status, message, kind)


async def _ask_later(_: web.Request) -> None:
    """Does nothing yet about `Expect: 100-continue`."""
