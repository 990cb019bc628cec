"""Does the policy learn, how fast, and does it stay whole?

The demo's persona talks to the demo's policy over some seeds; after each update the version that
serves answers held-out questions. A reply counts only if it satisfies the persona and is still
right. Runs are a function of their options; see `benchmarks/learning_loop.py` for what is real.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.learning_loop import MEASURED, Loop, Plan, Run
from demo.run import LEARNER
from demo.tasks import Domain
from learner.config import LearnerConfig


def run(plan: Plan) -> Run:
    """One run, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return Loop(plan, Path(folder)).learn()


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        epilog="example: python -m benchmarks.learning --methods combined --set learning_rate=6e-3",
    )
    parser.add_argument("--methods", nargs="+", default=["combined", "binary", "opd"])
    parser.add_argument("--persona", choices=list(Domain), default=Domain.STUDENT)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=4, help="of 16 turns each")
    parser.add_argument("--questions", type=int, default=128, help="held-out, after each update")
    parser.add_argument("--flipped", type=float, default=0.0, help="share of wrong verdicts")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of [learner], over the demo's"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time")
    parser.add_argument("--out", type=Path, help="a file to which each run is added, as JSON")
    given = parser.parse_args()
    settings = dict(_setting(text) for text in given.set)
    plans = [
        Plan(
            LearnerConfig(**{**LEARNER, "method": method, "seed": seed, **settings}),
            Domain(given.persona),
            given.updates,
            seed,
            given.flipped,
            given.questions,
        )
        for method in given.methods
        for seed in range(given.seeds)
    ]
    runs: dict[str, list[Run]] = {}
    with ProcessPoolExecutor(given.jobs) as pool, Progress(transient=True) as progress:
        task = progress.add_task("learning", total=len(plans))
        futures = {pool.submit(run, plan): plan for plan in plans}
        for future in as_completed(futures):
            plan, found = futures[future], future.result()
            runs.setdefault(plan.config.method, []).append(found)
            progress.advance(task)
            if given.out:
                with given.out.open("a") as file:
                    record = {"set": given.set, **asdict(plan), **asdict(found)}
                    file.write(json.dumps(record) + "\n")
    Console(width=160).print(table({method: runs[method] for method in given.methods}))


def table(runs: dict[str, list[Run]]) -> Table:
    """Scores after each update: the mean over the seeds, its lowest and its highest."""
    made = Table(title="satisfied and right (right) after n updates: mean (lowest … highest)")
    made.add_column("method")
    measured = {p.update for found in runs.values() for run in found for p in run.points}
    shown = [update for update in MEASURED if update in measured]
    for update in shown:
        made.add_column(str(update), justify="right")
    for heading in ("elsewhere", "turns", "rejected", "served"):
        made.add_column(heading, justify="right")
    for method, found in runs.items():
        elsewhere = [run.points[-1].elsewhere - run.points[0].elsewhere for run in found]
        made.add_row(
            method,
            *(_cell(found, update) for update in shown),
            f"{mean(elsewhere):+.3f} ({min(elsewhere):+.3f})",
            f"{mean(run.turns for run in found):.0f}",
            f"{sum(len(run.rejected) for run in found)} of {sum(run.made for run in found)}",
            str(sum(run.rejected_served for run in found)),
        )
    return made


def _cell(runs: Sequence[Run], update: int) -> str:
    reached = [point for run in runs for point in run.points if point.update == update]
    if not reached:
        return "–"
    scores = [point.score for point in reached]
    right = mean(point.right for point in reached)
    count = "" if len(reached) == len(runs) else f" n={len(reached)}"
    return f"{mean(scores):.2f} ({right:.2f})\n{min(scores):.2f}…{max(scores):.2f}{count}"


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    kinds = {f.name: type(f.default) for f in fields(LearnerConfig)}
    if key not in kinds:
        raise SystemExit(f"--set {text}: [learner] has no key {key!r}")
    return key, value == "true" if kinds[key] is bool else kinds[key](value)


if __name__ == "__main__":
    main()
