"""Which way a request under /v1/ takes: generated and recorded, passed on, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from aiohttp import web

from nextstate.records import Json
from nextstate.wire import json_object, objects, read_json
from proxy.answers import Refused, error_response
from proxy.bodies import read_any_body, read_body
from proxy.episode_calls import EPISODE, UNRECORDED_EPISODE, EpisodeCalls
from proxy.guard import administers, leads_out, refusal, tame
from proxy.keys import Keys
from proxy.lineages import CALLER
from proxy.paths import GENERATING, MODELS, PROBED, resembles_generating
from proxy.relay import Relay
from proxy.serving import MESSAGES, Passed, compact

JSON_TYPE = "application/json"
RECORD = "x-nextstate-record"
UNRECORDED = ":unrecorded"
"""At the end of a model's name: the same model, and nothing of the request is kept."""
_GENERATES = ("/v1/chat/completions/batch", "/v1/audio/", "/v1/systemone")
"""Routes that generate in a form that no turn can hold."""
_UNRECORDED_STEP = (
    f"A call of an episode is one of its steps, so it is recorded: leave out {RECORD} and "
    f"{UNRECORDED}, or call without the episode's address, key and headers."
)


class Dispatch:
    """Sends each request to the relay in the right form."""

    def __init__(self, relay: Relay, keys: Keys, episodes: EpisodeCalls) -> None:
        self._relay = relay
        self._episodes = episodes
        self._keys = keys
        self._lineages = keys.lineages
        self._config = relay.engine.config
        self._versions = relay.engine.versions
        self._model = relay.engine.versions.model

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The answer to a request for the engine. Raises Refused."""
        path = request.path
        if path in GENERATING and request.method == "POST":
            return await self._generate(request)
        if (episode := request.get(EPISODE)) is not None:
            await self._episodes.check_open(episode)
        if path == MODELS and request.method == "GET":
            return await self._models(request)
        known = path.startswith("/v1/") or path in PROBED
        if not known or leads_out(path) or resembles_generating(path):
            raise Refused(404, f"There is no {path[:200]}.")
        return await self._pass_on(request)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        data = await read_body(request, self._config.max_body_mb)
        try:
            body = read_json(data)
        except ValueError as error:
            return await self._unserved(request, data, "body", f"The body is no JSON: {error}.")
        if not isinstance(body, dict):
            return await self._unserved(request, data, "body", "The body is no JSON object.")
        if request.content_type != JSON_TYPE:
            message = f"Content-Type: {request.content_type}: expected {JSON_TYPE}."
            return await self._unserved(request, data, "content_type", message)
        body = cast(Json, body)
        self._guard(body)
        lineage = self._lineage(request, body)
        if lineage is None:
            served = ", ".join((self._model, *self._lineages.models(request[CALLER])))
            message = f"The model `{body.get('model')!s:.200}` is not served here: use {served}."
            return await self._unserved(request, data, "model", message)
        recorded = is_recorded(request.headers, body["model"])
        self._tame(request, body, lineage)
        seconds, version, free = None, None, None
        if (episode := request.get(EPISODE)) is not None:
            if not self._relay.recorder.enabled:
                raise Refused(409, UNRECORDED_EPISODE)
            if not recorded:
                raise Refused(400, _UNRECORDED_STEP)
            if episode.version is not None:
                version = await self._versions.pinned(lineage, episode.version)
            body, seconds, free = await self._episodes.begin(episode, lineage, path, body)
        try:
            return await self._relay.generate(
                request,
                body,
                lineage,
                body["model"],
                version=version,
                seconds=seconds,
                recorded=recorded,
            )
        except ValueError as error:
            raise _unwritable(error) from error
        finally:
            if free is not None:
                self._relay.recorder.once_stored(free)

    async def _unserved(
        self, request: web.Request, data: bytes, reason: str, message: str
    ) -> web.StreamResponse:
        """The engine's own answer to a request that it has to refuse.

        If the engine takes the request, its base model would answer, which the client did not ask
        for: then the answer is `message`.
        """
        self._relay.counts.unrecorded[reason] += 1
        return await self._relay.pass_on(request, Passed(request.path, data), refused=message)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        names = (self._model, *self._lineages.models(request[CALLER]))

        def shown(body: bytes) -> bytes:
            listed = json_object(body)
            if listed is None or "data" not in listed:
                return body
            # The engine's other models are not for agents, and a model's root may be a folder.
            base = [m for m in objects(listed["data"]) if m.get("id") == self._model]
            root = self._model
            listed["data"] = [{**m, "id": name, "root": root} for m in base for name in names]
            return compact(listed)

        return await self._relay.pass_on(request, Passed(request.path, b"", reply=shown))

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if administers(path):
            message = f"{path} administers the engine: it is not for agents."
            return error_response(path, 403, message)
        generates = path.startswith(_GENERATES)
        if generates:
            self._relay.counts.unrecorded["route"] += 1
            if EPISODE in request:
                raise Refused(400, f"{path} has replies that cannot be the steps of an episode.")
        max_mb = self._config.max_body_mb
        if request.method != "POST" or request.content_type.startswith("multipart/"):
            if generates and self._versions.serves(request[CALLER]).adapter_name is not None:
                message = f"{path} takes a form: the serving version cannot answer it."
                return error_response(path, 400, message)
            data = await read_any_body(request, max_mb)
            return await self._relay.pass_on(request, Passed(path, data))
        data = await read_body(request, max_mb)
        try:
            body = read_json(data)
        except ValueError:  # the engine says what is wrong with it
            body = None
        if isinstance(body, dict):
            body = cast(Json, body)
            self._guard(body)
            lineage = self._lineage(request, body)
            if lineage is not None:
                self._tame(request, body, lineage)
                with self._versions.hold(lineage) as held:
                    try:
                        return await self._relay.pass_on(request, Passed(path, data, body), held)
                    except ValueError as error:
                        raise _unwritable(error) from error
        return await self._relay.pass_on(request, Passed(path, data))

    def _guard(self, body: Json) -> None:
        """Raises Refused for a request that must not reach the engine."""
        found = refusal(body, names_adapter=self._versions.is_adapter(str(body.get("model"))))
        if found is not None:
            raise found

    def _tame(self, request: web.Request, body: Json, lineage: str) -> None:
        generates = request.path in GENERATING or request.path.startswith(_GENERATES)
        tame(body, lineage, salted=generates and self._keys.apart)

    def _lineage(self, request: web.Request, body: Json) -> str | None:
        """The lineage that a request's model belongs to, or None. A missing model is filled in."""
        if body.get("model") in (None, "") and not request.path.startswith(MESSAGES):
            body["model"] = self._model  # as the engine does on all routes but this one
        model = body.get("model")
        if not isinstance(model, str):
            return None
        return self._lineages.of(request[CALLER], model.removesuffix(UNRECORDED))


def is_recorded(headers: Mapping[str, str], model: str) -> bool:
    """Whether a request may be kept, by its header and the model that it names. Raises Refused."""
    said = headers.get(RECORD, "on").strip().lower()
    if said not in ("on", "off"):
        raise Refused(400, f"{RECORD}: {said!r:.80}: expected on or off.")
    return said == "on" and not model.endswith(UNRECORDED)


def _unwritable(error: ValueError) -> Refused:
    return Refused(400, f"The body cannot be passed on: {error}.")
