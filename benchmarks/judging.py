"""Does the judge keep up, and what do its votes cost the agents on the same engine?

The first part records turns at a steady rate while `nextstate judge` votes on them with a mock
model. It measures how far the judge falls behind and how long a turn waits for its verdict. The
second part (`--live`) runs `nextstate up` on the demo's policy with a judge that votes on the same
engine. It compares an agent's time to the first token while the judge works and while it is
stopped, in alternating windows of a few seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import orjson
import psutil
from rich.console import Console
from rich.progress import track

from benchmarks.client import HOST, connect
from benchmarks.mock_judge import MODEL
from nextstate.config import StoreConfig
from nextstate.engine.process import free_port
from nextstate.records import NextState, Source, Timings, Turn, TurnKind, new_id
from nextstate.store import Store

POLICY = Path(__file__).parent.parent / "demo" / "policy"
POLICY_NAME = "seed-policy"
READY_S = 300.0
SETTLE_S = 1.0
"""Seconds for the votes under way after the judge was stopped."""
_MOCK = """\
[store]
dir = "{folder}/state"
[engine]
mode = "external"
url = "http://{host}:{engine}"
model = "{model}"
[judge]
share = 1.0
"""
_LIVE = """\
[store]
dir = "{folder}/state"
[engine]
model = "{policy}"
served_model_name = "{model}"
dtype = "float32"
max_model_len = 2048
args = ["--enforce-eager", "--max-num-seqs", "32"]
env = {{ TORCHDYNAMO_DISABLE = "1", VLLM_CPU_KVCACHE_SPACE = "1" }}
[proxy]
port = {port}
[judge]
max_tokens = 64
share = {share}
"""
_EXAMPLES = """\
examples:
  python -m benchmarks.judging
  python -m benchmarks.judging --rate 100 --seconds 60
  python -m benchmarks.judging --live
  python -m benchmarks.judging --live --share 1.0
"""


def a_turn(number: int) -> tuple[Turn, NextState]:
    """A turn of 1 000 prompt tokens and 100 reply tokens, with the user's answer."""
    name = new_id("turn")
    messages = [
        {"role": "system", "content": "You are a helpful agent. " * 40},
        {"role": "user", "content": f"Question {number}: how is the weather? " * 5},
    ]
    turn = Turn(
        id=name,
        session=new_id("session"),
        index=0,
        kind=TurnKind.MAIN,
        lineage="main",
        policy_version=0,
        client_model=MODEL,
        request={"model": MODEL, "messages": messages},
        reply={"role": "assistant", "content": f"**Weather {number}**: fine. " * 10},
        finish_reason="stop",
        prompt_ids=tuple(range(1000)),
        completion_ids=tuple(range(100)),
        behaviour_logprobs=(-0.5,) * 100,
        sampling={},
        timings=Timings(time.time(), 0.1, 1.0),
    )
    return turn, NextState(name, Source.USER, "No list, please: plain sentences.", 0.9)


def record(store: Store, first: int, count: int) -> None:
    """Records turns with their next states in one transaction."""
    with store.recording() as recording:
        for number in range(first, first + count):
            turn, state = a_turn(number)
            recording.add_turn(turn, turn.id.encode(), turn.id.encode())
            recording.add_next_states(turn.id, True, [state])


@contextmanager
def child(log: Path, *command: str) -> Generator[subprocess.Popen[bytes]]:
    """A process that ends with the block."""
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def keeping_up(rate: int, vote_s: float, seconds: int) -> str:
    """The first part."""
    with tempfile.TemporaryDirectory(prefix="nextstate-judging-") as name:
        folder, port = Path(name), free_port()
        config = folder / "nextstate.toml"
        config.write_text(_MOCK.format(folder=folder, host=HOST, engine=port, model=MODEL))
        store = Store(StoreConfig(dir=str(folder / "state")))
        mock = child(folder / "mock.log", "benchmarks.mock_judge", str(port), str(vote_s))
        judge = child(folder / "judge.log", "nextstate", "judge", "--config", str(config))
        with mock, judge as process:
            record(store, 0, 1)
            _wait(lambda: _judged(store) == 1, READY_S, folder / "judge.log")
            used = psutil.Process(process.pid).cpu_times()
            behind, recorded = [], 1
            started = time.monotonic()
            for _ in track(range(seconds * 10), "the judge keeps up", console=Console(stderr=True)):
                due = int(rate * (time.monotonic() - started)) + 1
                record(store, recorded, due - recorded)
                recorded = due
                behind.append(recorded - _judged(store))
                time.sleep(0.1)
            wall_s = time.monotonic() - started
            done = _judged(store)
            cpu = psutil.Process(process.pid).cpu_times()
        waits = _waits(folder / "state" / "nextstate.sqlite3")
        store.close()
    share = (cpu.user + cpu.system - used.user - used.system) / wall_s
    return (
        f"{recorded / wall_s:.1f} turns/s recorded, {done / wall_s:.1f} judged, 3 votes of "
        f"{1000 * vote_s:.0f} ms each: at most {max(behind)} turns behind, {behind[-1]} at the "
        "end; "
        f"from record to verdict {1000 * statistics.median(waits):.0f} ms (median), "
        f"{1000 * statistics.quantiles(waits, n=100)[98]:.0f} ms (p99); "
        f"{100 * share:.0f} % of a core"
    )


def live_traffic(share: float, rounds: int, window_s: float) -> str:
    """The second part."""
    with tempfile.TemporaryDirectory(prefix="nextstate-judging-") as name:
        folder, port = Path(name), free_port()
        config, log = folder / "nextstate.toml", folder / "up.log"
        values = {"policy": POLICY, "model": POLICY_NAME, "share": share}
        config.write_text(_LIVE.format(folder=folder, port=port, **values))
        with child(log, "nextstate", "up", "--config", str(config)) as process:
            _wait(lambda: "ready: " in log.read_text(), READY_S, log)
            store = Store(StoreConfig(dir=str(folder / "state")))
            record(store, 0, 200)
            judge = _part(process.pid, "judge")
            first: dict[bool, list[list[float]]] = {True: [], False: []}
            asyncio.run(_ask(port, window_s))  # the first requests warm the engine up
            for number in track(range(rounds), "an agent talks", console=Console(stderr=True)):
                for working in (True, False) if number % 2 else (False, True):
                    os.kill(judge.pid, signal.SIGCONT if working else signal.SIGSTOP)
                    time.sleep(SETTLE_S)
                    first[working].append(asyncio.run(_ask(port, window_s)))
            os.kill(judge.pid, signal.SIGCONT)
            log_lines = (folder / "state" / "logs" / "judge.log").read_text().splitlines()
            attempts = sum("has no verdict yet" in line for line in log_lines)
            store.close()
    pairs = list(zip(first[True], first[False], strict=True))
    rises = [statistics.mean(with_judge) / statistics.mean(alone) for with_judge, alone in pairs]
    middle = [statistics.median(w) / statistics.median(a) for w, a in pairs]
    alone = 1000 * statistics.mean(t for window in first[False] for t in window)
    spread = statistics.stdev(statistics.mean(w) for w in first[False]) * 1000
    return (
        f"share = {share:g}: time to the first token alone {alone:.1f} ms (± {spread:.1f} between "
        f"windows); while the judge works {statistics.median(rises):.3f} of it (mean of a window, "
        f"median of {rounds} rounds; from {min(rises):.3f} to {max(rises):.3f}), medians "
        f"{statistics.median(middle):.3f}; {sum(map(len, first[True]))} requests each; the judge "
        f"took up {attempts} turns"
    )


async def _ask(port: int, seconds: float) -> list[float]:
    """Seconds to the first event of an agent's requests, made one after the other."""
    connection = await connect(port)
    found: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        text = f"Tom has {len(found)} apples and gets {time.monotonic_ns() % 97} more. How many? "
        messages = [{"role": "user", "content": text * 8}]
        body = {"model": POLICY_NAME, "messages": messages, "stream": True, "max_tokens": 24}
        found.append((await connection.ask(orjson.dumps(body))).first_s)
        await asyncio.sleep(0.1)
    connection.close()
    return found


def _part(parent: int, name: str) -> psutil.Process:
    for process in psutil.Process(parent).children():
        if name in process.cmdline():
            return process
    sys.exit(f"`nextstate up` runs no {name}")


def _judged(store: Store) -> int:
    return store.counts().get("judgements/done", 0)


def _waits(file: Path) -> Sequence[float]:
    """Seconds from each turn's record to its verdict."""
    database = sqlite3.connect(file)
    query = (
        "SELECT v.created_at - t.started_at FROM verdicts v JOIN turns t ON t.id = v.turn "
        "ORDER BY t.seq LIMIT -1 OFFSET 1"
    )
    found = [row[0] for row in database.execute(query)]
    database.close()
    return found


def _wait(condition: Callable[[], bool], timeout_s: float, log: Path) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            sys.exit(f"not ready after {timeout_s:.0f} s; its log ends:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def main() -> None:
    """Runs one of the parts and prints its results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.judging",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rate", type=int, default=50, help="turns a second (default: 50)")
    parser.add_argument("--vote-s", type=float, default=0.1, help="seconds a vote (default: 0.1)")
    parser.add_argument("--seconds", type=int, default=30, help="of steady load (default: 30)")
    parser.add_argument("--live", action="store_true", help="the second part, on a real vLLM")
    parser.add_argument("--share", type=float, default=0.02, help="[judge] share (default: 0.02)")
    parser.add_argument("--rounds", type=int, default=8, help="of two windows (default: 8)")
    parser.add_argument("--window-s", type=float, default=8.0, help="a window (default: 8)")
    asked = parser.parse_args()
    if asked.live:
        print(live_traffic(asked.share, asked.rounds, asked.window_s))
    else:
        print(keeping_up(asked.rate, asked.vote_s, asked.seconds))


if __name__ == "__main__":
    main()
