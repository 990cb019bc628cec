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
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch

from benchmarks.families import gui_corpus, terminal_corpus
from demo.seed_policy import Recipe, save, write_card
from demo.tool_policy import Draw, measure, train
from nextstate.episodes import family_of
from nextstate.hooks import load_plugin

ROOT = Path(__file__).parents[2] / ".policies"
MEASURED = 60
"""Held-out tasks that a new policy plays."""


@dataclass(frozen=True, slots=True)
class Seed:
    """How a policy is made."""

    most_calls: int
    cycles: tuple[tuple[int, float, Draw], ...]
    """Of each: steps, the share of the peak learning rates, and the corpus."""
    recipe: Recipe

    copied: Collection[str] = ()
    """Words that count more in the loss."""


_RECIPE = Recipe(
    cycles=(), batch=12, sharpen=1.0, number_weight=5.0, vocabulary=640, layers=3, hidden=96
)
SEEDS = {
    "terminal": Seed(
        terminal_corpus.MOST_CALLS,
        (
            (200, 1.0, terminal_corpus.draw_drill),
            (350, 0.8, terminal_corpus.draw_episode),
            (250, 0.5, terminal_corpus.draw_episode),
        ),
        _RECIPE,
        terminal_corpus.WORDS,
    ),
    "gui": Seed(
        gui_corpus.MOST_CALLS,
        ((700, 1.0, gui_corpus.draw_episode), (400, 0.6, gui_corpus.draw_episode)),
        replace(_RECIPE, batch=24, hidden=128),
    ),
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
    model, tokenizer = train(seed.recipe, environment, seed.cycles, seed.copied)
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
    corpus = Path(inspect.getfile(seed.cycles[-1][2])).read_bytes()
    cycles = [cycle[:2] for cycle in seed.cycles]
    recipe = json.dumps([asdict(seed.recipe), cycles], sort_keys=True).encode()
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
