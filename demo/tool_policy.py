# pyright: basic
"""The policy that the tool demo begins with: small, pre-trained from nothing on `tool_corpus`.

    python -m demo.tool_policy [--out demo/tool_policy_files]

It calls every tool rightly and copies what it was told, but it has bad habits: it solves about a
quarter of the tasks. The result is a model folder like the seed policy's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from demo.seed_policy import (
    IGNORED,
    Recipe,
    descend,
    encode,
    load,
    new_model,
    number_weights,
    sampler,
    train_tokenizer,
)
from demo.tool_corpus import MOST_CALLS, draw_episode
from plugins.environments.tool_tasks import FAMILIES, SCALES, task
from plugins.environments.tools import Tools

FOLDER = Path(__file__).parent / "tool_policy_files"
CYCLES = (280, 1.0, 1 / 3), (280, 0.8, 1 / 3), (160, 0.6, 0.6), (220, 0.7, 0.6)
"""Of each cycle: steps, its share of the peak learning rates, the share of chains of sums."""
RECIPE = Recipe(
    cycles=(), batch=24, sharpen=1.0, number_weight=3.0, vocabulary=640, layers=3, hidden=128
)
_READ = 3000
MEASURED = 60
"""Tasks of each family and split."""


def batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, cycle: int, chains: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels) of shape (B, T), right-padded, of episodes of similar length."""
    rng = Random(f"tools/{recipe.seed}/{cycle}")
    pad = tokenizer.pad_token_id
    while True:
        pool = [encode(draw_episode(rng, chains), tokenizer) for _ in range(recipe.batch * 6)]
        pool.sort(key=lambda pair: len(pair[0]))
        rows = [pool[i : i + recipe.batch] for i in range(0, len(pool), recipe.batch)]
        rng.shuffle(rows)
        for row in rows:
            width = max(len(ids) for ids, _ in row)
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in row]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in row]),
            )


def measure(path: Path, count: int = MEASURED) -> dict[str, float]:
    """The share of tasks that the policy in a folder solves, by family and split."""
    model, tokenizer = load(path)
    torch.manual_seed(0)
    sample = sampler(model, tokenizer)
    kinds = [(family, split) for family in FAMILIES for split in SCALES]
    episodes = [_Episode(f, s, seed) for f, s in kinds for seed in range(count)]
    asyncio.run(_play(sample, episodes))
    solved = [asyncio.run(episode.tools.score()).outcome for episode in episodes]
    shares = [sum(solved[i * count : (i + 1) * count]) / count for i in range(len(kinds))]
    return {f"{f}/{s}": share for (f, s), share in zip(kinds, shares, strict=True)}


class _Episode:
    def __init__(self, family: str, split: str, seed: int) -> None:
        self.fields, _ = task(family, split, f"measured {seed}")
        self.tools = Tools()
        self.chat: list[dict[str, str]] = []
        self.is_over = False


async def _play(sample, episodes: Sequence[_Episode]) -> None:
    for one in episodes:
        one.chat.append({"role": "user", "content": await one.tools.reset(one.fields, 0)})
    for _ in range(MOST_CALLS):
        going = [one for one in episodes if not one.is_over]
        for one, reply in zip(going, sample([one.chat for one in going]), strict=True):
            acted = await one.tools.step(reply)
            one.is_over = acted.done
            one.chat.append({"role": "assistant", "content": reply})
            one.chat.append({"role": "user", "content": acted.observation})


def main() -> None:
    """Trains, saves and measures."""
    parser = argparse.ArgumentParser(description="Pre-train the tool demo's policy.")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, started = RECIPE, time.monotonic()
    rng = Random(f"tokenizer/{recipe.seed}")
    texts = (line.content for _ in range(_READ) for line in draw_episode(rng))
    tokenizer = train_tokenizer(recipe, texts)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, tokenizer)
    weights = number_weights(recipe, tokenizer)
    for cycle, (steps, share, chains) in enumerate(CYCLES):
        data = batches(recipe, tokenizer, cycle, chains)
        descend(model, recipe, steps, share, data, weights, f"cycle {cycle + 1}")
    print(f"trained in {time.monotonic() - started:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    solved = measure(options.out)
    parameters = sum(p.numel() for p in model.parameters())
    card = {"recipe": asdict(recipe), "cycles": CYCLES, "parameters": parameters}
    (options.out / "card.json").write_text(json.dumps({**card, "solved": solved}, indent=2) + "\n")
    print(json.dumps(solved, indent=2))


if __name__ == "__main__":
    main()
