"""Pages update themselves: a stream tells of each change, and costs the same for everybody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from nextstate.app.page.live import MOST_STREAMS, Streams
from nextstate.store import Store
from proxy.answers import Refused
from tests.page.running_page import Site, on_site
from tests.proxy.running_proxy import TIMEOUT
from tests.store.test_records import add, judge, turn


async def told(answer: aiohttp.ClientResponse) -> None:
    """Waits until the stream tells of a change."""
    while await answer.content.readline() != b"event: changed\n":
        assert not answer.content.at_eof()


def test_a_stream_tells_of_what_was_recorded_judged_and_decided(
    store: Store, tmp_path: Path
) -> None:
    async def test(site: Site) -> None:
        async with site.http.get(f"{site.url}/page/events") as answer:
            assert answer.content_type == "text/event-stream"
            assert answer.headers["Cache-Control"] == "no-store"
            await told(answer)  # at once: the page may be older than the stream
            for change in (
                lambda: add(store, turn(0)),
                lambda: judge(store, 0, 1),
                lambda: store.versions.pause("main", "ann"),
            ):
                await asyncio.to_thread(change)
                await asyncio.wait_for(told(answer), 30)

    on_site(test, store, tmp_path)


def test_a_stream_needs_the_login_and_has_an_end_to_its_retries(
    store: Store, tmp_path: Path
) -> None:
    async def test(site: Site) -> None:
        await site.get("/page/events", 403)  # a redirection to the login would be asked for again

    on_site(test, store, tmp_path, "the-proxy-key")


class Served:
    """Streams on a port of their own, over a store that is a number."""

    def __init__(self) -> None:
        self.value = 0
        self.looks = 0
        self.answers: list[aiohttp.ClientResponse] = []
        self.streams = Streams(self.look, look_s=0.01)

    def look(self) -> object:
        self.looks += 1
        return self.value

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self.streams.stream(request, {})
        except Refused as error:
            return web.Response(status=error.status)

    async def status(self) -> int:
        """What a further stream is answered with."""
        async with self.http.get(self.url) as answer:
            return answer.status

    async def open(self) -> aiohttp.ClientResponse:
        """A stream that has told of its beginning."""
        answer = await self.http.get(self.url)
        self.answers.append(answer)
        assert answer.status == 200
        await told(answer)
        return answer

    async def run(self, test: Callable[[], Awaitable[None]]) -> None:
        app = web.Application()
        app.router.add_get("/", self.handle)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            async with aiohttp.ClientSession(timeout=TIMEOUT) as http:
                host, port = runner.addresses[0][:2]
                self.http, self.url = http, f"http://{host}:{port}/"
                await test()
        finally:
            for answer in self.answers:
                answer.close()
            await self.streams.close()
            await runner.cleanup()


def test_all_streams_share_one_look_and_only_so_many_are_open() -> None:
    served = Served()

    async def test() -> None:
        answers = [await served.open() for _ in range(MOST_STREAMS)]
        assert await served.status() == 503
        before = served.looks
        served.value += 1
        await asyncio.gather(*(told(answer) for answer in answers))
        assert 1 <= served.looks - before < MOST_STREAMS
        answers.pop().close()
        for _ in range(1000):  # until the server has noticed
            if (status := await served.status()) == 200:
                break
            await asyncio.sleep(0.01)
        assert status == 200

    asyncio.run(served.run(test))


def test_without_a_stream_nothing_looks_at_the_store() -> None:
    served = Served()

    async def test() -> None:
        (await served.open()).close()
        watch = served.streams._watch
        assert watch is not None
        await asyncio.wait_for(watch, 30)
        looks = served.looks
        served.value += 1
        await served.open()
        assert served.looks > looks

    asyncio.run(served.run(test))


def test_streams_end_when_the_proxy_ends() -> None:
    served = Served()

    async def test() -> None:
        answer = await served.open()
        await served.streams.close()
        assert b"changed" not in await answer.read()
        assert await served.status() == 503

    asyncio.run(served.run(test))


@pytest.mark.parametrize("error", [OSError("gone")])
def test_a_store_that_fails_for_a_moment_ends_no_stream(error: OSError) -> None:
    served = Served()
    look = served.look

    def failing() -> object:
        if served.value == 1:
            served.value = 2
            raise error
        return look()

    served.streams = Streams(failing, look_s=0.01)

    async def test() -> None:
        answer = await served.open()
        served.value = 1
        await told(answer)

    asyncio.run(served.run(test))
