"""The only way out of a sandbox: a Unix socket that leads to one episode's address of the proxy.

Who has the socket can call the model as this episode. They cannot reach the proxy's other routes,
so they cannot close an episode or reward it, and they need no key: it stays outside.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from plugins.sandboxes.bubblewrap import NOBODY

_MOST_REQUEST_BYTES = 64 << 20
_PATHS = {
    f"/v1/{name}"
    for name in (
        *("chat/completions", "completions", "responses", "models"),
        *("messages", "messages/count_tokens"),
    )
}
_SENT_ON = ("Content-Type", "Accept", "anthropic-version", "anthropic-beta", "x-session-id")
_SENT_BACK = ("Content-Type", "x-nextstate-turn", "Retry-After")


@asynccontextmanager
async def model_socket(base_url: str, api_key: str) -> AsyncGenerator[str]:
    """The socket's path. `base_url` ends in /v1. Only who runs sandboxes may use the socket."""

    async def pass_on(request: web.Request) -> web.StreamResponse:
        if request.path not in _PATHS or request.method not in ("GET", "POST"):
            return web.json_response({"error": {"message": "not within a sandbox"}}, status=404)
        sent = {name: request.headers[name] for name in _SENT_ON if name in request.headers}
        sent |= {"Authorization": f"Bearer {api_key}", "Accept-Encoding": "identity"}
        body = await request.read()
        url = base_url + request.path.removeprefix("/v1")
        try:
            async with http.request(request.method, url, data=body, headers=sent) as answer:
                back = {name: answer.headers[name] for name in _SENT_BACK if name in answer.headers}
                response = web.StreamResponse(status=answer.status, headers=back)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except aiohttp.ClientConnectorError:
            return web.json_response({"error": {"message": "the proxy is away"}}, status=502)

    app = web.Application(client_max_size=_MOST_REQUEST_BYTES)
    app.router.add_route("*", "/{path:.*}", pass_on)
    runner = web.AppRunner(app, handler_cancellation=True)
    limits = aiohttp.ClientTimeout(total=None)
    with tempfile.TemporaryDirectory(prefix="nextstate-") as folder:
        if os.geteuid() == 0:
            os.chmod(folder, 0o711)
        path = f"{folder}/model"
        async with aiohttp.ClientSession(timeout=limits) as http:
            await runner.setup()
            try:
                await web.UnixSite(runner, path).start()
                os.chmod(path, 0o600)
                if os.geteuid() == 0:
                    os.chown(path, NOBODY, NOBODY)
                yield path
            finally:
                await runner.cleanup()
