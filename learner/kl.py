"""The one estimator of how far one policy is from another, over recorded tokens."""
# pyright: basic

from __future__ import annotations

import math

from torch import Tensor

RATIO_CAP = 4.0
"""Truncation of an importance ratio that no clip bounds."""
_NEWTON_STEPS = 50


def kl_divergence(old: Tensor, new: Tensor, drawn_by: Tensor | None = None) -> float:
    """KL(old ‖ new) in nats a token, from log-probabilities (N,) of the same tokens.

    Each token's estimate is exp(new − old) − (new − old) − 1: unbiased and never negative (Schulman
    2020, "Approximating KL Divergence"). It holds for tokens that `old` drew. Where another policy
    drew them, `drawn_by` (N,) has its log-probabilities, and each estimate is weighted by the
    importance ratio old / drawn_by, truncated at `RATIO_CAP`.
    """
    difference = new - old
    estimates = difference.exp() - difference - 1
    if drawn_by is not None:
        estimates = (old - drawn_by).exp().clamp(max=RATIO_CAP) * estimates
    return float(estimates.mean())


def largest_move(kl: float) -> float:
    """The largest possible mean |new − old| of log-probabilities whose `kl_divergence` is `kl`.

    `kl_divergence` is a mean of e^d − d − 1. This is at least g(|d|) with g(x) = e^−x + x − 1. g is
    convex, so g(mean |d|) ≤ kl. The result solves g(x) = kl; near 0 it is √(2 kl).
    """
    x = kl + 1.0  # right of the solution: Newton's method descends to it from here
    for _ in range(_NEWTON_STEPS):
        x -= (math.expm1(-x) + x - kl) / -math.expm1(-x)
    return x
