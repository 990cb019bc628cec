"""How many episodes a second go through, and how much of an episode's time is the proxy's.

A scripted agent plays episodes of four calls, whose messages grow, and whose replies have 64 tokens
and come in one body. Over the engine alone that is four calls; over NextState an episode is opened
and closed too, and every turn is recorded. rLLM's gateway gets a session for each episode and
records into its own database; OpenEnv's capture server gets one too and records in memory. Every
round asks all of them, one round forwards and the next backwards; ratios are taken within a round,
and the median of the rounds is shown with the lowest and the highest. It ends with the round in
which the time is up; a load for which there was no time is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.client import HOST
from benchmarks.mock_engine import MODEL
from benchmarks.servers import CAPTURE, DIRECT, OURS, RLLM, Server, recorded, running

PARALLEL = (1, 4, 16, 64)
CALLS = 4
_SYSTEM = "You are a helpful agent. " * 40
_EXAMPLES = """\
examples:
  python -m benchmarks.episodes
  python -m benchmarks.episodes --rllm ~/rllm-venv --capture ~/openenv-venv
The others go into environments of their own:
  python -m venv ~/rllm-venv && ~/rllm-venv/bin/pip install rllm-model-gateway==0.1.0
  python -m venv ~/openenv-venv && ~/openenv-venv/bin/pip install openenv==0.10.0
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
        elif self._name == CAPTURE:
            key = (await self._post(f"{self._url}/sessions", key, {}))["session_id"]
            address = base
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
        for last in (False, False, True):
            try:
                async with self._http.post(url, json=body, headers=headers) as answer:
                    if answer.status != 200:
                        told = (await answer.text())[:400]
                        raise SystemExit(f"{url} answered {answer.status}: {told}")
                    return await answer.json()
            except aiohttp.ClientConnectionError:  # some close a connection that rests for 5 s
                if last:
                    raise


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
    parser.add_argument("--capture", type=Path, metavar="VENV", help="with openenv in it")
    parser.add_argument("--rounds", type=int, default=5, help="of each load (default: 5)")
    parser.add_argument("--episodes", type=int, default=64, help="of a round (default: 64)")
    parser.add_argument("--seconds", type=int, default=180, help="of all rounds (default: 180)")
    parser.add_argument(
        "--parallel", type=int, nargs="+", default=PARALLEL, help="loads (default: 1 4 16 64)"
    )
    given = parser.parse_args()
    console = Console(width=130)
    with running(rllm=given.rllm, capture=given.capture, bare=False) as servers:
        until = time.monotonic() + given.seconds
        found = measure_all(servers, given.parallel, given.rounds, given.episodes, until)
        console.print(table(found, given.episodes))
        load = ", ".join(f"{one:.0f}" for one in os.getloadavg())
        console.print(
            f"{os.cpu_count()} cores; the machine's load was {load}. {recorded(servers[OURS])}"
        )


Found = Mapping[int, Mapping[str, Sequence[tuple[float, float]]]]
"""(seconds, CPU seconds) of each round, by load and server."""


def measure_all(
    servers: Mapping[str, Server],
    loads: Sequence[int],
    rounds: int,
    episodes: int,
    until: float,
) -> Found:
    """All rounds of all loads, as long as there is time; each round goes through all loads."""
    numbers = itertools.count()
    found: Found = {load: {name: [] for name in servers} for load in loads}
    for number in range(rounds):
        for load in loads:
            if number and time.monotonic() > until:
                return found
            taken = {
                name: uvloop.run(measure(servers[name], load, episodes, numbers))
                for name in list(servers)[:: 1 if number % 2 else -1]
            }
            for name, one in taken.items():
                found[load][name].append(one)
    return found


def table(found: Found, episodes: int) -> Table:
    """A row for each load and server."""
    shown = Table(box=box.SIMPLE, title=f"episodes of {CALLS} calls, {episodes} in a round")
    for heading in (
        *("parallel", "server", "rounds", "episodes/s", "of the engine's"),
        *("NextState ÷ this", "CPU ms an episode"),
    ):
        shown.add_column(heading, justify="left" if heading == "server" else "right")
    for load, servers in found.items():
        for name, rounds in servers.items():
            rate = statistics.median(episodes / wall for wall, _ in rounds)
            cpu = statistics.median(1000 * cpu / episodes for _, cpu in rounds)
            shown.add_row(
                *(str(load), name, str(len(rounds)), f"{rate:.0f}"),
                _ratios(servers[DIRECT], rounds),
                _ratios(rounds, servers[OURS]),
                f"{cpu:.1f}",
            )
    return shown


def _ratios(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> str:
    """By how much the second was faster than the first, round by round."""
    ratios = [a / b for (a, _), (b, _) in zip(first, second, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


if __name__ == "__main__":
    main()
