"""What one update did to its tokens, as numbers with `area/what` names."""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Completion tokens of some samples in a row, each field (N,) on the CPU; nats."""

    policy: Tensor
    behaviour: Tensor
    advantage: Tensor
    current: Tensor
    """bool: of a sample that the version in training made itself"""
    gap: Tensor
    """Clipped teacher gap of hinted samples only, so it has its own length."""
    reference: Tensor | None
    """Log-probabilities of the base; None without a KL term."""


def join(parts: Sequence[TokenStats]) -> TokenStats:
    """All tokens of an update."""
    joined = {}
    for f in fields(TokenStats):
        values = [getattr(part, f.name) for part in parts]
        joined[f.name] = None if values[0] is None else torch.cat(values)
    return TokenStats(**joined)


def drift(tokens: TokenStats) -> float | None:
    """Mean |policy − behaviour| where both are of one version; None without such tokens.

    It is the disagreement of engine and learner about the same weights, 0 in exact arithmetic.
    """
    if not tokens.current.any():
        return None
    return float((tokens.policy - tokens.behaviour)[tokens.current].abs().mean())


def token_metrics(tokens: TokenStats) -> dict[str, float]:
    """Means over tokens; a name is absent where nothing was measured, never 0."""
    ratio = (tokens.policy - tokens.behaviour).exp()
    found = {
        "drift/mean": drift(tokens),
        "ratio/mean": float(ratio.mean()),
        "ratio/max": float(ratio.max()),
        "advantage/mean": float(tokens.advantage.mean()),
        "teacher_gap/mean": float(tokens.gap.mean()) if len(tokens.gap) else None,
        "kl/base": base_kl(tokens),
    }
    return {name: value for name, value in found.items() if value is not None}


def base_kl(tokens: TokenStats) -> float | None:
    """KL(policy ‖ base) a token; None without a KL term."""
    if tokens.reference is None:
        return None
    return policy_change(tokens.policy, tokens.reference)


def policy_change(old: Tensor, new: Tensor) -> float:
    """KL(old ‖ new) a token, from log-probabilities (N,) of tokens that `old` drew.

    The estimator is the loss's own, exp(new − old) − (new − old) − 1: unbiased and never negative
    (Schulman 2020, "Approximating KL Divergence").
    """
    difference = new - old
    return float((difference.exp() - difference - 1).mean())
