"""Several engines behind the proxy: hits in their caches, how even they are, what it costs.

    python -m benchmarks.engines > benchmarks/results/engines.md

The engines are mocks that remember each prefix of messages that they have seen, for ever. One proxy
has one of them, the others have several; all answer the same conversations, one after the other.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
from aiohttp import web

from nextstate.engine.process import free_port
from proxy.routing import Places, conversation_key

MODEL, HOST = "mock", "127.0.0.1"
SIZES = (1, 1, 2, 4)
"""How many engines each proxy has; one twice, to show the noise."""
CONVERSATIONS, MEAN_TURNS = 96, 20
AT_ONCE = 24
REPLY_S, THINK_S = 0.05, 0.05
"""The mean of each; both are drawn anew for every turn."""
ASKED = 300
"""Requests one after the other, to each proxy, for the added time."""
IDLE_S = 30.0
"""Without requests, for what a proxy uses all the time."""
START_S = 120.0
_CONFIG = """\
[store]
dir = "{folder}/state"
[engine]
mode = "external"
url = [{urls}]
model = "mock"
[proxy]
port = {port}
"""


@dataclass
class Mock:
    """An engine that counts which messages of a prompt it has seen in this order before."""

    url: str = ""
    seen: set[int] = field(default_factory=set[int])
    answered: int = 0
    asked_messages: int = 0
    known_messages: int = 0

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL, "max_model_len": 4096}]})

    async def _complete(self, _: web.Request) -> web.Response:
        choice = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
        return web.json_response({"model": MODEL, "choices": [choice]})

    async def _chat(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = orjson.loads(await request.read())
        prefix = known = 0
        for message in body["messages"]:
            prefix = hash((prefix, message["role"], message["content"]))
            known += prefix in self.seen
            self.seen.add(prefix)
        self.answered += 1
        self.asked_messages += len(body["messages"])
        self.known_messages += known
        if wait_s := body.get("wait_s"):
            await asyncio.sleep(wait_s)
        message = {"role": "assistant", "content": f"reply {len(body['messages'])}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        reply = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL}
        return web.json_response({**reply, "choices": [choice], "usage": usage})


@dataclass
class Behind:
    """A proxy and its engines."""

    engines: list[Mock]
    url: str
    process: psutil.Process

    def cpu_ms(self) -> float:
        """CPU milliseconds of the proxy so far, without its writer's."""
        used = self.process.cpu_times()
        return 1e3 * (used.user + used.system)

    @property
    def hits(self) -> float:
        """The share of all messages that the engines had in their caches."""
        asked = sum(engine.asked_messages for engine in self.engines)
        return sum(engine.known_messages for engine in self.engines) / asked

    @property
    def spread(self) -> float:
        """The requests of the engine that answered most, over the mean."""
        counts = [engine.answered for engine in self.engines]
        return max(counts) / statistics.mean(counts)


@asynccontextmanager
async def behind(size: int, folder: Path) -> AsyncGenerator[Behind]:
    """A proxy with so many engines, once it lets requests through to all of them."""
    async with AsyncExitStack() as opened:
        engines = [Mock() for _ in range(size)]
        for engine in engines:
            runner = web.AppRunner(engine.app())
            await runner.setup()
            opened.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, HOST, 0)
            await site.start()
            engine.url = site.name
        port = free_port()
        config = folder / f"{size}.toml"
        urls = ", ".join(f'"{engine.url}"' for engine in engines)
        config.write_text(_CONFIG.format(folder=folder / str(size), urls=urls, port=port))
        log = opened.enter_context((folder / f"{size}.log").open("w"))
        argv = [sys.executable, "-m", "nextstate", "proxy", "--config", str(config)]
        child = await asyncio.create_subprocess_exec(*argv, stdout=log, stderr=log)
        opened.push_async_callback(child.wait)
        opened.callback(child.terminate)
        url = f"http://{HOST}:{port}"
        async with aiohttp.ClientSession() as http, asyncio.timeout(START_S):
            while not await _ready(http, url, size):
                if child.returncode is not None:
                    raise RuntimeError((folder / f"{size}.log").read_text())
                await asyncio.sleep(0.1)
        yield Behind(engines, url, psutil.Process(child.pid))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


async def _ready(http: aiohttp.ClientSession, url: str, size: int) -> bool:
    try:
        async with http.get(f"{url}/healthz") as answer:
            found = await answer.json()
    except aiohttp.ClientError:
        return False
    engines = [one["state"] for one in found["engines"]]
    return found["engine"] == "up" and engines == ["up"] * (0 if size == 1 else size)


async def converse(found: Behind) -> None:
    """All conversations, so many at once; each is drawn from its own seed."""
    waiting = list(range(CONVERSATIONS))

    async def agent(http: aiohttp.ClientSession) -> None:
        while waiting:
            await _one(http, found.url, waiting.pop(0))

    async with aiohttp.ClientSession() as http:
        await asyncio.gather(*(agent(http) for _ in range(AT_ONCE)))


async def _one(http: aiohttp.ClientSession, url: str, number: int) -> None:
    drawn = random.Random(number)
    turns = min(1 + int(drawn.expovariate(1 / (MEAN_TURNS - 1))), 4 * MEAN_TURNS)
    messages = [{"role": "system", "content": "You are an agent."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{number}, {turn}"})
        wait_s = drawn.expovariate(1 / REPLY_S)
        body = {"model": MODEL, "messages": messages, "wait_s": wait_s}
        async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
            reply = await answer.json()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {reply}")
        messages.append(reply["choices"][0]["message"])
        await asyncio.sleep(drawn.expovariate(1 / THINK_S))


async def added(all_found: Sequence[Behind]) -> tuple[list[list[float]], list[float]]:
    """Of each proxy, asked in turn: the milliseconds of each request, and CPU ms a request.

    What a proxy uses in the same time without requests, for looks at its engines, is not counted.
    """
    times: list[list[float]] = [[] for _ in all_found]
    before, since = [found.cpu_ms() for found in all_found], time.monotonic()
    async with aiohttp.ClientSession() as http:
        for number in range(ASKED + 20):
            for found, taken in zip(all_found, times, strict=True):
                messages = [{"role": "user", "content": f"How long, {number}?"}]
                body = {"model": MODEL, "messages": messages}
                began = time.perf_counter()
                async with http.post(f"{found.url}/v1/chat/completions", json=body) as answer:
                    await answer.read()
                taken.append(1e3 * (time.perf_counter() - began))
    asked, asked_s = [found.cpu_ms() for found in all_found], time.monotonic() - since
    await asyncio.sleep(IDLE_S)
    used = [
        (then - had - (found.cpu_ms() - then) * asked_s / IDLE_S) / (ASKED + 20)
        for found, had, then in zip(all_found, before, asked, strict=True)
    ]
    return [taken[20:] for taken in times], used


def decision_us(engines: int) -> float:
    """CPU microseconds of one decision: the key of a conversation, and its place."""
    places, running = Places(), {f"{HOST}:{8000 + n}": n for n in range(engines)}
    bodies = [{"messages": [{"role": "user", "content": f"{n} " * 800}]} for n in range(2000)]
    began = time.process_time()
    for body in bodies * 5:
        key = conversation_key({}, body, "main", None)
        places.place(key, running, 0.0)
    return 1e6 * (time.process_time() - began) / (5 * len(bodies))


async def measure() -> str:
    """The page of results."""
    with tempfile.TemporaryDirectory(prefix="nextstate-engines-") as name:
        async with AsyncExitStack() as opened:
            all_found = [
                await opened.enter_async_context(behind(size, _made(Path(name) / str(number))))
                for number, size in enumerate(SIZES)
            ]
            load = os.getloadavg()[0]
            for found in all_found:
                await converse(found)
            hits, spreads = [f.hits for f in all_found], [f.spread for f in all_found]
            times, cpu = await added(all_found)
    lines = [
        "# Several engines\n",
        "`python -m benchmarks.engines`. Mock engines that keep every prefix; the same "
        f"{CONVERSATIONS} conversations of {MEAN_TURNS} turns on average (exponential), {AT_ONCE} "
        f"at once, no session named. One run; the load of the machine was {load:.1f} at the start "
        f"and {os.getloadavg()[0]:.1f} at the end, on {os.cpu_count()} cores.\n",
        "| engines | messages found in a cache | over one engine's | requests, most over mean | "
        "ms a request, median (quartiles) | more than one engine's, median of pairs | "
        "CPU ms of the proxy a request | CPU µs of the decision |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, hit, spread, taken, used in zip(SIZES, hits, spreads, times, cpu, strict=True):
        low, middle, high = statistics.quantiles(taken, n=4)
        more = statistics.median(a - b for a, b in zip(taken, times[0], strict=True))
        lines.append(
            f"| {size} | {hit:.3f} | {hit / hits[0]:.3f} | {spread:.2f} | {middle:.2f} "
            f"({low:.2f} to {high:.2f}) | {more:+.3f} ms | {used:.2f} | "
            f"{decision_us(size) if size > 1 else 0:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the page."""
    print(asyncio.run(measure()))


if __name__ == "__main__":
    main()
