"""Does the gate see broken versions, and does it let good ones pass?

Broken versions: noise on the adapter, and updates with ten times the learning rate and no bound on
a step. Good ones: a little noise, and ordinary updates from a user's wish. Each is measured like a
candidate of the learner, and the gate's other bounds are lifted, so that only the version's own
replies decide.
"""
# pyright: basic

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from judge.hinting import hinted_messages
from learner.config import LearnerConfig
from learner.evaluator import Evaluator, end_ids
from learner.gate import objection
from learner.replies import decode
from learner.trainer import UpdateResult, build_trainer
from nextstate.records import Sample

TOPICS = (
    "gravity", "rain", "photosynthesis", "democracy", "inflation", "bread", "volcanoes", "whales",
    "chess", "jazz", "bees", "glaciers", "magnets", "vaccines", "coffee", "rainbows", "trees",
)  # fmt: skip
FORMS = ("What is {}?", "Why does {} matter?", "Tell me about {}.", "Explain {} to a child.")
BATCH, MOST_TOKENS = 16, 48
EVERYTHING = 1e9


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user wants of every reply."""

    hint: str
    is_met: Callable[[str], bool]


WISHES = {
    "short": Wish(
        "Answer in one short sentence.",
        lambda reply: (
            len(reply.split()) <= 18
            and len(re.findall(r"[.!?](\s|$)", reply)) <= 1
            and "\n" not in reply
        ),
    ),
    "question": Wish("End with a question to me.", lambda reply: reply.rstrip().endswith("?")),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What the gate said of one version."""

    version: str
    is_good: bool
    seconds: float
    metrics: dict[str, float]
    objection: str | None


class Bench:
    """One trainer, whose weights become one version after another."""

    def __init__(self, config: LearnerConfig, model: str, folder: Path) -> None:
        self._config = config
        self._trainer = build_trainer(config, model, folder)
        self._evaluator = Evaluator(config, self._trainer)
        self._base = self._trainer.snapshot()

    def noisy(self, scale: float, seed: int, *, is_good: bool) -> Row:
        """A version whose adapter is noise; `scale` is the deviation of B, where A's is 0.02."""
        draw = torch.Generator().manual_seed(seed)
        self._trainer.weights.put(
            {
                name: value + scale * torch.randn(value.shape, generator=draw)
                if "lora_B" in name
                else value
                for name, value in self._base.weights.items()
            }
        )
        return self._gate(f"noise {scale:g}, seed {seed}", is_good)

    def trained(
        self, name: str, updates: int, every: int, seed: int, *, is_good: bool, **changes: float
    ) -> Iterator[Row]:
        """Versions that a wish has made, one row after every few updates."""
        trainer, rng = self._trainer, Random(seed)
        trainer.restore(self._base)
        trainer.config = replace(self._config, **changes)
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.config.learning_rate
        for update in range(1, updates + 1):
            samples = self._talk(WISHES[name], rng, update)
            found = trainer.update(samples, {update - 1: 0}).metrics
            satisfied = sum(sample.score > 0 for sample in samples)
            note = f"{satisfied} of {BATCH} satisfied before it, step KL {found['step/kl']:.3f}"
            if update % every == 0:
                yield self._gate(f"{name}, update {update}: {note}", is_good)

    def _talk(self, wish: Wish, rng: Random, update: int) -> list[Sample]:
        asked = rng.sample([form.format(topic) for topic in TOPICS for form in FORMS], BATCH)
        messages = [[{"role": "user", "content": text}] for text in asked]
        prompts = [self._render(said) for said in messages]
        model, end = self._trainer.policy, self._trainer.processing_class.eos_token_id
        model.eval()
        with self._trainer.accelerator.autocast():
            replies = decode(
                model,
                prompts,
                end_ids(self._trainer),
                most_tokens=MOST_TOKENS,
                draws=1,
                temperature=1.0,
                seed=update,
            )
        assert replies is not None
        samples = []
        for at, reply in enumerate(replies[BATCH:]):
            text = self._trainer.processing_class.decode(reply, skip_special_tokens=True)
            ids = (*reply, *([end] if len(reply) < MOST_TOKENS else []))
            is_met = wish.is_met(text)
            hinted = None if is_met else self._render(hinted_messages(messages[at], wish.hint))
            name = f"{update}.{at}"
            score = 1 if is_met else -1
            zeros = (0.0,) * len(ids)
            samples.append(Sample(name, name, update - 1, prompts[at], ids, zeros, score, hinted))
        found = self._evaluator._logprobs(samples)
        return [
            replace(s, behaviour_logprobs=tuple(found[s.turn].clamp(max=0.0).tolist()))
            for s in samples
        ]

    def _render(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return tuple(
            self._trainer.processing_class.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=False
            )
        )

    def _gate(self, version: str, is_good: bool) -> Row:
        started = time.perf_counter()
        prompt = self._render([{"role": "user", "content": "Tell me about rain."}])
        one = Sample("", "", 0, prompt, prompt, (0.0,) * len(prompt), 1, None)
        self._evaluator.prepare([], [one], 0)
        found = self._evaluator.measure(UpdateResult(self._base, {}))
        said = objection(found, self._config)
        return Row(version, is_good, time.perf_counter() - started, found.metrics(), said)


def rows(bench: Bench, *, trained: bool) -> Iterator[Row]:
    """Every version, broken and good ones by turns."""
    yield bench.noisy(0.01, 1, is_good=True)
    for scale in (0.1, 0.14, 0.2):
        yield bench.noisy(scale, 1, is_good=False)
    if trained:
        yield from bench.trained(
            "short", 2, 1, 1, is_good=False, learning_rate=5e-3, step_kl=EVERYTHING
        )
        yield from bench.trained("short", 6, 2, 2, is_good=True)
        yield from bench.trained("question", 4, 2, 3, is_good=True)
    for seed in (2, 3, 4):
        yield bench.noisy(0.01, seed, is_good=True)
        yield bench.noisy(0.14, seed, is_good=False)


def table(found: list[Row]) -> Table:
    """One row for each version."""
    made = Table(box=box.MARKDOWN)
    for heading in ("version", "is", "gate", "right", "surprise", "broken", "seconds", "why"):
        made.add_column(heading)
    for row in found:
        told = row.metrics
        made.add_row(
            row.version,
            "good" if row.is_good else "broken",
            "passes" if row.objection is None else "rejected",
            f"{told.get('gate/right_change', 0):+.2f}",
            f"{told.get('gate/surprise_change', 0):+.2f}",
            f"{told.get('gate/replies_broken', 0):.0f} of {told.get('gate/replies', 0):.0f}",
            f"{row.seconds:.0f}",
            (row.objection or "").split(":")[0],
        )
    return made


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate",
        description=__doc__,
        epilog="example: python -m benchmarks.gate path/of/a/model --dtype bfloat16",
    )
    parser.add_argument("model", help="a folder with an instruct model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the good versions")
    parser.add_argument("--noise-only", action="store_true", help="without the trained versions")
    parser.add_argument("--out", type=Path, help="a file to which each row is added, as JSON")
    given = parser.parse_args()
    config = LearnerConfig(
        dtype=given.dtype,
        learning_rate=given.learning_rate,
        epochs=2,
        gradient_checkpointing=False,
        gate_weight_change=EVERYTHING,
        gate_kl_parent=EVERYTHING,
        gate_kl_base=EVERYTHING,
    )
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, given.model, Path(folder))
        for row in rows(bench, trained=not given.noise_only):
            found.append(row)
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    Console(width=250).print(table(found))


if __name__ == "__main__":
    main()
