"""A proxy whose store is on PostgreSQL beside one whose store is a file, in one run.

First both answer the same requests in turn, before one mock engine: what does a reply cost more?
The median of the differences within each round is shown, and the CPU time of each proxy with its
writer, without the server's. Then versions are put into service at random moments while a client
asks: how long until a reply comes from the new one?
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter

import aiohttp
from aiohttp.test_utils import TestServer

from benchmarks.client import HOST
from benchmarks.relay import bodies, sequential
from benchmarks.servers import OURS, POSTGRESQL, Server, recorded, running
from nextstate.config import StoreConfig
from nextstate.engine.process import free_port
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.scripted_engine import MODEL, ScriptedEngine, write_weights

START_S = 120.0
_CONFIG = """\
[store]
dir = "{folder}/state"
url = "{url}"
[engine]
mode = "external"
url = "{engine}"
model = "{model}"
[proxy]
port = {port}
"""
_EXAMPLE = """example:
  python -m benchmarks.beside_sqlite postgresql://postgres@127.0.0.1:5432/bench"""


async def replies(servers: Sequence[Server], rounds: int, asked: int) -> str:
    """A table: (first event, whole reply, CPU) of each, and how much more the second takes."""
    names = ("first token, ms", "whole reply, ms", "CPU, ms")
    found: dict[str, list[tuple[float, ...]]] = {server.name: [] for server in servers}
    texts = bodies()
    for number in range(rounds + 1):
        for server in servers if number % 2 else servers[::-1]:
            cpu = server.cpu_s()
            times = await sequential(server, asked, texts)
            await _stored(server)
            used = 1000 * (server.cpu_s() - cpu) / (asked + 1)
            if number:
                found[server.name].append((*times, used))
    lines = [f"| | {' | '.join(names)} |", "|---|---|---|---|"]
    for name, rows in found.items():
        cells = [f"{statistics.median(values):.2f}" for values in zip(*rows, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    here, there = (found[server.name] for server in servers)
    more = [[b - a for a, b in zip(*row, strict=True)] for row in zip(here, there, strict=True)]
    cells = [_spread(values) for values in zip(*more, strict=True)]
    return "\n".join([*lines, f"| more, in pairs | {' | '.join(cells)} |"])


async def _stored(server: Server) -> None:
    """Waits until the proxy has recorded what it answered."""
    async with aiohttp.ClientSession() as http, asyncio.timeout(START_S):
        while True:
            async with http.get(f"http://{HOST}:{server.port}/metrics") as answer:
                lines = (await answer.text()).splitlines()
            counts = dict(line.rsplit(" ", 1) for line in lines if line[:1] != "#")
            if float(counts["nextstate_turns_recorded_total"]) >= float(
                counts["nextstate_requests_total"]
            ):
                return
            await asyncio.sleep(0.02)


def _spread(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"


@contextmanager
def proxy(folder: Path, engine: str, url: str) -> Generator[int]:
    """The port of a proxy process."""
    port = free_port()
    file = folder / "nextstate.toml"
    values = {"folder": folder, "engine": engine, "model": MODEL, "url": url, "port": port}
    file.write_text(_CONFIG.format(**values))
    command = [sys.executable, "-m", "nextstate", "proxy", "--config", str(file)]
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield port
    finally:
        child.terminate()
        child.wait(60)


async def seen_after(url: str, flips: int) -> list[float]:
    """Milliseconds from each choice of a version until a reply by it has ended."""
    engine, drawn = ScriptedEngine(), random.Random(0)
    async with TestServer(engine.app()) as server:
        address = str(server.make_url("")).rstrip("/")
        with tempfile.TemporaryDirectory(prefix="nextstate-flips-") as name:
            folder = Path(name)
            with proxy(folder, address, url) as port:
                asked = f"http://{HOST}:{port}"
                async with aiohttp.ClientSession() as http:
                    if not await _is_up(http, asked):
                        sys.exit(f"the proxy is not up:\n{_tail(folder)}")
                    config = StoreConfig(str(folder / "state"), url)
                    with closing(await asyncio.to_thread(Store, config)) as store:
                        for number in (1, 2):
                            _make(store, engine, folder, number)
                        return [
                            await _flip(http, asked, store, 1 + n % 2, drawn) for n in range(flips)
                        ]


def _make(store: Store, engine: ScriptedEngine, folder: Path, number: int) -> None:
    """A version whose adapter the engine has."""
    path = folder / f"v{number}"
    sha256, state = write_weights(path), VersionState.CANDIDATE
    version = PolicyVersion("main", number, number - 1, str(path), sha256, 16, state)
    store.versions.add(version, None)
    assert version.adapter_name is not None
    engine.adapters[version.adapter_name] = str(path)


def _tail(folder: Path) -> str:
    return (folder / "log").read_text()[-2000:]


async def _is_up(http: aiohttp.ClientSession, url: str) -> bool:
    end = perf_counter() + START_S
    while perf_counter() < end:
        try:
            async with http.get(f"{url}/healthz") as answer:
                if (await answer.json())["engine"] == "up":
                    return True
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.1)
    return False


async def _flip(
    http: aiohttp.ClientSession, url: str, store: Store, number: int, drawn: random.Random
) -> float:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Who?"}]}
    await asyncio.sleep(drawn.uniform(0.2, 1.4))
    began = perf_counter()
    choosing = asyncio.create_task(asyncio.to_thread(store.versions.set_serving, "main", number))
    while True:
        async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
            await answer.read()
            if answer.headers.get("x-nextstate-version") == str(number):
                break
    ended = perf_counter()
    await choosing
    return 1000 * (ended - began)


async def flipped(url: str, flips: int) -> str:
    """A table of the flips."""
    lines = ["| | median, ms | 95 % | largest |", "|---|---|---|---|"]
    for name, where in ((OURS, ""), (POSTGRESQL, url)):
        found = sorted(await seen_after(where, flips))
        cells = (statistics.median(found), found[int(0.95 * (len(found) - 1))], found[-1])
        lines.append(f"| {name} | {' | '.join(f'{cell:.0f}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beside_sqlite",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="of an empty PostgreSQL database")
    parser.add_argument("--rounds", type=int, default=20, help="of replies (default: 20)")
    parser.add_argument("--asked", type=int, default=40, help="replies a round (default: 40)")
    parser.add_argument("--flips", type=int, default=60, help="of each (default: 60)")
    given = parser.parse_args()
    print(f"Load of the machine at the start: {os.getloadavg()[0]:.1f}\n")
    with running(bare=False, postgresql=given.url) as found:
        pair = found[OURS], found[POSTGRESQL]
        print(asyncio.run(replies(pair, given.rounds, given.asked)))
        for server in pair:
            print(f"\n{server.name}: {recorded(server)}")
    print(f"\n{asyncio.run(flipped(given.url, given.flips))}")
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
