"""Recording on SQLite and on PostgreSQL, one after the other, by one writer and by several.

Each writer links and commits batches of turns, as the proxy's writer does. The conversations are
told apart by what they contain.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice

from benchmarks.exchanges import exchange
from nextstate.config import StoreConfig
from nextstate.errors import WaitError
from nextstate.hooks import load_plugin
from nextstate.records import Json
from nextstate.store import Store
from proxy.exchange import Exchange, Read, look_ahead, prepared, read_exchange, record
from proxy.linking.history import RememberedMessages

_BATCH = 16
_TURNS = 8
"""Of each conversation."""
_AT_ONCE = 16
"""Conversations of a writer that go on beside each other."""
_EXAMPLES = """examples:
  python -m benchmarks.databases postgresql://postgres@127.0.0.1:5432/bench
  python -m benchmarks.databases postgresql://… --seconds 20 --writers 1 4"""


def exchanges(writer: int) -> Iterator[Exchange]:
    """Turns without an end, of conversations that go on beside each other."""
    first = 0
    while True:
        said: list[list[Json]] = [[] for _ in range(_AT_ONCE)]
        for step in range(_TURNS):
            for number, messages in enumerate(said):
                name = f"{writer}-{first + number}-{step}"
                messages.append({"role": "user", "content": f"question {name} " + "why " * 50})
                reply: Json = {"role": "assistant", "content": f"answer {name} " + "so " * 100}
                request: Json = {"model": "m", "messages": [*messages]}
                ids = list(range(100 + step * 150))
                yield exchange(
                    f"turn_{time.time_ns():x}{name}",
                    request,
                    reply,
                    prompt_ids=ids,
                    completion_ids=ids[:100],
                    logprobs=[-0.25] * 100,
                )
                messages.append(reply)
        first += _AT_ONCE


def write(config: StoreConfig, writer: int, seconds: float) -> None:
    """Says when it is ready, waits for a line, records for so long, and says how much."""
    store, profile = Store(config), load_plugin("agents", "openclaw", None)
    source, remembered = exchanges(writer), RememberedMessages()
    print("ready", flush=True)
    sys.stdin.readline()
    turns, waits = 0, list[float]()
    cpu, end = time.process_time(), time.monotonic() + seconds
    while time.monotonic() < end:
        read = [read_exchange(one, profile, remembered) for one in islice(source, _BATCH)]
        read = prepared(store, read)
        began = time.monotonic()
        while not _is_written(store, read):
            pass
        waits.append(time.monotonic() - began)
        turns += len(read)
    cpu = time.process_time() - cpu
    print(turns, sorted(waits)[int(len(waits) * 0.99)], cpu, flush=True)


def _is_written(store: Store, read: list[Read]) -> bool:
    """False if others held the database for as long as a writer waits at once."""
    try:
        with store.recording() as recording:
            look_ahead(recording, read)
            for one in read:
                if not recording.holds(one.exchange.turn_id):
                    record(recording, one)
    except WaitError:
        return False
    return True


def measure(config: StoreConfig, writers: int, seconds: float) -> tuple[float, float, float]:
    """(turns/s of all, the largest 99th percentile of a commit in ms, CPU ms a turn)."""
    Store(config).close()
    argv = [sys.executable, "-m", "benchmarks.databases", config.url, "--dir", config.dir]
    children = [
        subprocess.Popen(
            [*argv, "--seconds", str(seconds), "--writer", str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(writers)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    found = [tuple(map(float, child.communicate()[0].split())) for child in children]
    turns = sum(row[0] for row in found)
    return turns / seconds, 1000 * max(r[1] for r in found), 1000 * sum(r[2] for r in found) / turns


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.databases",
        description="Turns a second on SQLite and on PostgreSQL, in one run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="of an empty PostgreSQL database")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help=argparse.SUPPRESS)
    parser.add_argument("--writer", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.writer is not None:
        write(StoreConfig(options.dir, options.url), options.writer, options.seconds)
        return
    print("| writers | SQLite, turns/s | p99, ms | CPU, ms | PostgreSQL | p99 | CPU | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for writers in options.writers:
        for _ in range(options.rounds):
            folder = tempfile.mkdtemp()
            cells = [str(writers)]
            rates: list[float] = []
            for url in (f"sqlite:///{folder}/a.sqlite3", options.url):
                rate, p99, cpu = measure(StoreConfig(folder, url), writers, options.seconds)
                rates.append(rate)
                cells += [f"{rate:.0f}", f"{p99:.0f}", f"{cpu:.2f}"]
            print(f"| {' | '.join(cells)} | {rates[1] / rates[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
