"""A simulated judge of `terminal`, which knows the solutions and is wrong as often as asked.

Its opinion of each step is the step's process reward, 1 or -1, in the place of what the exit code
says. So one can compare ways of giving credit on real episodes, with judges of known quality.
"""

from __future__ import annotations

import argparse
from random import Random

from benchmarks.families.terminal_corpus import acts
from demo.lesson import Kind, key_of
from nextstate.hooks import Acted, AgentProgram, Environment, Scored
from nextstate.records import Json
from plugins.environments.terminal import SUBMIT, command_of
from plugins.environments.terminal_tasks import FAMILIES, task

LIKES_WRONG = "likes-wrong"
_RIGHT, _PRAISED = 0.9, 0.9
"""Of the judge that likes a wrong action: how often it is right about others, and praises it."""


def judge(text: str) -> str:
    """A share of right opinions, such as 0.75, or LIKES_WRONG; for argparse."""
    if text == LIKES_WRONG:
        return text
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.5 <= share <= 1.0:
        told = f"{text!r}: expected {LIKES_WRONG}, or the share of right opinions, 0.5 to 1"
        raise argparse.ArgumentTypeError(told)
    return text


class Opinions:
    """An environment `terminal` whose steps are judged."""

    def __init__(self, inner: Kind, judge: str, seed: int) -> None:
        self._inner, self._judge = inner, judge
        self._draw = Random(f"opinions {judge} {seed}")
        self._known: dict[str, tuple[list[str], list[str]]] = {}

    def check_task(self, task: Json) -> None:
        self._inner.check_task(task)

    async def check_machine(self) -> None:
        await self._inner.check_machine()

    def generate(self, split: str, number: int) -> Json:
        """As the environment does; what solves the task is remembered."""
        fields = self._inner.generate(split, number)
        seed, place = divmod(number, len(FAMILIES))
        family = [*FAMILIES][place]
        right, habits = acts(family, *task(family, split, seed))
        asked = {name: value for name, value in fields.items() if name not in ("id", "split")}
        liked = [step[0].command for step in habits]
        self._known[key_of(asked)] = [act.command for act in right], liked
        return fields

    def make(self) -> Environment:
        made = self._inner.make()
        assert not isinstance(made, AgentProgram)
        return _Judged(made, self)

    def of(self, task: Json) -> tuple[list[str], list[str]]:
        """(the commands that solve a task, in order; the wrong ones that may be liked)."""
        return self._known[key_of(task)]

    def opinion(self, right: bool, liked: bool) -> float:
        """What the judge says of a step, 1 or -1."""
        if self._judge != LIKES_WRONG:
            praises = right == (self._draw.random() < float(self._judge))
        elif liked:
            praises = self._draw.random() < _PRAISED
        else:
            praises = right == (self._draw.random() < _RIGHT)
        return 1.0 if praises else -1.0


class _Judged:
    def __init__(self, inner: Environment, opinions: Opinions) -> None:
        self._inner, self._opinions = inner, opinions
        self._left, self._liked = list[str](), list[str]()

    async def reset(self, task: Json, seed: int) -> str:
        right, self._liked = self._opinions.of(task)
        self._left = [*right, SUBMIT]
        return await self._inner.reset(task, seed)

    async def step(self, action: str) -> Acted:
        acted, command = await self._inner.step(action), command_of(action)
        is_right = command is not None and command == next(iter(self._left), None)
        if is_right:
            del self._left[0]
        said = self._opinions.opinion(is_right, command in self._liked)
        return Acted(acted.observation, said, acted.done)

    async def score(self) -> Scored:
        return await self._inner.score()

    async def close(self) -> None:
        await self._inner.close()
