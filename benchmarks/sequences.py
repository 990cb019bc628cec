"""What does it save to train a session's turns as one sequence, and what does a step cost at all?

One long session of made-up tokens is trained on the demo's policy, once with its turns in one
sequence and once with each alone; then its tokens take a plain forward and backward pass of the
same model. Times are the process's CPU time on one thread, so that what else the machine does
counts little. They leave out the optimizer and the check of the step's size, and count no teacher
and no KL term: each of these is a forward pass of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import quantiles

from rich.console import Console

from learner.config import LearnerConfig
from learner.tensors import place, sequences_of
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.records import Sample

_POLICY = Path(__file__).parent.parent / "demo" / "policy"
_FIRST_WORD, _LAST_WORD = 8, 1000
_SAVING_GOAL, _STEP_GOAL = 5.0, 1.15


@dataclass(frozen=True, slots=True)
class Times:
    """CPU seconds of one round, forward and backward."""

    together: float
    apart: float
    plain: float
    """Of the one sequence, without recorded samples, loss or measurements."""


def session(turns: int, prompt: int, reply: int, between: int, seed: int) -> list[Sample]:
    """A session whose every prompt begins with all that came before it."""
    draw = Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randint(_FIRST_WORD, _LAST_WORD) for _ in range(count))

    history, samples = tokens(prompt), list[Sample]()
    for index in range(turns):
        said = tokens(reply)
        samples.append(
            Sample(
                turn=f"t{index}",
                session="s",
                policy_version=0,
                prompt_ids=history,
                completion_ids=said,
                behaviour_logprobs=tuple(-7.0 for _ in said),
                score=draw.choice((-1, 1)),
                hinted_prompt_ids=None,
            )
        )
        history = (*history, *said, *tokens(between))
    return samples


def measure(trainer: PolicyTrainer, samples: list[Sample], rounds: int) -> list[Times]:
    """`rounds` rounds after one that is not counted."""
    found: list[Times] = []
    apart = [replace(s, session=s.turn) for s in samples]
    sequences = place(sequences_of(samples))

    def plain() -> None:
        trainer.model(input_ids=sequences.ids, labels=sequences.ids).loss.backward()

    for _ in range(rounds + 1):
        times = [_cpu_s(trainer.gradient, part, {0: 0}) for part in (samples, apart)]
        found.append(Times(*times, _cpu_s(plain)))
        trainer.model.zero_grad()
    return found[1:]


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequences", description=__doc__)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=60, help="tokens of the first prompt")
    parser.add_argument("--reply", type=int, default=30, help="tokens of each reply")
    parser.add_argument("--between", type=int, default=30, help="tokens of each next state")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    samples = session(given.turns, given.prompt, given.reply, given.between, seed=0)
    config = LearnerConfig(
        method="binary",
        epochs=1,
        kl_coef=0.0,
        learning_rate=1e-6,
        device="cpu",
        threads=1,
        drift_limit=100,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, str(_POLICY), Path(folder))
        times = measure(trainer, samples, given.rounds)
    console = Console(width=100)
    console.print(f"{given.turns} turns, {len(samples[-1].prompt_ids) + given.reply} tokens")
    for name, ratio, goal in (
        ("turns alone / one sequence", lambda t: t.apart / t.together, f"≥ {_SAVING_GOAL:g}"),
        ("one sequence / plain pass", lambda t: t.together / t.plain, f"≤ {_STEP_GOAL:g}"),
    ):
        low, middle, high = quantiles(map(ratio, times), n=4)
        console.print(f"{name}: {middle:.2f} ({low:.2f} … {high:.2f}), goal {goal}")


def _cpu_s(work: Callable[..., object], *arguments: object) -> float:
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


if __name__ == "__main__":
    main()
