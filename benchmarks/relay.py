"""What the proxy costs, as ratios from one run: direct, a bare relay, and ours with recording on.

    python -m benchmarks.relay        (or: make bench)

Every round asks all three in turn, so that a slow moment of the machine meets all of them alike.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import orjson
import uvloop

from benchmarks.mock_engine import MODEL
from nextstate.vllm import free_port

ROUNDS = 12
SEQUENTIAL = 25
"""Requests one after the other, a round."""
PARALLEL = 16
REQUESTS = 240
"""Requests over `PARALLEL` streams, a round."""
BODY = orjson.dumps(
    {
        "model": MODEL,
        "stream": True,
        "messages": [
            {"role": "system", "content": "You are a helpful agent. " * 40},
            {"role": "user", "content": "Tell me about the weather in the mountains. " * 5},
        ],
    }
)
CONFIG = """
[store]
dir = "{dir}"
[engine]
mode = "external"
url = "{engine}"
model = "mock"
[proxy]
port = {port}
"""


async def ask(http: aiohttp.ClientSession, url: str) -> tuple[float, float]:
    """(seconds to the first byte, seconds to the end) of one reply."""
    started = time.perf_counter()
    async with http.post(f"{url}/v1/chat/completions", data=BODY) as answer:
        data = await answer.content.readany()
        first = time.perf_counter() - started
        data += await answer.content.read()
        assert answer.status == 200
        assert data.endswith(b"[DONE]\n\n")
    return first, time.perf_counter() - started


async def sequential(http: aiohttp.ClientSession, url: str) -> tuple[float, float]:
    """Median (first, whole) of requests one after the other, in milliseconds."""
    found = [await ask(http, url) for _ in range(SEQUENTIAL)]
    return tuple(1000 * statistics.median(part) for part in zip(*found, strict=True))  # pyright: ignore[reportReturnType]


async def parallel(http: aiohttp.ClientSession, url: str) -> float:
    """Replies a second over several streams."""
    left = iter(range(REQUESTS))

    async def stream() -> None:
        for _ in left:
            await ask(http, url)

    started = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(PARALLEL)))
    return REQUESTS / (time.perf_counter() - started)


async def measure(urls: dict[str, str]) -> str:
    """The table, as Markdown."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in urls}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for number in range(ROUNDS + 1):
            for name, url in urls.items():
                first, whole = await sequential(http, url)
                rate = await parallel(http, url)
                if number:  # the first round warms up
                    rows[name].append((first, whole, rate))
    found = {
        name: [statistics.median(part) for part in zip(*values, strict=True)]
        for name, values in rows.items()
    }
    bare = found["bare relay"]
    lines = [
        "| | first token, ms | whole reply, ms | over the bare relay, ms "
        f"| replies/s at {PARALLEL} streams | of the bare relay |",
        "|---|---|---|---|---|---|",
    ]
    for name, (first, whole, rate) in found.items():
        lines.append(
            f"| {name} | {first:.2f} | {whole:.2f} "
            f"| {first - bare[0]:+.2f} / {whole - bare[1]:+.2f} "
            f"| {rate:.0f} | {rate / bare[2]:.0%} |"
        )
    return "\n".join(lines)


async def wait_up(url: str) -> None:
    """Returns when the address answers."""
    async with asyncio.timeout(30), aiohttp.ClientSession() as http:
        while True:
            try:
                await ask(http, url)
            except (aiohttp.ClientError, AssertionError):
                await asyncio.sleep(0.1)
            else:
                return


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A child process of this Python."""
    return subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)


def main() -> None:
    """Measures and prints the table."""
    ports = [free_port() for _ in range(3)]
    engine, bare, ours = (f"http://127.0.0.1:{port}" for port in ports)
    run: Callable[[Awaitable[object]], object] = uvloop.run  # pyright: ignore[reportAssignmentType]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "nextstate.toml"
        config.write_text(CONFIG.format(dir=f"{folder}/state", engine=engine, port=ports[2]))
        children = [
            start("-m", "benchmarks.mock_engine", str(ports[0])),
            start("-m", "benchmarks.bare_relay", str(ports[1]), engine),
            start("-m", "nextstate", "proxy", "--config", str(config)),
        ]
        try:
            urls = {"direct": engine, "bare relay": bare, "NextState": ours}
            for url in urls.values():
                run(wait_up(url))
            print(run(measure(urls)))
        finally:
            for child in children:
                child.terminate()
            for child in children:
                child.wait(10)


if __name__ == "__main__":
    main()
