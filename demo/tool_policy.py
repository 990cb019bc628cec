# pyright: basic
"""The policy that the tool demo begins with: small, pre-trained from nothing on `tool_corpus`.

    python -m demo.tool_policy [--out demo/tool_policy_files]

It calls every tool rightly and copies what it was told, but it has bad habits: it solves about a
quarter of the tasks. The result is a model folder like the seed policy's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demo.competence import Sampler
from demo.corpus import Line
from demo.seed_policy import (
    Recipe,
    descend,
    encode,
    load,
    new_model,
    number_weights,
    padded,
    sampler,
    save,
    train_tokenizer,
    write_card,
)
from demo.tool_corpus import MOST_CALLS, draw_episode
from nextstate.hooks import EnvironmentKind, Shared
from nextstate.records import Json
from plugins.environments.tool_tasks import FAMILIES, SCALES, task
from plugins.environments.tools import ToolsKind

FOLDER = Path(__file__).parent / "tool_policy_files"
CYCLES = (280, 1.0, 1 / 3), (280, 0.8, 1 / 3), (160, 0.6, 0.6), (220, 0.7, 0.6)
"""Of each cycle: steps, its share of the peak learning rates, the share of chains of sums."""
RECIPE = Recipe(
    cycles=(), batch=24, sharpen=1.0, number_weight=3.0, vocabulary=640, layers=3, hidden=128
)
Draw = Callable[[Random], list[Line]]
"""Draws one episode of a corpus, as a conversation."""
_READ = 3000
_AT_ONCE = 15
"""Episodes that are measured at once: fewer than there are tabs of browsers."""
MEASURED = 60
"""Tasks of each family and split."""


def batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, name: str, draw: Draw
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels) of shape (B, T), right-padded, of episodes of similar length.

    `name` seeds them.
    """
    rng = Random(name)
    while True:
        pool = [encode(draw(rng), tokenizer) for _ in range(recipe.batch * 6)]
        yield from padded(pool, recipe, tokenizer, rng)


def train(
    recipe: Recipe,
    name: str,
    cycles: Sequence[tuple[int, float, Draw]],
    copied: Collection[str] = (),
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A new model and tokenizer. Of each cycle: steps, share of the peak learning rates, corpus;
    the tokenizer is made from the last one's.

    `copied`: words that have the weight of numbers in the loss.
    """
    rng = Random(f"tokenizer/{recipe.seed}")
    draw = cycles[-1][2]
    tokenizer = train_tokenizer(recipe, (line.content for _ in range(_READ) for line in draw(rng)))
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, tokenizer)
    weights = number_weights(recipe, tokenizer)
    for number in tokenizer.get_vocab().values():
        if str(tokenizer.decode([number])).strip() in copied:
            weights[number] = recipe.number_weight
    for cycle, (steps, share, draw) in enumerate(cycles):
        data = batches(recipe, tokenizer, f"{name}/{recipe.seed}/{cycle}", draw)
        descend(model, recipe, steps, share, data, weights, f"cycle {cycle + 1}")
    return model.eval(), tokenizer


def measure(
    path: Path, kind: EnvironmentKind, tasks: Sequence[Json], most_calls: int
) -> list[float]:
    """What the policy in a folder reaches in each task."""
    model, tokenizer = load(path)
    torch.manual_seed(0)
    return asyncio.run(_measure(sampler(model, tokenizer), kind, tasks, most_calls))


async def _measure(
    sample: Sampler, kind: EnvironmentKind, tasks: Sequence[Json], most_calls: int
) -> list[float]:
    reached: list[float] = []
    try:
        for first in range(0, len(tasks), _AT_ONCE):
            some = tasks[first : first + _AT_ONCE]
            reached += await _play(sample, kind.make, some, most_calls)
    finally:
        if isinstance(kind, Shared):
            await kind.release()
    return reached


async def _play(sample: Sampler, make, tasks: Sequence[Json], most_calls: int) -> list[float]:
    worlds = [make() for _ in tasks]
    chats = [
        [{"role": "user", "content": await world.reset(fields, 0)}]
        for world, fields in zip(worlds, tasks, strict=True)
    ]
    going = [*range(len(tasks))]
    for _ in range(most_calls):
        replies = sample([chats[i] for i in going])
        over: set[int] = set()
        for i, reply in zip(going, replies, strict=True):
            acted = await worlds[i].step(reply)
            chats[i].append({"role": "assistant", "content": reply})
            chats[i].append({"role": "user", "content": acted.observation})
            over |= {i} if acted.done else set()
        going = [i for i in going if i not in over]
    reached = [(await world.score()).outcome for world in worlds]
    for world in worlds:
        await world.close()
    return reached


def main() -> None:
    """Trains, saves and measures."""
    parser = argparse.ArgumentParser(description="Pre-train the tool demo's policy.")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    cycles = [(n, share, partial(draw_episode, chains=chains)) for n, share, chains in CYCLES]
    model, tokenizer = train(RECIPE, "tools", cycles)
    print(f"trained in {time.monotonic() - started:.0f} s")
    card = save(options.out, model, tokenizer, RECIPE)
    solved: dict[str, float] = {}
    for family, split in itertools.product(FAMILIES, SCALES):
        tasks = [task(family, split, f"measured {n}")[0] for n in range(MEASURED)]
        reached = measure(options.out, ToolsKind(), tasks, MOST_CALLS)
        solved[f"{family}/{split}"] = sum(reached) / MEASURED
    write_card(options.out, {**card, "cycles": CYCLES, "solved": solved})
    print(json.dumps(solved, indent=2))


if __name__ == "__main__":
    main()
