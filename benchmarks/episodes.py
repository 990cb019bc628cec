"""How many episodes a second go through, and how much of an episode's time is the proxy's.

A scripted agent plays episodes of four calls, whose messages grow, and whose replies have 64 tokens
and come in one body. Over the engine alone that is four calls; over NextState an episode is opened
and closed too, and every turn is recorded. rLLM's gateway gets a session for each episode and
records into its own database. Every round asks all of them, one round forwards and the next
backwards; ratios are taken within a round, and the median is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.client import HOST
from benchmarks.mock_engine import MODEL
from benchmarks.servers import DIRECT, OURS, RLLM, Server, running

PARALLEL = (1, 4, 16, 64)
CALLS = 4
_SYSTEM = "You are a helpful agent. " * 40
_EXAMPLES = """\
examples:
  python -m benchmarks.episodes
  python -m benchmarks.episodes --rllm ~/rllm-venv
rLLM's gateway goes into an environment of its own:
  python -m venv ~/rllm-venv && ~/rllm-venv/bin/pip install rllm-model-gateway==0.1.0
"""


class Agent:
    """Plays episodes over one server."""

    def __init__(self, server: Server, http: aiohttp.ClientSession, numbers: Iterator[int]) -> None:
        self._url = f"http://{HOST}:{server.port}"
        self._name = server.name
        self._http = http
        self._numbers = numbers

    async def play(self) -> None:
        """One episode."""
        number = next(self._numbers)
        base, key, episode = f"{self._url}/v1", "none", ""
        if self._name == OURS:
            asked = {"environment": "bench", "task": f"task {number}", "max_calls": CALLS}
            opened = await self._post(f"{base}/episodes", key, asked)
            episode, key = opened["episode"], opened["api_key"]
            address = opened["base_url"]
        elif self._name == RLLM:
            made = await self._post(f"{self._url}/sessions", key, {})
            address = f"{self._url}{made['url']}"
        else:
            address = base
        messages = [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": f"Task {number}: begin."},
        ]
        for call in range(CALLS):
            reply = await self._post(
                f"{address}/chat/completions", key, {"model": MODEL, "messages": messages}
            )
            messages.append(reply["choices"][0]["message"])
            messages.append({"role": "user", "content": f"{number}: exit code {call}"})
        if episode:
            end = {"status": "done", "outcome": 1.0, "observation": "check: exit code 0"}
            await self._post(f"{base}/episodes/{episode}/close", "none", end)

    async def _post(self, url: str, key: str, body: Any) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        async with self._http.post(url, json=body, headers=headers) as answer:
            if answer.status != 200:
                raise SystemExit(f"{url} answered {answer.status}: {(await answer.text())[:400]}")
            return await answer.json()


async def measure(
    server: Server, parallel: int, episodes: int, numbers: Iterator[int]
) -> tuple[float, float]:
    """(seconds, CPU seconds of the server) of so many episodes."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        agent = Agent(server, http, numbers)
        await agent.play()
        left = iter(range(episodes))

        async def work() -> None:
            for _ in left:
                await agent.play()

        cpu, began = server.cpu_s(), time.perf_counter()
        await asyncio.gather(*(work() for _ in range(parallel)))
        return time.perf_counter() - began, server.cpu_s() - cpu


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.episodes",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rllm", type=Path, metavar="VENV", help="with rLLM's gateway in it")
    parser.add_argument("--rounds", type=int, default=4, help="of each load (default: 4)")
    parser.add_argument("--episodes", type=int, default=96, help="of a round (default: 96)")
    given = parser.parse_args()
    numbers = itertools.count()
    table = Table(box=box.SIMPLE, title=f"episodes of {CALLS} calls")
    for heading in ("parallel", "server", "episodes/s", "to the engine", "CPU ms an episode"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    with running(rllm=given.rllm, bare=False) as servers:
        for parallel in PARALLEL:
            found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
            for number in range(given.rounds):
                for name in list(servers)[:: 1 if number % 2 else -1]:
                    work = measure(servers[name], parallel, given.episodes, numbers)
                    found[name].append(uvloop.run(work))
            for name, rounds in found.items():
                rate = statistics.median(given.episodes / wall for wall, _ in rounds)
                cpu = statistics.median(1000 * cpu / given.episodes for _, cpu in rounds)
                pairs = zip(found[DIRECT], rounds, strict=True)
                ratio = statistics.median(direct / ours for (direct, _), (ours, _) in pairs)
                table.add_row(str(parallel), name, f"{rate:.0f}", f"{ratio:.2f}", f"{cpu:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
