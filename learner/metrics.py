"""Numbers about the tokens of one update, with `area/what` names."""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from learner.kl import kl_divergence, largest_move


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Completion tokens of some samples in a row, each field (N,) on the CPU; nats."""

    policy: Tensor
    """Each under the sampler that drew it, like `behaviour`"""
    raw: Tensor
    """Of the policy without temperature, penalties and truncation"""
    behaviour: Tensor
    advantage: Tensor
    lag: Tensor
    """Updates since the version that sampled the token; 0 for the version in training"""
    gap: Tensor
    """Clipped teacher gap of hinted samples only, so it has its own length."""
    reference: Tensor | None
    """Log-probabilities of the base, as far from `policy` as the whole distributions are; None
    without a KL term."""
    divergence: Tensor | None
    """KL(policy ‖ teacher) of hinted samples only; None for a method without it."""


def join(parts: Sequence[TokenStats]) -> TokenStats:
    """All tokens of an update."""
    joined = {}
    for f in fields(TokenStats):
        values = [getattr(part, f.name) for part in parts]
        joined[f.name] = None if values[0] is None else torch.cat(values)
    return TokenStats(**joined)


def drift(tokens: TokenStats) -> float | None:
    """Mean |policy − behaviour| where both are of one version; None without such tokens.

    It is how far engine and learner disagree about the same weights: 0 in exact arithmetic.
    """
    current = tokens.lag == 0
    if not current.any():
        return None
    return float((tokens.policy - tokens.behaviour)[current].abs().mean())


def raw_drift(tokens: TokenStats) -> float | None:
    """Mean |raw − behaviour| if the recorded log-probs are nearer to the raw ones; else None.

    A token speaks for that if `behaviour` is nearer to `raw` than to `policy`. If the recorded ones
    are right, the mean of the difference is about -|raw − policy|; if they are raw, about its
    opposite. Half of that decides: where rounding is larger than the difference, neither shows, and
    a wrong mode would change the ratio by less than rounding does. Tokens of the version in
    training decide if there are any.
    """
    current = tokens.lag == 0
    chosen = current if current.any() else torch.ones_like(current)
    policy, raw, behaviour = (x[chosen] for x in (tokens.policy, tokens.raw, tokens.behaviour))
    from_raw = (raw - behaviour).abs()
    nearer = ((policy - behaviour).abs() - from_raw).mean()
    apart = (policy - raw).abs().mean()
    return float(from_raw.mean()) if apart > 0 and nearer > apart / 2 else None


def unexplained_drift(tokens: TokenStats, step_kl: float) -> float:
    """Mean |policy − behaviour| beyond what the updates in between can have changed.

    If engine and learner agree, an older version of the policy sampled these tokens, and each
    update since then moved tokens by at most `largest_move(step_kl)` on average. That is measured
    on the tokens of those updates and assumed for these; on the demo's policy they moved by a tenth
    of it. So this is a weaker check than `drift`: it only notices an engine that serves something
    quite different.
    """
    moved = (tokens.policy - tokens.behaviour).abs().mean()
    return float(moved - tokens.lag.float().mean() * largest_move(step_kl))


def token_metrics(tokens: TokenStats, step_kl: float) -> dict[str, float]:
    """Means over tokens; a name is absent, never 0, if nothing was measured.

    `kl/base` is KL(policy ‖ base) a token.
    """
    ratio = (tokens.policy - tokens.behaviour).exp()
    base = tokens.reference
    found = {
        "drift/mean": drift(tokens),
        "drift/unexplained": unexplained_drift(tokens, step_kl),
        "ratio/mean": float(ratio.mean()),
        "ratio/max": float(ratio.max()),
        "advantage/mean": float(tokens.advantage.mean()),
        "teacher_gap/mean": _mean(tokens.gap),
        "kl/base": None if base is None else kl_divergence(tokens.policy, base, tokens.behaviour),
        "kl/teacher": _mean(tokens.divergence),
    }
    return {name: value for name, value in found.items() if value is not None}


def _mean(values: Tensor | None) -> float | None:
    return float(values.mean()) if values is not None and len(values) else None
