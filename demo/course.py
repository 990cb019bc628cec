"""What a demo runs: which model learns from whom, for how long, and when it has learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.score import GOALS, Goals, Score
from demo.tasks import Domain
from demo.wishes import WISHES
from demo.world import World, person_world, persona_world

POLICY = Path(__file__).parent / "policy"
MODEL = "seed-policy"
BATCH = 16
UPDATES: Mapping[str, int] = {
    "binary": 16,
    "combined": 16,
    "combined_sampled": 16,
    "opd": 10,
    "opd_topk": 10,
}
"""Fewer for opd: hints come only from failures, and a better policy fails less often."""
LEARNER: Mapping[str, bool | int | float] = {
    "batch_size": BATCH,
    "kl_coef": 0.2,
    "gradient_checkpointing": False,
    "micro_batch_tokens": 2048,
    "threads": 1,
}
"""Keys of `[learner]` for a policy this small."""
_MODEL_LEARNER: Mapping[str, bool | int | float] = {
    "gradient_checkpointing": False,
    "micro_batch_tokens": 2048,
}
"""Nothing of what decides about learning: a real model learns with the defaults."""
_MOST_LOST = 0.1
"""As many right replies may be lost in a measurement of `questions` replies."""


@dataclass(frozen=True, slots=True)
class Course:
    """One model with its users."""

    world: World
    model: Path
    served_name: str
    dtype: str
    learner: Mapping[str, bool | int | float | str]
    """Keys of `[learner]` beside the method."""
    updates: int
    conversations: int
    """How many go on at once."""
    max_tokens: int
    """Of a reply."""
    questions: int
    """Held-out questions for a version on the way."""
    all_questions: int
    """Of the first and the last version."""
    measure_every: int
    """Updates between measurements."""
    update_timeout_s: float
    starved_s: float
    """Without a new version for this long, opd has too few complaints left to fill a batch."""
    goals: Callable[[Score], Goals]
    """What the last score must reach, by the first."""


def toy_course(method: str, persona: Domain, seed: int) -> Course:
    """The seed policy and one of its personas."""
    return Course(
        world=persona_world(persona, seed),
        model=POLICY,
        served_name=MODEL,
        dtype="float32",
        learner=LEARNER,
        updates=UPDATES[method],
        conversations=8,
        max_tokens=96,
        questions=64,
        all_questions=256,
        measure_every=2,
        update_timeout_s=120.0,
        starved_s=50.0,
        goals=lambda first: GOALS,
    )


def model_course(model: Path, wish: str, seed: int) -> Course:
    """A real model on this machine and a person with a wish."""
    dtype = _fast_dtype()
    return Course(
        world=person_world(WISHES[wish], seed),
        model=model,
        served_name=model.name,
        dtype=dtype,
        learner={**_MODEL_LEARNER, "dtype": dtype},
        updates=6,
        conversations=BATCH,
        max_tokens=64,
        questions=32,
        all_questions=64,
        measure_every=3,
        update_timeout_s=480.0,
        starved_s=400.0,
        goals=_better_and_still_right,
    )


def _better_and_still_right(first: Score) -> Goals:
    return Goals(min(1.0, first.score + first.margin), first.right - _MOST_LOST)


def _fast_dtype() -> str:
    """bfloat16 where the CPU multiplies it itself: elsewhere it is five times slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    fast = "amx_bf16" in flags or "avx512_bf16" in flags or Path("/proc/driver/nvidia").exists()
    return "bfloat16" if fast else "float32"
