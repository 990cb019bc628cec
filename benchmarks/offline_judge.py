"""How many next states a second the judge `rules` reads on one core.

    python -m benchmarks.offline_judge

One call after another, as the judge makes them, on the labelled cases that it learned from: first
with an empty cache of words, then with a warm one. `--judge outcome` measures another judge.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from judge.evaluation import read_cases
from nextstate.records import Source

CASES = Path(__file__).parents[1] / "judge" / "data" / "next_states.jsonl"
_ROUNDS = 7


def main() -> None:
    """Prints judgements a second of CPU time: the first round, then the best of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", default="rules", help="a module of plugins/judges/")
    judge = importlib.import_module(f"plugins.judges.{parser.parse_args().judge}")
    judge.create(None)
    every = [case.evidence for case in read_cases(CASES, "dev")]
    words = [one for one in every if all(s.source is Source.USER for s in one.next_states)]
    for name, cases in (("user's messages", words), ("all next states", every)):
        rates: list[float] = []
        for _ in range(_ROUNDS):
            started = time.process_time()
            for evidence in cases:
                judge.vote_on(evidence)
            rates.append(len(cases) / (time.process_time() - started))
        print(f"{len(cases):5} {name}: {rates[0]:8.0f}/s first, {max(rates[1:]):8.0f}/s then")


if __name__ == "__main__":
    main()
