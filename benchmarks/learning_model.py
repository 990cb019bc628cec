"""Does a real model learn from one person's wish, and what does it forget?

`python -m benchmarks.learning --model smollm2` runs the loop of `benchmarks/learning_loop.py` with
the person of `demo/person.py` and the defaults of `[learner]` (except `_FASTER`, which changes the
speed alone). A reply counts if it is as wished and right. Replies are measured at the sampling that
serves; retention (unrelated questions) without sampling.
"""
# pyright: basic

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.learning_loop import Engine, Loop, Persona, Plan, Sampling
from demo.competence import user_message
from demo.person import Conversation
from demo.questions import FOLDER, Question, asked, questions
from demo.smollm2 import model_folder
from demo.wishes import WISHES, Wish
from learner.config import LearnerConfig

PEOPLE = 16
"""Conversations that get a reply at the same time."""
MAX_TOKENS = 64
_RETENTION_TOKENS = 32
_ASKED_AT_ONCE = 64
_VARIED, _TIMES = 6, 4
"""Variety: this many questions are asked this many times."""
_FASTER = {
    "max_tokens": 1024,  # no turn is longer, and so no trial pass
    "gradient_checkpointing": False,
    "micro_batch_tokens": 2048,
    "poll_s": 0.01,
    "tensorboard": False,
}


@dataclass(frozen=True, slots=True)
class ModelPoint:
    """What the serving version is worth after some updates; shares of replies."""

    update: int
    score: float
    """As wished and right."""
    satisfied: float
    right: float
    variety: float
    """Distinct replies of `_TIMES` to one question, as a share."""
    words: float
    """Mean length of a reply."""
    retention: float | None = None
    perplexity: float | None = None
    seconds: float = 0.0
    """Since the run began, measuring included."""


class Person(Persona):
    """One conversation after another with the same wish."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._rng = Random(f"person/{world.seed}/{number}")
        self._asked = asked(f"{world.seed}/{number}")
        self._start(number, world.exchanges)

    def _new(self, exchanges: int) -> Conversation:
        return Conversation(self._world.wish, self._asked, self._rng, exchanges)


class World:
    """One person's wish, and how versions are measured."""

    def __init__(self, given: argparse.Namespace, engine: Engine, wish: Wish, seed: int) -> None:
        self.wish = wish
        self.seed = seed
        self.exchanges = given.exchanges
        self._given = given
        self._engine = engine
        self._held_out = questions("held_out")[: given.questions or 48]
        self._began = time.monotonic()

    def measure(self, update: int) -> ModelPoint:
        """Asks the version that serves."""
        given = self._given
        if given.then and update == given.updates // 2:
            self.wish = WISHES[given.then]
        varied = [question for question in self._held_out[:_VARIED] for _ in range(_TIMES)]
        replies = self._ask([*self._held_out, *varied])
        count = len(self._held_out)
        several = replies[count:]
        groups = [several[i : i + _TIMES] for i in range(0, len(several), _TIMES)]
        point = ModelPoint(
            update,
            *self.shares(self._held_out, replies[:count]),
            variety=sum(len(set(group)) for group in groups) / max(1, len(several)),
            words=sum(len(reply.split()) for reply in replies) / len(replies),
        )
        if update in (0, given.updates) or update in given.full:
            point = replace(
                point,
                retention=self.retention() if given.retention else None,
                perplexity=self._engine.perplexity((FOLDER / "text.txt").read_text("utf-8")),
            )
        if given.samples:
            for question, reply in list(zip(self._held_out, replies, strict=False))[
                : given.samples
            ]:
                print(f"    {question.question} {reply!r}")
        return replace(point, seconds=time.monotonic() - self._began)

    def shares(
        self, asked_: Sequence[Question], replies: Sequence[str]
    ) -> tuple[float, float, float]:
        """(as wished and right, as wished, right)."""
        satisfied = [self.wish.satisfied(reply) for reply in replies]
        right = [q.is_right(reply) for q, reply in zip(asked_, replies, strict=True)]
        both = [s and r for s, r in zip(satisfied, right, strict=True)]
        return tuple(sum(found) / len(replies) for found in (both, satisfied, right))

    def reference(self, sampling: Sampling) -> tuple[float, float, float]:
        """The shares of the base model with the wish written into each question."""
        told = [
            replace(question, question=f"{question.question} {self.wish.instruction}")
            for question in self._held_out
        ]
        return self.shares(told, self._ask(told, sampling))

    def retention(self) -> float:
        """The share of unrelated questions with a right likeliest reply."""
        unrelated = questions("retention")[: self._given.retention]
        replies = self._ask(unrelated, Sampling(0.0, 1.0, _RETENTION_TOKENS))
        found = [q.is_right(reply) for q, reply in zip(unrelated, replies, strict=True)]
        return sum(found) / len(found)

    def _ask(self, asked_: Sequence[Question], sampling: Sampling | None = None) -> list[str]:
        found: list[str] = []
        for start in range(0, len(asked_), _ASKED_AT_ONCE):
            part = asked_[start : start + _ASKED_AT_ONCE]
            prompts = [self._engine.render([user_message(q.question)]) for q in part]
            replies = self._engine.replies(prompts, sampling, logprobs=False)
            found += [self._engine.text(ids) for ids, _ in replies]
        return found


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmarks.learning` that belong to a real model."""
    group = parser.add_argument_group("a real model")
    group.add_argument("--model", help="smollm2 (downloaded once), or the folder of a model")
    group.add_argument("--wish", nargs="+", choices=WISHES, default=["short"], help="one run each")
    group.add_argument("--then", choices=WISHES, help="the wish from half of the updates on")
    group.add_argument("--first-seed", type=int, default=0)
    group.add_argument("--exchanges", type=int, default=1, help="questions of a conversation")
    group.add_argument("--temperature", type=float, default=1.0, help="of what serves")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--retention", type=int, default=200, help="unrelated questions (0: none)")
    group.add_argument(
        "--full", type=int, nargs="*", default=[], metavar="UPDATE",
        help="measure retention and perplexity here too; always at the start and at the end",
    )  # fmt: skip
    group.add_argument("--samples", type=int, default=0, help="replies to print at each update")
    group.add_argument(
        "--reference", action="store_true",
        help="only measure the wish written into the prompt, at the sampling that serves, at the "
        "model's own and at 0.7 / 0.9; nothing learns",
    )  # fmt: skip


def best_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it itself: elsewhere it is five times slower."""
    known = torch.cpu.get_capabilities()
    fast = known.get("amx_bf16") or known.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def learn_with_model(given: argparse.Namespace, settings: dict[str, Any]) -> None:
    """All runs that the options name; prints a line for each measured update."""
    model = model_folder(given.model)
    dtype = best_dtype()
    sampling = Sampling(given.temperature, given.top_p, MAX_TOKENS)
    if given.reference:
        return _print_references(given, Engine(0, model, dtype, sampling))
    settings = {**_FASTER, "dtype": str(dtype).removeprefix("torch."), **settings}
    for wish in given.wish:
        for method in given.methods:
            for seed in range(given.first_seed, given.first_seed + given.seeds):
                config = LearnerConfig(**{**settings, "method": method, "seed": seed})
                _learn(given, Engine(seed, model, dtype, sampling), WISHES[wish], config)


def _learn(given: argparse.Namespace, engine: Engine, wish: Wish, config: LearnerConfig) -> None:
    world = World(given, engine, wish, config.seed)
    named = {"wish": wish.name, "then": given.then, "method": config.method, "seed": config.seed}
    print(", ".join(str(value) for value in named.values() if value is not None), *given.set)

    def measure(update: int) -> ModelPoint:
        point = world.measure(update)
        print(_line(point), flush=True)
        if given.out:
            record = {**named, "set": given.set, "model": given.model, **asdict(point)}
            with given.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return point

    plan = Plan(config, updates=given.updates, seed=config.seed, flipped=given.flipped)
    people = [Person(world, number) for number in range(PEOPLE)]
    with tempfile.TemporaryDirectory() as folder:
        run = Loop(plan, Path(folder), engine, people, measure).learn()
    print(f"{run.turns} turns, {run.made} versions, rejected: {run.rejected or 'none'}")


def _line(point: ModelPoint) -> str:
    text = (
        f"after {point.update:3d}  score {point.score:.2f}  satisfied {point.satisfied:.2f}  "
        f"right {point.right:.2f}  variety {point.variety:.2f}  words {point.words:5.1f}"
    )
    if point.retention is not None:
        text += f"  retention {point.retention:.3f}"
    if point.perplexity is not None:
        text += f"  perplexity {point.perplexity:.2f}"
    return f"{text}  {point.seconds:.0f} s"


def _print_references(given: argparse.Namespace, engine: Engine) -> None:
    own = GenerationConfig.from_pretrained(engine.model_path)
    own_sampling = Sampling(own.temperature or 1.0, own.top_p or 1.0, MAX_TOKENS)
    for name in given.wish:
        world = World(given, engine, WISHES[name], 0)
        for sampling in dict.fromkeys(
            (engine.sampling, own_sampling, Sampling(0.7, 0.9, MAX_TOKENS))
        ):
            score, satisfied, right = world.reference(sampling)
            print(
                f"{name}: in the prompt at temperature {sampling.temperature}, top-p "
                f"{sampling.top_p}: score {score:.2f}  satisfied {satisfied:.2f}  "
                f"right {right:.2f}",
                flush=True,
            )
