"""Agents on several engines: a simulation from measured service times.

    python -m benchmarks.cluster > benchmarks/results/cluster.md
    python -m benchmarks.cluster --times mine.json --set memory=270000 context=16000 mean_first=3000

The events are in benchmarks/simulated_cluster.py. The same command prints the same page.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from benchmarks.service_times import Times
from benchmarks.simulated_cluster import Found, simulate
from benchmarks.simulated_engine import Plan

ENGINES = (1, 2, 4, 8, 16, 32)
MEASURED = Path(__file__).with_name("service_times.json")
_HEAD = """\
| {what} | turns/s | wait, s: p50 (p95) | first token, s: p50 (p95) | prompt tokens cached | \
failed of asked | moved | most over mean | flips | s a flip: median (longest) | left out |
|---|---|---|---|---|---|---|---|---|---|---|"""
_EXAMPLES = """examples:
  python -m benchmarks.cluster
  python -m benchmarks.cluster --set agents=100 flip_every_s=30 --engines 1 2 3
  python -m benchmarks.cluster --times mine.json --set memory=270000 context=16000"""


def row(what: object, found: Found) -> str:
    """A line of a table."""
    flips = found.flips_s
    cells = [
        f"{what}",
        f"{found.turns_per_s:.0f}",
        f"{found.waited_s(0.5):.2f} ({found.waited_s(0.95):.2f})",
        f"{found.first_s(0.5):.2f} ({found.first_s(0.95):.2f})",
        f"{found.hits:.2f}",
        f"{found.failed} of {len(found.measured)}",
        f"{found.moved}",
        f"{found.spread:.2f}",
        f"{len(flips)}",
        f"{statistics.median(flips):.2f} ({max(flips):.2f})" if flips else "",
        f"{found.left_out}",
    ]
    return f"| {' | '.join(cells)} |"


def variants(plan: Plan) -> list[tuple[str, Plan]]:
    """What happens, and how requests are placed, one after the other."""
    calm = replace(plan, flip_every_s=0.0, mean_life_s=0.0)
    return [
        ("nothing happens", calm),
        ("versions flip", replace(plan, mean_life_s=0.0)),
        ("engines fail", replace(plan, flip_every_s=0.0)),
        ("both", plan),
        ("both, several proxies that agree by hashing", replace(plan, placing="hashed")),
        ("both, always the engine with the fewest requests", replace(plan, placing="anywhere")),
        ("nothing happens, and so placed", replace(calm, placing="anywhere")),
    ]


def page(plan: Plan, times: Times, engines: Sequence[int]) -> str:
    """The page of results."""
    lines = [
        "# Many agents on several engines, simulated\n",
        f"`{' '.join(['python -m benchmarks.cluster', *sys.argv[1:]])}`. Nothing but the "
        f"simulation ran. Service times: {times.about}; the function through them is at most "
        f"{times.worst:.0%} off a measured prompt, and goes on beyond {times.most} replies at once "
        "as it ends.\n",
        f"{plan.agents} agents, {plan.seconds:.0f} s, of which the first {plan.warm_up_s:.0f} are "
        f"not measured; seed {plan.seed}. A conversation has {plan.mean_turns} turns on average, "
        f"begins with {plan.system} tokens that all have and {plan.mean_first} of its own, grows "
        f"by {plan.mean_said} and a reply of {plan.mean_reply} a turn, to at most {plan.context}; "
        f"pauses are {plan.mean_think_s:g} s (means of exponential draws). An engine remembers "
        f"{plan.memory} tokens. A version comes every {plan.flip_every_s:.0f} s; an engine fails "
        f"after {plan.mean_life_s:.0f} s on average and is back {plan.back_s:.0f} s later.\n",
        _HEAD.format(what="engines"),
        *(row(count, simulate(replace(plan, engines=count), times)) for count in engines),
        "",
        f"With {plan.engines} engines:\n",
        _HEAD.format(what="what happens"),
        *(row(what, simulate(one, times)) for what, one in variants(plan)),
    ]
    return "\n".join(lines)


def changed(plan: Plan, given: Sequence[str]) -> Plan:
    """The plan with other values, such as `agents=100`. Raises ValueError."""
    kinds: dict[str, Callable[[str], object]] = {
        field.name: type(getattr(plan, field.name)) for field in fields(plan)
    }
    for word in given:
        name, _, value = word.partition("=")
        if name not in kinds:
            raise ValueError(f"--set {word}: expected NAME=VALUE with one of {', '.join(kinds)}")
        plan = replace(plan, **{name: kinds[name](value)})  # pyright: ignore[reportArgumentType]
    return plan


def main() -> None:
    """Prints the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster",
        description="Simulates agents on several engines.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--times", type=Path, default=MEASURED, help="of benchmarks.service_times")
    parser.add_argument("--engines", type=int, nargs="+", default=ENGINES)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of the plan")
    options = parser.parse_args()
    try:
        plan = changed(Plan(flip_every_s=60.0, mean_life_s=600.0), options.set)
        print(page(plan, Times.read(options.times), options.engines))
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"benchmarks.cluster: {error}")


if __name__ == "__main__":
    main()
