"""What a proxy costs, as ratios from one run over one mock engine.

It compares the engine alone, a bare aiohttp relay, nginx, LiteLLM's proxy and ours with recording
on. Every round asks all of them, one round forwards and the next backwards, so that a slow moment
of the machine meets all of them. Differences and ratios are taken within a round; the median of the
rounds is shown. All requests differ.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks.client import Connection, connect
from benchmarks.mock_engine import MODEL
from benchmarks.servers import BARE, LITELLM, OURS, Server, add_nginx, recorded, running

LOADS = {"16 streams": 16, "64 streams": 64, "16 at a time, not streamed": -16}
"""The number of connections; negative for replies that are not streamed."""
SHARE = {LITELLM: 0.1}
"""The share of the requests that a slow server gets."""
_MARK = b"0000000000"
_BODY = orjson.dumps(
    {
        "model": MODEL,
        "stream": True,
        "messages": [
            {"role": "system", "content": "You are a helpful agent. " * 40},
            {"role": "user", "content": f"Question {_MARK.decode()}: how is the weather? " * 5},
        ],
    }
)
_EXAMPLES = """\
examples:
  python -m benchmarks.relay
  python -m benchmarks.relay --nginx /usr/sbin/nginx --litellm ~/litellm-venv
LiteLLM goes into an environment of its own:
  python -m venv ~/litellm-venv && ~/litellm-venv/bin/pip install 'litellm[proxy]==1.106.2'
"""


@dataclass(slots=True)
class Found:
    """The measurements of one server, one number a round."""

    first_ms: list[float] = field(default_factory=list[float])
    whole_ms: list[float] = field(default_factory=list[float])
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list[float]))
    """Replies a second, by load."""
    cpu_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list[float]))
    """The server's own CPU time for one reply, by load."""


def bodies(stream: bool = True) -> Iterator[bytes]:
    """Request bodies that are all different."""
    body = _BODY if stream else _BODY.replace(b'"stream":true', b'"stream":false')
    numbers = itertools.count(1 if stream else 5_000_000_000)
    return (body.replace(_MARK, b"%010d" % number) for number in numbers)


async def sequential(server: Server, requests: int, asked: Iterator[bytes]) -> tuple[float, float]:
    """Median (first event, whole reply) of requests one after the other, in milliseconds."""
    connection = await connect(server.port)
    await connection.ask(next(asked))
    replies = [await connection.ask(next(asked)) for _ in range(requests)]
    connection.close()
    return (
        1000 * statistics.median(reply.first_s for reply in replies),
        1000 * statistics.median(reply.whole_s for reply in replies),
    )


async def parallel(
    server: Server, streams: int, requests: int, asked: Iterator[bytes]
) -> tuple[float, float]:
    """(replies a second, the server's CPU milliseconds a reply) over several streams."""
    connections = [await connect(server.port) for _ in range(streams)]
    await asyncio.gather(*(connection.ask(next(asked)) for connection in connections))
    left = iter(range(requests))

    async def stream(connection: Connection) -> None:
        for _ in left:
            await connection.ask(next(asked))

    loop = asyncio.get_running_loop()
    cpu, started = server.cpu_s(), loop.time()
    await asyncio.gather(*(stream(connection) for connection in connections))
    seconds, cpu = loop.time() - started, server.cpu_s() - cpu
    for connection in connections:
        connection.close()
    return requests / seconds, 1000 * cpu / requests


async def measure(
    servers: Sequence[Server], rounds: int, one_by_one: int, per_stream: int
) -> Mapping[str, Found]:
    """All rounds over all servers, after a round that warms up."""
    found = {server.name: Found() for server in servers}
    asked, whole = bodies(), bodies(stream=False)
    with Progress(console=Console(stderr=True)) as progress:
        steps = (rounds + 1) * len(servers) * (1 + len(LOADS))
        task = progress.add_task("relay", total=steps)
        for number in range(rounds + 1):
            order = servers if number % 2 else servers[::-1]
            for server in order:
                share = SHARE.get(server.name, 1.0)
                got = await sequential(server, max(3, round(share * one_by_one)), asked)
                progress.advance(task)
                if number:
                    found[server.name].first_ms.append(got[0])
                    found[server.name].whole_ms.append(got[1])
            for (load, streams), server in itertools.product(LOADS.items(), order):
                share = SHARE.get(server.name, 1.0)
                requests = abs(streams) * max(1, round(share * per_stream))
                kind = asked if streams > 0 else whole
                rate, cpu = await parallel(server, abs(streams), requests, kind)
                progress.advance(task)
                if number:
                    found[server.name].rates[load].append(rate)
                    found[server.name].cpu_ms[load].append(cpu)
    return found


def tables(found: Mapping[str, Found]) -> str:
    """All tables, as Markdown."""
    bare = found[BARE]
    lines = [
        "| one stream | first token, ms | over the bare relay | whole reply, ms "
        "| over the bare relay |",
        "|---|---|---|---|---|",
    ]
    for name, ours in found.items():
        first = [a - b for a, b in zip(ours.first_ms, bare.first_ms, strict=True)]
        whole = [a - b for a, b in zip(ours.whole_ms, bare.whole_ms, strict=True)]
        lines.append(
            f"| {name} | {statistics.median(ours.first_ms):.2f} | {_spread(first, '+.2f')} "
            f"| {statistics.median(ours.whole_ms):.2f} | {_spread(whole, '+.2f')} |"
        )
    for load in LOADS:
        lines += [
            "",
            f"| {load} | replies/s | of the bare relay | × LiteLLM | its own CPU, ms a reply |",
            "|---|---|---|---|---|",
        ]
        slow = found[LITELLM].rates[load] if LITELLM in found else None
        for name, ours in found.items():
            rates = ours.rates[load]
            of_bare = [a / b for a, b in zip(rates, bare.rates[load], strict=True)]
            times = "" if slow is None else _spread(_ratios(rates, slow), ".1f")
            lines.append(
                f"| {name} | {statistics.median(rates):.0f} | {_spread(of_bare, '.0%')} "
                f"| {times} | {statistics.mean(ours.cpu_ms[load]):.2f} |"
            )
    return "\n".join(lines)


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _spread(values: Sequence[float], form: str) -> str:
    """The median with the quartiles of the rounds."""
    if len(values) < 2:
        return format(values[0], form)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}} … {high:{form}})"


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relay",
        description="What a proxy costs over a bare relay, as ratios from one run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_nginx(parser)
    parser.add_argument(
        "--litellm",
        type=Path,
        metavar="FOLDER",
        help="a virtual environment with litellm[proxy] (default: left out)",
    )
    parser.add_argument("--rounds", type=int, default=12, help="default: 12")
    parser.add_argument(
        "--sequential", type=int, default=25, help="requests one by one, a round (default: 25)"
    )
    parser.add_argument(
        "--per-stream", type=int, default=15, help="requests a stream, a round (default: 15)"
    )
    options = parser.parse_args()
    with running(options.nginx, options.litellm) as servers:
        found = uvloop.run(
            measure(list(servers.values()), options.rounds, options.sequential, options.per_stream)
        )
        print(tables(found))
        print(f"\nMedians of {options.rounds} rounds (quartiles), {os.cpu_count()} cores.", end=" ")
        print(recorded(servers[OURS]))


if __name__ == "__main__":
    main()
