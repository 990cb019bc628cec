"""What do two ranks of the learner save, and what do they cost?

The same updates are taken by one process and by two ranks, in turn, with made-up turns of unequal
length and the demo's policy. One process has one thread or two, each rank has one. The samples of
an update divided by its wall-clock time are samples a second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import quantiles

import torch
from rich.console import Console

from benchmarks.sequences import session
from learner.config import LearnerConfig
from learner.rank_processes import started
from learner.stage import follow
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.records import Sample

_POLICY = Path(__file__).parent.parent / "demo" / "policy"


def turns(count: int, tokens: int) -> list[Sample]:
    """Turns that stand alone, of half to all of `tokens` tokens, a quarter of each the reply's."""
    draw, found = Random(0), list[Sample]()
    for number in range(count):
        length = draw.randint(tokens // 2, tokens)
        (one,) = session(1, length - length // 4, length // 4, 0, seed=number)
        found.append(replace(one, turn=str(number), session=str(number)))
    return found


def seconds(trainer: PolicyTrainer, samples: Sequence[Sample], threads: int) -> float:
    """One update, which is undone."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    result = trainer.update(samples, {0: 0})
    taken = time.perf_counter() - begun
    trainer.restore(result.before)
    return taken


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="of the longest turn")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    config = LearnerConfig(
        micro_batch_tokens=2048, max_tokens=512, device="cpu", threads=1, drift_limit=100, ranks=2
    )
    samples = turns(given.samples, given.tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        others = partial(follow, config, str(_POLICY), folder, "float32", None)
        with started(2, others, lambda: None, folder / "ranks") as ranks:
            two = ranks.together(lambda: build_trainer(config, str(_POLICY), folder, ranks))
            one = build_trainer(config, str(_POLICY), folder)
            cases = {"1 process, 1 thread": (one, 1), "1 process, 2 threads": (one, 2)}
            cases["2 ranks, 1 thread each"] = (two, 1)
            rounds = [
                {name: seconds(trainer, samples, n) for name, (trainer, n) in cases.items()}
                for _ in range(given.rounds + 1)
            ][1:]
    console = Console(width=100)
    for name in cases:
        low, middle, high = quantiles((given.samples / r[name] for r in rounds), n=4)
        console.print(f"{name}: {middle:.2f} samples/s ({low:.2f} … {high:.2f})")
    low, middle, high = quantiles(
        (r["1 process, 2 threads"] / r["2 ranks, 1 thread each"] for r in rounds), n=4
    )
    console.print(
        f"2 ranks / 1 process with as many threads: {middle:.2f} ({low:.2f} … {high:.2f})"
    )


if __name__ == "__main__":
    main()
