"""Does a small policy learn an environment in the real loop?

    python -m benchmarks.families terminal --seed 1
    python -m benchmarks.families terminal --judge 0.75 --credit step_sum --updates 8

Proxy, vLLM, judge, learner and the runner of `nextstate rollout` are the real ones. The policy is
made once (`benchmarks/families/policies.py`). Held-out tasks have words and sizes that no task has
from which the loop learns; its pre-training saw those words, with the same bad habits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from benchmarks.families import opinions
from benchmarks.families.opinions import Opinions
from benchmarks.families.policies import SEEDS, policy_of
from demo.lesson import LEARNER, Kind, Lesson, learn
from judge.advantages import CreditMethod
from nextstate.hooks import load_plugin

GOALS = {"terminal": 0.85, "gui": 0.8}
UPDATES = 24


def lesson(
    environment: str,
    most_s: float,
    credit: CreditMethod = "combined",
    judge: str | None = None,
    seed: int = 0,
) -> Lesson:
    """What `demo.lesson.learn` runs for an environment; `judge` is one of `opinions.judge`."""
    kind: Kind = load_plugin("environments", environment, None)
    if judge is not None:
        kind = Opinions(kind, judge, seed)
    most_calls, policy = SEEDS[environment].most_calls, policy_of(environment)
    learner = {**LEARNER, "step_kl": 0.05}
    judges = (sys.executable, "-m", "benchmarks.families.judge_stage", credit)
    return Lesson(
        *(environment, kind, policy, GOALS[environment], UPDATES, most_calls, most_s, learner),
        judge=() if credit == "combined" else judges,
    )


def asked(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("environment", choices=[*GOALS])
    parser.add_argument("--seed", type=int, default=0, help="of the tasks and the adapter")
    parser.add_argument("--updates", type=int, default=0, help="versions to make (0: the default)")
    parser.add_argument(
        "--minutes", type=float, default=23, help="then only the last measurement follows"
    )
    parser.add_argument("--out", type=Path, help="a folder (default: demo-output/ENVIRONMENT-SEED)")
    parser.add_argument(
        "--credit", choices=get_args(CreditMethod), default="combined", help="how steps get credit"
    )
    parser.add_argument(
        "--judge", type=opinions.judge, help="simulated, of terminal: 0.75, likes-wrong"
    )
    given = parser.parse_args(words)
    if given.judge is not None and given.environment != "terminal":
        parser.error(f"--judge {given.judge}: only of terminal; leave it out")
    return given


def main() -> None:
    """Runs a lesson."""
    given = asked()
    out: Path = given.out or Path("demo-output") / f"{given.environment}-{given.seed}"
    most_s = 60 * given.minutes
    made = lesson(given.environment, most_s, given.credit, given.judge, given.seed)
    sys.exit(learn(made, seed=given.seed, updates=given.updates, out=out))


if __name__ == "__main__":
    main()
