"""Of several hints the learner takes the one under which the teacher differs most usefully."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner.advantages import usefulness
from learner.trainer import build_trainer
from tests.learner.test_tiny_model import (
    CONFIG,
    GOOD,
    load_float64,
    logprobs,
    sample,
    save_tiny_model,
)

OFFERED = ((9, 5, 6, 7), (30, 31, 5, 6, 7), (40, 5, 6, 7), (5, 6, 7, 50, 51))
CLIP = 0.05


@pytest.mark.parametrize(
    ("gap", "score", "expected"),
    [
        ([-1.0, 0.5], -1, 0.25),  # on average the teacher thinks less of what was blamed
        ([-1.0, 0.5], 1, -0.25),
        ([-1.0, 0.5], 0, 0.75),
    ],
)
def test_usefulness_equals_the_hand_worked_number(
    gap: list[float], score: int, expected: float
) -> None:
    assert usefulness(torch.tensor(gap), score) == pytest.approx(expected)


@pytest.mark.parametrize("score", [1, 0, -1])
def test_the_chosen_hint_is_the_most_useful_of_those_that_fit(tmp_path: Path, score: int) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    reference = load_float64(model_path)
    too_long = tuple(range(40, 60))
    config = replace(CONFIG, teacher_gap_clip=CLIP, max_tokens=10)
    trainer = build_trainer(config, model_path, tmp_path)
    with torch.no_grad():
        behaviour = logprobs(reference, (5, 6, 7), GOOD)
        gaps = [(logprobs(reference, p, GOOD) - behaviour).clamp(-CLIP, CLIP) for p in OFFERED]
    best = max(range(len(OFFERED)), key=lambda n: usefulness(gaps[n], score))
    plain = sample(score=score, hinted=OFFERED[0], behaviour=behaviour.tolist())
    offered = replace(plain, other_prompts=(*OFFERED[1:], too_long))
    found = trainer.with_best_hints([plain, offered])
    assert [one.hinted_prompt_ids for one in found] == [OFFERED[0], OFFERED[best]]
    assert found[1].other_prompts == offered.other_prompts
