# pyright: basic
"""What a policy of the tool demo can do at each step, if those before were right.

    python -m demo.tool_competence demo/tool_policy_files

A reply is right, a habit or neither. Learning by outcomes takes habits away; what is neither, the
policy cannot do. So the shares right / (right + neither), multiplied over the steps, tell about how
much of a family it will solve without its habits.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from demo.competence import Chat, Sampler
from demo.seed_policy import load, sampler
from demo.tool_corpus import habit
from plugins.environments.tool_tasks import FAMILIES, SCALES, task
from plugins.environments.tools import Tools

MEASURED = 80
"""Replies for each step."""
_HABITS = 40
"""Draws of the habits of a step, which are a few."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the replies at one step."""

    right: float
    habit: float

    @property
    def competence(self) -> float:
        """Right ones among those that are no habit."""
        return self.right / (1 - self.habit) if self.habit < 1 else math.nan


def shares(sample: Sampler, family: str, split: str, step: int) -> Shares | None:
    """At a step from 0; None if no task has so many."""
    return asyncio.run(_shares(sample, family, split, step))


async def _shares(sample: Sampler, family: str, split: str, step: int) -> Shares | None:
    chats: list[Chat] = []
    known: list[tuple[str, set[str]]] = []
    for number in range(MEASURED):
        fields, solution = task(family, split, f"measured {number}")
        if step >= len(solution):
            continue
        tools, shown = Tools(), ""
        chat = [{"role": "user", "content": await tools.reset(fields, 0)}]
        for call in solution[:step]:
            shown = (await tools.step(call)).observation
            chat += [{"role": "assistant", "content": call}, {"role": "user", "content": shown}]
        chats.append(chat)
        habits = {habit(Random(n), family, solution, step, shown) for n in range(_HABITS)}
        known.append((solution[step], habits - {solution[step]}))
    if not chats:
        return None
    replies = [*zip(sample(chats), known, strict=True)]
    right = sum(reply == wanted for reply, (wanted, _) in replies)
    slips = sum(reply in habits for reply, (_, habits) in replies)
    return Shares(right / len(chats), slips / len(chats))


def main() -> None:
    """Prints a line for each family and split."""
    parser = argparse.ArgumentParser(prog="python -m demo.tool_competence")
    parser.add_argument("policy", type=Path)
    torch.manual_seed(0)
    sample = sampler(*load(parser.parse_args().policy))
    for family in FAMILIES:
        for split in SCALES:
            found = [shares(sample, family, split, step) for step in range(3)]
            told = [f"{one.right:.2f} right, {one.habit:.2f} habit" for one in found if one]
            reached = math.prod(one.competence for one in found if one)
            print(f"{family:8} {split:6} {reached:.2f}:  {';  '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
