"""Episodes a second of the environment `gui`, with an agent that knows each task's solution.

No model and no proxy: what a real Chromium takes for its pages. Each row plays as many episodes on
every page, held-out tasks, with so many at once. CPU seconds are those of Python, of Playwright's
driver and of all processes of the browsers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from plugins.environments.gui import PageKind, create
from plugins.environments.gui_tasks import PAGES, solution, task


@dataclass(slots=True)
class Times:
    """Milliseconds of each call."""

    reset: list[float] = field(default_factory=list[float])
    step: list[float] = field(default_factory=list[float])
    picture: list[float] = field(default_factory=list[float])


async def play(kind: PageKind, page: str, number: int, times: Times, pictures: bool) -> None:
    """One episode, which must be solved."""
    made, environment = task(page, "eval", number), kind.make()
    fields = {name: made[name] for name in ("page", "seed", "words")}
    try:
        began = time.perf_counter()
        first = await environment.reset(fields, 0)
        times.reset.append(1000 * (time.perf_counter() - began))
        for action in solution(page, first):
            if pictures:
                began = time.perf_counter()
                await environment.picture()
                times.picture.append(1000 * (time.perf_counter() - began))
            began = time.perf_counter()
            await environment.step(action)
            times.step.append(1000 * (time.perf_counter() - began))
        assert (await environment.score()).outcome == 1.0
    finally:
        await environment.close()


def cpu_s() -> float:
    """CPU seconds that this process and its descendants have used."""
    found = 0.0
    for one in (own := psutil.Process(), *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found += sum(one.cpu_times()[:4])
    return found


async def measure(parallel: int, each: int, pictures: bool) -> tuple[float, float, float, Times]:
    """Seconds until all tabs are open; after that episodes a second, CPU seconds of each, times."""
    kind, times, places = create(None), Times(), asyncio.Semaphore(parallel)

    async def one(page: str, number: int, of: Times) -> None:
        async with places:
            await play(kind, page, number, of, pictures)

    try:
        began = time.monotonic()
        await asyncio.gather(*(one("click-button", at, Times()) for at in range(parallel)))
        started, used, count = time.monotonic(), cpu_s(), each * len(PAGES)
        await asyncio.gather(*(one(page, at, times) for at in range(each) for page in PAGES))
        rate, cost = count / (time.monotonic() - started), (cpu_s() - used) / count
        return started - began, rate, cost, times
    finally:
        await kind.release()


def middle(values: Sequence[float]) -> str:
    """The median and the 90th percentile."""
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.0f}, {ordered[9 * len(ordered) // 10]:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=8, help="episodes on each page (default: 8)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 8, 16], metavar="N")
    parser.add_argument("--pictures", action="store_true", help="take a picture at each step")
    args = parser.parse_args()
    print(
        "| at once | until ready, s | episodes/s | CPU, s an episode | reset, ms | step, ms |",
        end="",
    )
    print(" picture, ms | load |\n|---|---|---|---|---|---|---|---|")
    for parallel in args.at_once:
        ready, rate, cost, times = asyncio.run(measure(parallel, args.each, args.pictures))
        shown = middle(times.picture) if args.pictures else "–"
        row = f"| {parallel} | {ready:.1f} | {rate:.2f} | {cost:.2f} | {middle(times.reset)} "
        row += f"| {middle(times.step)} | {shown} | {os.getloadavg()[0]:.0f} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
