"""The mean over an update's tokens that each of TRL's loss types takes.

TRL averages its own terms; this is for those that are added to them.
"""
# pyright: basic

from __future__ import annotations

from torch import Tensor

from learner.config import LossType

PER_TOKEN_LOSSES: tuple[LossType, ...] = ("bnpo", "dapo", "cispo", "vespo")
"""Those that count a turn by its tokens; for the others every turn counts the same."""
DR_GRPO_TOKENS = 256
"""dr_grpo divides by this in place of a completion's length; TRL's default. AdamW's step does not
depend on it."""


def token_mean(values: Tensor, mask: Tensor, loss_type: LossType) -> Tensor:
    """One number of `values` (B, T) on the tokens where `mask` (B, T) is 1.

    As in `GRPOTrainer._compute_loss`; arXiv 2402.03300, 2503.14476 (dapo) and 2503.20783 (dr_grpo).
    """
    sums = (values * mask).sum(-1)
    if loss_type in ("grpo", "sapo"):
        return (sums / mask.sum(-1).clamp(min=1)).mean()
    if loss_type == "luspo":
        return sums.mean()
    if loss_type == "dr_grpo":
        return sums.mean() / DR_GRPO_TOKENS
    return sums.sum() / mask.sum().clamp(min=1)
