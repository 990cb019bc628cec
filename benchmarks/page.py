"""How long does the proxy take for each page of its web page, with many turns in the store?

The turns are those of `benchmarks.growth`; every second one gets a verdict, a fifth of them are one
session, and there are 200 versions and an episode for each ten turns. Each page is asked for over
HTTP, one request after the other. The CPU time is that of client and proxy together: it says what
a page costs where other programs keep the machine busy.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import sqlite3
import statistics
import tempfile
from pathlib import Path
from time import perf_counter, process_time

import aiohttp
from aiohttp import web

from benchmarks.conversations import FILE, Conversation, Filler
from nextstate.app.page.live import watched
from nextstate.app.page.routes import Page
from nextstate.app.settings import Settings
from nextstate.engine.process import free_port
from nextstate.episodes import Episode
from nextstate.records import Json, PolicyVersion, VersionState
from nextstate.store import Store
from proxy.allowance import Allowance
from proxy.feedback import A_MINUTE, AT_ONCE
from proxy.keys import Keys
from proxy.lineages import Lineages
from proxy.tries import Tries

_VERSIONS, _AT_ONCE = 200, 500
_HEALTH: Json = {"engine": "up"}


def fill(folder: Path, turns: int) -> None:
    """A store with turns, verdicts, samples and versions."""
    filler = Filler(folder)
    filler.fill(turns, lambda _: None)
    filler.close()
    with sqlite3.connect(folder / FILE) as db:
        judged = "FROM turns WHERE seq % 2 = 0"
        db.execute(
            "INSERT INTO verdicts (turn, votes, score, judge, created_at) "
            f"SELECT id, '[1]', seq % 3 - 1, 'rules', 0 {judged}"
        )
        db.execute(
            "INSERT INTO samples (turn, lineage, state, policy_version, score, hinted, seq) "
            f"SELECT id, lineage, 'ready', seq * {_VERSIONS} / {turns}, seq % 3 - 1, 0, seq "
            f"{judged}"
        )
        db.execute(
            "UPDATE turns SET session = 'long', idx = seq, client_session = NULL "
            f"WHERE seq <= {turns // 5}"
        )
    db.close()


def fill_episodes(store: Store, count: int) -> None:
    """Episodes of twenty environments, half of which are settled."""
    for start in range(0, count, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, count))
        episodes = [Episode(f"e-{n}", "main", f"env-{n % 20}", f"Task {n}.") for n in numbers]
        store.episodes.open(episodes, None)
    with sqlite3.connect(store.dir / FILE) as db:
        db.execute(
            "UPDATE episodes SET state = 'settled', outcome = rowid % 3 = 0, settled_at = rowid "
            "WHERE rowid % 2 = 0"
        )
    db.close()


def paths(turns: int) -> list[str]:
    """One address of each page; also those that look through the most turns."""
    conversation = Conversation(turns // 4 - 1)
    return [
        "/",
        "/page/turns",
        "/page/turns?version=150",
        "/page/turns?untrained=1",
        f"/page/turns?session={conversation.session}",
        f"/page/turns/{conversation.turn_id(3)}",
        f"/page/turns/{conversation.turn_id(3)}/forget",
        "/page/sessions",
        "/page/session?name=long",
        f"/page/session?name={conversation.session}",
        f"/page/session/forget?name={conversation.session}",
        "/page/episodes",
        "/page/episodes?environment=env-7&outcome=solved",
        "/page/episodes/e-5",
        "/page/running",
        "/page/export?what=kto",
        "/page/versions",
        "/page/versions/main/150",
        "/page/versions/main/150/rollback",
    ]


Times = list[tuple[float, float]]
"""(milliseconds, milliseconds of CPU time) of each request."""


async def measure(page: Page, port: int, asked: list[str], times: int) -> dict[str, Times]:
    """What each request took, by address."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", page.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    found: dict[str, Times] = {path: [] for path in asked}
    async with aiohttp.ClientSession() as http:
        for number in range(times + 1):
            for path in asked:
                started = perf_counter(), process_time()
                answer = await http.get(f"http://127.0.0.1:{port}{path}")
                text = await answer.text()
                assert answer.status == 200, text
                if number:  # the first time is a warm-up
                    found[path].append(_since(started))
    await runner.cleanup()
    return found


def _since(started: tuple[float, float]) -> tuple[float, float]:
    return 1000 * (perf_counter() - started[0]), 1000 * (process_time() - started[1])


def main() -> None:
    """Fills a store, measures and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("--turns", type=int, default=100_000, help="default: 100000")
    parser.add_argument("--times", type=int, default=20, help="requests a page (default: 20)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nextstate-page-") as name:
        folder = Path(name) / "state"
        fill(folder, options.turns)
        file = Path(name) / "nextstate.toml"
        file.write_text(f'[engine]\nmodel = "base"\n[store]\ndir = "{folder}"\n')
        settings = Settings.read(file)
        store = Store(settings.store)
        for number in range(1, _VERSIONS + 1):
            state = VersionState.RETIRED if number < _VERSIONS else VersionState.SERVING
            version = PolicyVersion("main", number, number - 1, "/a", "ff", 16, state)
            store.versions.add(version, None)
        fill_episodes(store, options.turns // 10)
        nothing = functools.partial(asyncio.sleep, 0)
        keys, allowance = Keys(Lineages("base", None)), Allowance(AT_ONCE, A_MINUTE)
        limits = allowance, Tries(), allowance
        page = Page(settings, store, keys, lambda _: nothing(), lambda: _HEALTH, *limits)
        found = asyncio.run(measure(page, free_port(), paths(options.turns), options.times))
        looks: Times = []
        for _ in range(options.times):
            started = perf_counter(), process_time()
            watched(store, lambda: _HEALTH)
            looks.append(_since(started))
        found["the look of all streams"] = looks
        store.close()
    print(f"{options.turns:,} turns, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| page | median, ms | slowest, ms | CPU, ms |\n|---|---|---|---|")
    for path, values in found.items():
        wall, cpu = zip(*values, strict=True)
        print(f"| `{path}` | {statistics.median(wall):.0f} | {max(wall):.0f} | ", end="")
        print(f"{statistics.median(cpu):.0f} |")


if __name__ == "__main__":
    main()
