"""Many paced streams at once: does a proxy make tokens late, and does its memory grow?

The same load goes to the engine alone, through the bare relay and through ours with recording on,
in turn. Then it stays on ours for minutes while the resident memory is sampled. A gap is the time
between two events of one reply at the client. The last gap of a reply includes the wait for the
record.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
from rich.console import Console
from rich.progress import Progress

from benchmarks.load import Gaps
from benchmarks.servers import BARE, DIRECT, OURS, Server, add_nginx, recorded, running

SAMPLE_S = 5.0
_EXAMPLES = """\
examples:
  python -m benchmarks.streams
  python -m benchmarks.streams --streams 16 --seconds 5 --rounds 1 --minutes 0.2
"""


@dataclass(frozen=True, slots=True)
class Load:
    """The load of every server."""

    streams: int
    tokens: int
    pace_s: float


@dataclass(slots=True)
class Measured:
    """The results of one server."""

    gaps: Gaps
    cpu_s: float
    """The server's own CPU time."""
    engine_cpu_s: float


def run_load(
    server: Server, engine: Server, load: Load, seconds: float, watch: Callable[[], None]
) -> Measured:
    """One load on one server; `watch` is called every second while it runs."""
    command = [sys.executable, "-m", "benchmarks.load", str(server.port), str(load.streams)]
    command += [str(load.tokens), str(load.pace_s), str(seconds)]
    cpu, engine_cpu = server.cpu_s(), engine.cpu_s()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        while True:
            try:
                out, _ = child.communicate(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                watch()
    if child.returncode:
        sys.exit(f"the load on {server.name} failed with code {child.returncode}")
    found = orjson.loads(out)
    found["streams"] = [Counter({int(k): v for k, v in gaps.items()}) for gaps in found["streams"]]
    return Measured(Gaps(**found), server.cpu_s() - cpu, engine.cpu_s() - engine_cpu)


def take_turns(
    servers: Mapping[str, Server], load: Load, rounds: int, seconds: float, progress: Progress
) -> dict[str, Measured]:
    """The load on every server in turn, all rounds added up."""
    task = progress.add_task("in turn", total=rounds * len(servers))
    found: dict[str, Measured] = {}
    for _ in range(rounds):
        for name, server in servers.items():
            got = run_load(server, servers[DIRECT], load, seconds, lambda: None)
            progress.advance(task)
            if name not in found:
                found[name] = got
                continue
            found[name].gaps.add(got.gaps)
            found[name].cpu_s += got.cpu_s
            found[name].engine_cpu_s += got.engine_cpu_s
    return found


def soak(
    server: Server, engine: Server, load: Load, minutes: float, progress: Progress
) -> tuple[Measured, list[tuple[float, float]]]:
    """The load for minutes, and the server's (seconds, resident MB) meanwhile."""
    task = progress.add_task("memory", total=60 * minutes)
    started = time.monotonic()
    samples = [(0.0, server.rss_mb())]

    def watch() -> None:
        now = time.monotonic() - started
        progress.update(task, completed=now)
        if now - samples[-1][0] >= SAMPLE_S:
            samples.append((now, server.rss_mb()))

    found = run_load(server, engine, load, 60 * minutes, watch)
    samples.append((time.monotonic() - started, server.rss_mb()))
    return found, samples


def gaps_table(found: Mapping[str, Measured]) -> str:
    """The gaps of every server, as Markdown."""
    bare = found[BARE].gaps
    lines = [
        "| | gap p50, ms | p99, ms | longest, ms | p99 of the worst stream, ms "
        "| over the bare relay's | over direct | events/s a stream | its own CPU, % of a core |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in found.items():
        gaps, worst = measured.gaps, measured.gaps.worst_ms(0.99)
        lines.append(
            f"| {name} | {gaps.quantile_ms(0.5):.1f} | {gaps.quantile_ms(0.99):.1f} "
            f"| {gaps.quantile_ms(1.0):.1f} | {worst:.1f} | {worst - bare.worst_ms(0.99):+.1f} "
            f"| {worst - found[DIRECT].gaps.worst_ms(0.99):+.1f} | {gaps.rate:.1f} "
            f"| {measured.cpu_s / gaps.wall_s:.0%} |"
        )
    return "\n".join(lines)


def busy(found: Mapping[str, Measured]) -> str:
    """How busy engine and client were; they must not limit the measurement."""
    wall = sum(measured.gaps.wall_s for measured in found.values())
    engine = sum(measured.engine_cpu_s for measured in found.values()) / wall
    client = sum(measured.gaps.cpu_s for measured in found.values()) / wall
    return f"Mock engine {engine:.0%} and client {client:.0%} of a core."


def memory_table(samples: list[tuple[float, float]]) -> str:
    """The resident memory over time, as Markdown."""
    late = [sample for sample in samples if sample[0] >= samples[-1][0] / 2]
    sizes = [size for _, size in samples]
    return "\n".join(
        [
            "| resident memory, MB: start | end | highest | slope, MB/min | of the second half |",
            "|---|---|---|---|---|",
            f"| {sizes[0]:.0f} | {sizes[-1]:.0f} | {max(sizes):.0f} | {_slope(samples):+.2f} "
            f"| {_slope(late):+.2f} |",
        ]
    )


def _slope(samples: list[tuple[float, float]]) -> float:
    """MB a minute, by least squares."""
    if len(samples) < 2:
        return 0.0
    times, sizes = zip(*samples, strict=True)
    return 60 * statistics.linear_regression(times, sizes).slope


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streams",
        description="What a proxy does to many paced streams, and its memory over minutes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_nginx(parser)
    parser.add_argument("--streams", type=int, default=256, help="default: 256")
    parser.add_argument("--tokens", type=int, default=250, help="of a reply (default: 250)")
    parser.add_argument("--rate", type=float, default=50.0, help="tokens/s (default: 50)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--seconds", type=float, default=20.0, help="a load (default: 20)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of memory (default: 10)")
    options = parser.parse_args()
    load = Load(options.streams, options.tokens, 1 / options.rate)
    shortest = load.tokens * load.pace_s
    if options.seconds < 2 * shortest:
        parser.error(f"--seconds {options.seconds}: expected twice a reply, {2 * shortest} or more")
    with (
        running(options.nginx) as servers,
        Progress(console=Console(stderr=True)) as progress,
    ):
        found = take_turns(servers, load, options.rounds, options.seconds, progress)
        ours = servers[OURS]
        long, samples = soak(ours, servers[DIRECT], load, options.minutes, progress)
        found[f"{OURS}, {options.minutes:g} minutes"] = long
        print(gaps_table(found), busy(found), memory_table(samples), recorded(ours), sep="\n\n")


if __name__ == "__main__":
    main()
