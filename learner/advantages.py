"""From a score and a teacher to one advantage per token.

    advantage[t] = w_rl · score + w_opd · clip(teacher_logprob[t] − behaviour_logprob[t], ±limit)

This is the combined advantage of arXiv 2603.10165, with two deliberate choices. The gap is bounded
per token, so that no single token outweighs a score: |advantage| ≤ w_rl · |score| + w_opd · limit.
And it is measured from the behaviour log-probabilities, from whose distribution the token was
drawn: this keeps the term an importance-weighted estimate after the policy has changed.

In the place of the score, a step of an episode has its advantage within its group, which the judge
stage has settled (`judge/advantages.py`).
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from learner.config import Method


@dataclass(frozen=True, slots=True)
class Signals:
    """How much each signal counts in a method."""

    rl: float
    """Of the score, in the advantage."""
    opd: float
    """Of the teacher gap, in the advantage (on-policy distillation)."""
    topk: float
    """Of the divergence from the teacher, a term of the loss (`learner/divergence.py`)."""

    @property
    def distils(self) -> bool:
        """True if the method uses hints."""
        return self.opd != 0 or self.topk != 0


SIGNALS: Mapping[Method, Signals] = {
    "binary": Signals(1.0, 0.0, 0.0),
    "opd": Signals(0.0, 1.0, 0.0),
    "combined": Signals(1.0, 0.0, 1.0),
    "combined_sampled": Signals(1.0, 1.0, 0.0),
    "opd_topk": Signals(0.0, 0.0, 1.0),
}


def teacher_gap(teacher: Tensor, behaviour: Tensor, limit: float) -> Tensor:
    """Clipped difference of log-probabilities in nats, of the arguments' shape."""
    return (teacher - behaviour).clamp(-limit, limit)


def token_advantages(
    scores: Tensor, gap: Tensor, mask: Tensor, signals: Signals, limit: float
) -> Tensor:
    """Advantages (B, T) of at most w_rl · |score| + w_opd · `limit`, 0 outside the completion.

    `scores` (B,); `gap` (B, T) is 0 in rows without a teacher; `mask` (B, T) is 1 on completion
    tokens.
    """
    advantages = signals.rl * scores[:, None] + signals.opd * gap.clamp(-limit, limit)
    return advantages.masked_fill(mask == 0, 0.0)
