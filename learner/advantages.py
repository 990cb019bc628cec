"""From a score and a teacher to one advantage per token.

    advantage[t] = w_rl · score + w_opd · clip(teacher_logprob[t] − behaviour_logprob[t], ±limit)

This is arXiv 2603.10165's combined advantage, with two deliberate choices. The gap is bounded per
token, so that no single token outweighs a score. And it is measured from the behaviour
log-probabilities, the very distribution that the token was drawn from, which keeps the term an
importance-weighted estimate when the policy has moved on since.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.config import Method


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each signal counts."""

    rl: float
    """Of the score."""
    opd: float
    """Of the teacher gap (on-policy distillation)."""


WEIGHTS: Mapping[Method, Weights] = {
    "binary": Weights(1.0, 0.0),
    "opd": Weights(0.0, 1.0),
    "combined": Weights(1.0, 1.0),
}


def teacher_gap(teacher: Tensor, behaviour: Tensor, limit: float) -> Tensor:
    """Clipped difference of log-probabilities in nats, (H, T) like both arguments."""
    return (teacher - behaviour).clamp(-limit, limit)


def token_advantages(
    scores: Tensor, gap: Tensor, hinted_rows: Tensor, mask: Tensor, weights: Weights
) -> Tensor:
    """Advantages (B, T), 0 outside the completion.

    `scores` (B,); `gap` (H, T) of the rows `hinted_rows` (H,), all others have no teacher and get
    no distillation term; `mask` (B, T) is 1 on completion tokens.
    """
    distilled = torch.zeros(mask.shape, dtype=gap.dtype, device=mask.device)
    distilled[hinted_rows] = gap
    return (weights.rl * scores[:, None] + weights.opd * distilled) * mask
