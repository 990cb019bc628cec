"""How far are the learner's log-probs from the engine's, and how far after a mistake?

It reads what an installation has recorded: the turns that version 0, the base model, answered and
that may train. The first table compares their log-probs with the learner's in both precisions. The
second makes mistakes on purpose: the learner has other weights, or reads another prompt, than the
engine had. `python -m benchmarks.beside --keep FOLDER` records such turns.
"""
# pyright: basic

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from learner.config import LearnerConfig
from learner.tensors import micro_batches, place
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.app.settings import Settings
from nextstate.records import BASE_VERSION, Sample
from nextstate.store import Store

_COLUMNS = ("tokens", "mean", "p99", "max", "mean ratio", "ratio outside 0.8 to 1.28")
_LEARNER: dict[str, Any] = {"learning_rate": 1e-3, "epochs": 2, "kl_coef": 0.0, "drift_limit": 99.0}
"""A step so large that `step_kl` shortens it."""
_TEMPERATURE = 0.7
_TAUGHT = 16
"""Turns of the update whose adapter only one of the two has."""


def recorded(settings: Settings, most: int) -> list[Sample]:
    """The first `most` trainable turns of the base model, every second one with a bad score."""
    store = Store(settings.store)
    found: list[Sample] = []
    for turn_id in store.turns.ids():
        turn = store.turns.get(turn_id)
        if turn is None or not turn.trainable or turn.policy_version != BASE_VERSION:
            continue
        ids = turn.prompt_ids or (), turn.completion_ids or (), turn.behaviour_logprobs or ()
        score = -1 if len(found) % 2 else 1
        found.append(Sample(turn.id, turn.session, BASE_VERSION, *ids, score, None))
        if len(found) == most:
            break
    store.close()
    if not found:
        raise SystemExit(f"{settings.file}: version {BASE_VERSION} has no turn that may train")
    return found


@torch.no_grad()
def differences(trainer: PolicyTrainer, samples: Sequence[Sample]) -> Tensor:
    """(N,) policy - behaviour log-prob of every completion token, in nats."""
    found = []
    for group in micro_batches(samples, trainer.config.micro_batch_tokens):
        sequences = place(group)
        mask = sequences.completion_mask.bool()
        behaviour = [p for turns in group for turn in turns for p in turn.behaviour_logprobs]
        policy = trainer.completion_logprobs(sequences.to(trainer.args.device)).cpu()[mask]
        found.append(policy.float() - torch.tensor(behaviour))
    return torch.cat(found)


def figures(differ: Tensor) -> list[str]:
    """One row of a table: |policy - behaviour| in nats and exp(policy - behaviour)."""
    size, ratio = differ.abs(), differ.exp()
    outside = ((ratio < 0.8) | (ratio > 1.28)).float().mean()
    shown = [size.mean(), size.quantile(0.99), size.max(), ratio.mean()]
    return [str(len(differ)), *(f"{float(value):.4f}" for value in shown), f"{outside:.1%}"]


@contextmanager
def coarser(trainer: PolicyTrainer, bits: int) -> Iterator[None]:
    """Inside the block the base's linear layers are rounded to `bits` bits, row by row."""
    every = trainer.policy.named_modules()
    layers = [m for name, m in every if type(m) is nn.Linear and "lora_" not in name]
    kept = [layer.weight.data for layer in layers]
    for layer in layers:
        step = layer.weight.data.abs().amax(1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 1)
        layer.weight.data = (layer.weight.data / step).round() * step
    try:
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data = weight


def mistakes(trainer: PolicyTrainer, samples: Sequence[Sample]) -> Iterator[tuple[str, Tensor]]:
    """What each mistake does to the differences."""

    def measured() -> Tensor:
        return differences(trainer, samples)

    for bits in (8, 4):
        with coarser(trainer, bits):
            yield f"base rounded to {bits} bits on one side", measured()
    other = [replace(s, sampling=replace(s.sampling, temperature=_TEMPERATURE)) for s in samples]
    yield f"temperature {_TEMPERATURE} on one side only", differences(trainer, other)
    half = [replace(s, prompt_ids=s.prompt_ids[len(s.prompt_ids) // 2 :]) for s in samples]
    yield "the prompt's first half (system message) missing", differences(trainer, half)
    others = [s.prompt_ids for s in (*samples[1:], samples[0])]
    swapped = [replace(s, prompt_ids=ids) for s, ids in zip(samples, others, strict=True)]
    yield "another turn's prompt", differences(trainer, swapped)
    trainer.update(samples[:_TAUGHT], {BASE_VERSION: 0})
    adapter = trainer.weights.copy()
    yield "one update's adapter on one side", measured()
    for times in (2, 4, 8):
        _scale(trainer, adapter, times)
        yield f"that adapter {times} times as strong", measured()
    trainer.weights.reset()


def _scale(trainer: PolicyTrainer, adapter: dict[str, Tensor], times: float) -> None:
    trainer.weights.put({n: v * times if "lora_B" in n else v for n, v in adapter.items()})


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift",
        description=__doc__,
        epilog="example: python -m benchmarks.drift /tmp/bf16/nextstate.toml",
    )
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument("--turns", type=int, default=64, help="the most turns of each")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="the learner's"
    )
    parser.add_argument("--no-mistakes", action="store_true", help="only the first table")
    given = parser.parse_args()
    tables = [_table("engine", "learner"), _table("engine", "learner", "mistake")]
    for file in given.configs:
        settings = Settings.read(file)
        samples = recorded(settings, given.turns)
        for dtype in given.dtypes:
            config = LearnerConfig(**_LEARNER, dtype=dtype)
            with tempfile.TemporaryDirectory() as folder:
                trainer = build_trainer(config, settings.engine.model_path, Path(folder))
                row = [settings.engine.dtype, dtype]
                tables[0].add_row(*row, *figures(differences(trainer, samples)))
                if dtype == "float32" and not given.no_mistakes:
                    for name, differ in mistakes(trainer, samples):
                        tables[1].add_row(*row, name, *figures(differ))
    for table in tables:
        Console(width=160).print(table)


def _table(*names: str) -> Table:
    made = Table(box=box.MARKDOWN)
    for name in (*names, *_COLUMNS):
        made.add_column(name)
    return made


if __name__ == "__main__":
    main()
