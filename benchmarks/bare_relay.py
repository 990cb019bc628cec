"""The simplest relay with aiohttp: it passes bytes on and reads and keeps nothing.

python -m benchmarks.bare_relay PORT UPSTREAM_URL
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator

import aiohttp
import uvloop
from aiohttp import web

SESSION = web.AppKey("session", aiohttp.ClientSession)


async def relay(request: web.Request) -> web.StreamResponse:
    """Passes one request on."""
    upstream = f"{sys.argv[2]}{request.rel_url}"
    data = await request.read()
    async with request.app[SESSION].request(request.method, upstream, data=data) as answer:
        response = web.StreamResponse(
            status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]}
        )
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def session(app: web.Application) -> AsyncGenerator[None]:
    """The connection pool."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as opened:
        app[SESSION] = opened
        yield


def main() -> None:
    """Serves until killed."""
    app = web.Application()
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", relay)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        print=None,
        access_log=None,
        loop=uvloop.new_event_loop(),
    )


if __name__ == "__main__":
    main()
