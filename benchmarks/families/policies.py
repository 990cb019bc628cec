# pyright: basic
"""The small policies that `python -m benchmarks.families` begins with, made from nothing.

    python -m benchmarks.families.policies terminal

They are made like the tool demo's: pre-trained on scripted episodes with bad habits. They are not
in the repository; they lie in `.policies/`, and are made anew if recipe or corpus is another.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch

from benchmarks.families import gui_corpus, terminal_corpus
from demo.seed_policy import Recipe
from demo.tool_policy import Draw, measure, save, train, write_card
from nextstate.hooks import load_plugin
from rollout.tasks import family_of

ROOT = Path(__file__).parents[2] / ".policies"
MEASURED = 60
"""Held-out tasks that a new policy plays."""


@dataclass(frozen=True, slots=True)
class Seed:
    """How a policy is made."""

    draw: Draw
    most_calls: int
    cycles: tuple[tuple[int, float], ...]
    """Of each: steps, and the share of the peak learning rates."""
    recipe: Recipe


_RECIPE = Recipe(
    cycles=(), batch=24, sharpen=1.0, number_weight=3.0, vocabulary=640, layers=3, hidden=128
)
SEEDS = {
    "terminal": Seed(
        terminal_corpus.draw_episode,
        terminal_corpus.MOST_CALLS,
        ((170, 1.0), (80, 0.6)),
        replace(_RECIPE, batch=12, hidden=96),
    ),
    "gui": Seed(gui_corpus.draw_episode, gui_corpus.MOST_CALLS, ((700, 1.0), (400, 0.6)), _RECIPE),
}


def policy_of(environment: str) -> Path:
    """The folder of a policy, which is made if it is not there or was made otherwise."""
    seed, folder = SEEDS[environment], ROOT / environment
    card = folder / "card.json"
    if not card.is_file() or json.loads(card.read_text())["made"] != _made(seed):
        build(environment)
    return folder


def build(environment: str) -> None:
    """Trains, saves and measures."""
    seed, folder, started = SEEDS[environment], ROOT / environment, time.monotonic()
    cycles = [(steps, share, seed.draw) for steps, share in seed.cycles]
    model, tokenizer = train(seed.recipe, environment, cycles)
    seconds = time.monotonic() - started
    card = save(folder, model, tokenizer, seed.recipe)
    kind = load_plugin("environments", environment, None)
    found: defaultdict[str, list[float]] = defaultdict(list)
    tasks = [kind.generate("eval", number) for number in range(MEASURED)]
    for one in tasks:
        del one["split"]
    names = [one.pop("id") for one in tasks]
    for name, reached in zip(names, measure(folder, kind, tasks, seed.most_calls), strict=True):
        found[family_of(name)].append(reached)
    solved = {name: sum(reached) / len(reached) for name, reached in found.items()}
    print(json.dumps(solved, indent=2))
    write_card(folder, {"made": _made(seed), **card, "seconds": seconds, "solved_held_out": solved})


def _made(seed: Seed) -> str:
    """Tells recipes and corpora apart."""
    corpus = Path(inspect.getfile(seed.draw)).read_bytes()
    recipe = json.dumps([asdict(seed.recipe), seed.cycles], sort_keys=True).encode()
    return blake2b(corpus + recipe, digest_size=8).hexdigest()


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families.policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("environments", nargs="*", default=[*SEEDS], choices=[*SEEDS])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for environment in given.environments:
        build(environment)


if __name__ == "__main__":
    main()
