"""Does the policy learn, how fast, and does it stay whole?

The demo's persona talks to the demo's policy over some seeds; after each update the version that
serves answers held-out questions. A reply counts only if it satisfies the persona and is still
right. Runs are a function of their options; see `benchmarks/learning_loop.py` for what is real.

With `--model`, a person with a wish talks to a real model in their place, and the defaults of
`[learner]` hold: see `benchmarks/learning_model.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.learning_loop import Plan, Point, Run, toy_loop
from benchmarks.learning_model import add_model_options, learn_with_model
from demo.course import LEARNER
from demo.tasks import Domain
from learner.config import LearnerConfig

_WIDTH = 400
_SHOWN = (0, 1, 2, 3, 4, 8, 14, 24, 34)


def run(plan: Plan) -> Run:
    """One run, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return toy_loop(plan, Path(folder)).learn()


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
    parser.add_argument(
        "--questions", type=int, help="held-out (default: 128 of each domain, with --model 48)"
    )
    parser.add_argument("--flipped", type=float, default=0.0, help="share of wrong verdicts")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of [learner], over the demo's or, with --model, the defaults",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time")
    parser.add_argument("--out", type=Path, help="a file to which each run is added, as JSON")
    parser.add_argument(
        "--show", type=Path, nargs="+", help="only show the runs of such files; nothing is run"
    )
    add_model_options(parser)
    given = parser.parse_args()
    if given.model:
        settings = dict(_setting(text) for text in given.set)
        return learn_with_model(given, settings)
    found = read(given.show) if given.show else _run_all(given)
    Console(width=_WIDTH).print(table(found))


def _run_all(given: argparse.Namespace) -> dict[str, list[Run]]:
    settings = dict(_setting(text) for text in given.set)
    plans = [
        Plan(
            LearnerConfig(**{**LEARNER, "method": method, "seed": seed, **settings}),
            Domain(given.persona),
            given.updates,
            seed,
            given.flipped,
            given.questions or 128,
        )
        for method in given.methods
        for seed in range(given.seeds)
    ]
    runs: dict[str, list[Run]] = {}
    # A forked process could not use a GPU.
    with (
        ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool,
        Progress(transient=True) as progress,
    ):
        task = progress.add_task("learning", total=len(plans))
        futures = {pool.submit(run, plan): plan for plan in plans}
        for future in as_completed(futures):
            record = {"set": given.set, **asdict(futures[future]), **asdict(future.result())}
            runs.setdefault(_label(record), []).append(future.result())
            progress.advance(task)
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    return runs


def read(files: Sequence[Path]) -> dict[str, list[Run]]:
    """The recorded runs, by what distinguishes them."""
    runs: dict[str, list[Run]] = {}
    names = {f.name for f in fields(Run)}
    for file in files:
        for line in file.read_text().splitlines():
            record = json.loads(line)
            record["points"] = [Point(**point) for point in record["points"]]
            found = Run(**{name: record[name] for name in names})
            runs.setdefault(_label(record), []).append(found)
    return runs


def _label(record: dict[str, Any]) -> str:
    """What distinguishes the runs of one row."""
    persona = [] if record["persona"] == Domain.STUDENT else [record["persona"]]
    flipped = [f"{record['flipped']:.0%} flipped"] if record["flipped"] else []
    return ", ".join([record["config"]["method"], *persona, *record["set"], *flipped])


def table(runs: dict[str, list[Run]]) -> Table:
    """Mean score over the seeds after each update, (the lowest), and the mean share right."""
    made = Table(box=box.MARKDOWN)
    made.add_column("after n updates")
    measured = {p.update for found in runs.values() for run in found for p in run.points}
    for update in sorted(measured & set(_SHOWN)):
        made.add_column(str(update))
    for heading in ("right elsewhere", "replies", "rejected", "of them served"):
        made.add_column(heading)
    for label, found in runs.items():
        elsewhere = [run.points[-1].elsewhere - run.points[0].elsewhere for run in found]
        made.add_row(
            f"{label} ({len(found)} seeds)",
            *(_cell(found, update) for update in sorted(measured & set(_SHOWN))),
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
    count = "" if len(reached) == len(runs) else f", {len(reached)} runs"
    return f"{mean(scores):.2f} ({min(scores):.2f}) {right:.2f}{count}"


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    kinds = {f.name: type(f.default) for f in fields(LearnerConfig)}
    if key not in kinds:
        raise SystemExit(f"--set {text}: [learner] has no key {key!r}")
    return key, value == "true" if kinds[key] is bool else kinds[key](value)


if __name__ == "__main__":
    main()
