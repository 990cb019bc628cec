"""Servers that are not vLLM, or that lack a part of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.engine.abilities import ADAPTERS, LOG_PROBS, TOKEN_IDS
from nextstate.store import Store
from proxy.intervals import Intervals
from tests.proxy.running_proxy import Running, running
from tests.scripted_engine import MODEL, ScriptedEngine, plain_reply, stream_chunks

STRICT = "return_token_ids: Extra inputs are not permitted"
COMPLETIONS = "/v1/completions (for the warm-up)"


@dataclass
class Foreign(ScriptedEngine):
    """A server with some of vLLM's routes and behaviour."""

    health: bool = True
    completions_route: bool = True
    lists: bool = True
    forbids: int = 0
    """The status for completions, or 0."""
    arrays: bool = True
    """Whether a prompt may be token ids."""
    tells_ids: bool = True
    tells_logprobs: bool = True
    lora_route: bool = False
    refuses: int = 0
    """The status for fields that it does not know, or 0."""
    names: tuple[str, ...] = (MODEL,)
    answers_any: bool = False
    key: str = ""
    asked: int = 0
    """Chat requests, refused ones among them."""

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._locked])
        if self.health:
            app.router.add_get("/health", self._health)
        if self.lists:
            app.router.add_get("/v1/models", self._listed)
        app.router.add_post("/v1/chat/completions", self._chatted)
        if self.completions_route:
            app.router.add_post("/v1/completions", self._completed)
        if self.lora_route:
            app.router.add_post("/v1/load_lora_adapter", self._not_enabled)
        return app

    @web.middleware
    async def _locked(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "Unauthorized"}}, status=401)
        return await handler(request)

    async def _listed(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": n} for n in self.names]})

    async def _not_enabled(self, request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "LoRA is not enabled."}}, status=500)

    async def _completed(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.forbids:
            return web.json_response({"error": {"message": "chat only"}}, status=self.forbids)
        if not self.arrays and isinstance(body["prompt"], list):
            return web.json_response({"error": {"message": "prompt: want string"}}, status=400)
        return await self._answered(body, request)  # pyright: ignore[reportReturnType]

    async def _chatted(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        return await self._answered(await request.json(), request)

    async def _answered(self, body: dict[str, Any], request: web.Request) -> web.StreamResponse:
        if body["model"] not in self.names and not self.answers_any:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if self.refuses and ("return_token_ids" in body or "logprobs" in body):
            return web.json_response({"detail": STRICT}, status=self.refuses)
        if not self.tells_ids:
            body = {name: value for name, value in body.items() if name != "return_token_ids"}
        if not self.tells_logprobs:
            body = {name: value for name, value in body.items() if name != "logprobs"}
        self.requests.append(body)
        if body.get("stream"):
            return await self._send(request, stream_chunks(body, self.script), self.script)
        return web.json_response(plain_reply(body, self.script))


QUICK = Intervals(slowest_poll_s=0.01)
ENGINES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama.cpp": (
        {"tells_ids": False, "names": ("models/q.gguf",), "answers_any": True},
        [TOKEN_IDS, ADAPTERS],
    ),
    "ollama": (
        {"health": False, "arrays": False, "tells_ids": False, "tells_logprobs": False},
        [COMPLETIONS, LOG_PROBS, TOKEN_IDS, ADAPTERS],
    ),
    "chat only": (
        {"health": False, "completions_route": False, "tells_ids": False},
        [COMPLETIONS, TOKEN_IDS, ADAPTERS],
    ),
    "strict, 400": (
        {"refuses": 400, "completions_route": False},
        [COMPLETIONS, LOG_PROBS, TOKEN_IDS, ADAPTERS],
    ),
    "strict, 422": (
        {"refuses": 422, "health": False},
        [COMPLETIONS, LOG_PROBS, TOKEN_IDS, ADAPTERS],
    ),
    "strict, 500": (
        {"refuses": 500, "completions_route": False},
        [COMPLETIONS, LOG_PROBS, TOKEN_IDS, ADAPTERS],
    ),
    "a gateway for chat": (
        {"forbids": 403, "tells_ids": False},
        [COMPLETIONS, TOKEN_IDS, ADAPTERS],
    ),
    "no list of models": (
        {"lists": False, "health": False, "completions_route": False, "tells_ids": False},
        [COMPLETIONS, TOKEN_IDS, ADAPTERS],
    ),
    "vLLM without LoRA": ({}, [ADAPTERS]),
    "vLLM with the route alone": ({"lora_route": True}, [ADAPTERS]),
}


@asynccontextmanager
async def serving(engine: ScriptedEngine) -> AsyncGenerator[str]:
    async with TestServer(engine.app()) as server:
        engine.server = server
        yield engine.url


@asynccontextmanager
async def relayed(
    engine: ScriptedEngine, store: Store, tmp_path: Path, path: str = "", **more: Any
) -> AsyncGenerator[Running]:
    async with serving(engine) as url, running(url + path, store, tmp_path, **more) as p:
        yield p


def configured(folder: Path, url: str, more: str = "", port: int = 1) -> Path:
    file = folder / "nextstate.toml"
    file.write_text(
        f'[store]\ndir = "{folder}/state"\n[engine]\nmode = "external"\nmodel = "{MODEL}"\n'
        f'url = "{url}"\n{more}\n[proxy]\nport = {port}\n'
    )
    return file


def html(status: int) -> ScriptedEngine:
    class Site(ScriptedEngine):
        def app(self) -> web.Application:
            async def page(_: web.Request) -> web.Response:
                return web.Response(text="<html>", content_type="text/html", status=status)

            app = web.Application()
            app.router.add_route("*", "/{path:.*}", page)
            return app

    return Site()


def moved() -> ScriptedEngine:
    class Moved(ScriptedEngine):
        def app(self) -> web.Application:
            app = web.Application()

            async def away(request: web.Request) -> web.Response:
                return web.Response(
                    status=400, text="The plain HTTP request was sent to HTTPS port"
                )

            app.router.add_route("*", "/{path:.*}", away)
            return app

    return Moved()


def shop() -> ScriptedEngine:
    class Shop(Foreign):
        async def _answered(self, body: dict[str, Any], request: web.Request) -> web.StreamResponse:
            return web.json_response({"choices": None})

    return Shop()


def elsewhere(status: int, own: tuple[str, ...] = ()) -> ScriptedEngine:
    """A server that redirects all but its own paths."""

    class Elsewhere(ScriptedEngine):
        @web.middleware
        async def _reset(self, request: web.Request, handler: Any) -> web.StreamResponse:
            if request.path in own:
                return await handler(request)
            return web.Response(status=status, headers={"Location": "https://127.0.0.1:1/x"})

    return Elsewhere()


WRONG = {
    "http to https, by a redirect": (lambda: elsewhere(301), r"redirect \(301\).*\[engine\] url"),
    "a redirect of all that generates": (
        lambda: elsewhere(308, ("/health", "/v1/models")),
        r"redirect \(308\).*\[engine\] url",
    ),
    "a web page": (lambda: html(200), "no OpenAI server"),
    "one that answers without choices": (shop, "no OpenAI server.*without choices"),
    "another server": (lambda: html(404), "no OpenAI server"),
    "http to https": (moved, "no OpenAI server"),
    "a locked one": (lambda: Foreign(key="other"), r"refuses our key \(401\).*api_key_env"),
}
