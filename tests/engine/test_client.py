"""What the client of the engine reads from the metrics of vLLM."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from nextstate.engine.client import EngineClient
from nextstate.errors import EngineError
from tests.spine.test_prometheus import VLLM_PAGE


async def ask(page: str) -> int:
    """What a client reads off an engine whose metrics are `page`."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=page)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        async with EngineClient(f"http://{host}:{port}", "m") as engine:
            return await engine.live_requests()
    finally:
        await runner.cleanup()


def test_live_requests_are_those_that_run_and_those_that_wait() -> None:
    assert asyncio.run(ask(VLLM_PAGE)) == 7


@pytest.mark.parametrize("page", ["", "vllm:num_requests_running 1\n"])
def test_an_engine_without_the_gauges_is_named_with_what_helps(page: str) -> None:
    with pytest.raises(EngineError, match=r"--disable-log-stats.*\[learner\] schedule"):
        asyncio.run(ask(page))


@pytest.mark.parametrize("value", ["NaN", "+Inf", "many"])
def test_a_gauge_that_is_no_count_is_an_engine_error(value: str) -> None:
    page = f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 0\n"
    with pytest.raises(EngineError, match="cannot be read"):
        asyncio.run(ask(page))
