"""How many statements a second each process sends to PostgreSQL while nothing happens.

The server needs `shared_preload_libraries = pg_stat_statements`. Its counts tell of all that use
the database: let nobody else do so.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import psycopg

from judge.config import JudgeConfig
from judge.stage import run as run_judge
from learner.config import LearnerConfig
from learner.lineage import Lineage
from learner.stage import train_in_turn
from nextstate.config import StoreConfig
from nextstate.engine.client import EngineClient
from nextstate.store import Store
from nextstate.store.waiting import Patience
from proxy.app import Proxy
from proxy.config import ProxyConfig
from proxy.lineages import Lineages
from proxy.writer_process import WriterProcess

_EXAMPLE = """example:
  python -m benchmarks.idle_statements postgresql://postgres@127.0.0.1:5432/bench"""
_SETTLE_S = 3.0
"""After the start of a process, before its statements are counted."""


def judge(store: Store, stop: threading.Event) -> None:
    """An idle judge."""

    async def until_told() -> None:
        told = asyncio.Event()
        work = run_judge(store, JudgeConfig(), cast(Any, None), cast(Any, None), told)
        running = asyncio.create_task(work)
        await asyncio.to_thread(stop.wait)
        told.set()
        await running

    asyncio.run(until_told())


def learner(store: Store, stop: threading.Event) -> None:
    """A learner of one lineage, without a model: nothing is ready to train."""
    config, none = LearnerConfig(), cast(Any, None)
    lineage = Lineage("main", store, config, none, none, none, none, stop)
    poll_s = max(config.poll_s, _told_poll_s())
    train_in_turn([lineage], lambda _: None, lambda: None, stop, poll_s)


def _told_poll_s() -> float:
    from learner import stage

    return getattr(stage, "_TOLD_POLL_S", 0.0)


def proxy(store: Store, stop: threading.Event) -> None:
    """A proxy whose engine is away."""

    async def until_told() -> None:
        async with EngineClient("http://127.0.0.1:9", "m") as engine:
            serving = Proxy(
                ProxyConfig(port=0),
                store,
                [engine],
                "generic",
                writer=WriterProcess(),
                zero_adapter=Path("none"),
                record=True,
                lineages=Lineages("m", None, {}),
                engine_key=None,
                worker="1@bench:0",
            )
            runner = serving.runner()
            await runner.setup()
            await asyncio.to_thread(stop.wait)
            await runner.cleanup()

    asyncio.run(until_told())


def calls(connection: psycopg.Connection[Any]) -> int:
    """The statements that the database has run so far, but for those that count them."""
    row = connection.execute(
        "SELECT coalesce(sum(calls), 0)::int FROM pg_stat_statements AS s JOIN pg_database AS d "
        "ON d.oid = s.dbid WHERE d.datname = current_database() AND query NOT LIKE '%pg_stat_%'"
    ).fetchone()
    return 0 if row is None else row[0]


def measured(url: str, part: Callable[[Store, threading.Event], None], seconds: float) -> float:
    """Statements a second of one idle process."""
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as folder, psycopg.connect(url, autocommit=True) as counting:
        counting.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        with closing(Store(StoreConfig(folder, url), patience=Patience(10.0))) as store:
            thread = threading.Thread(target=part, args=(store, stop))
            thread.start()
            time.sleep(_SETTLE_S)
            before = calls(counting)
            time.sleep(seconds)
            after = calls(counting)
            stop.set()
            thread.join()
    return (after - before) / seconds


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="of an empty database")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each process")
    given = parser.parse_args()
    for part in (judge, learner, proxy):
        print(f"{part.__name__} {measured(given.url, part, given.seconds):.1f} statements/s")


if __name__ == "__main__":
    main()
