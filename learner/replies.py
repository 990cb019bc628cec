"""Greedy and sampled replies of a model, one token to a forward pass.

A sampled token is the largest of logit plus temperature times Gumbel noise, which is a draw from
the softmax at that temperature. The noise depends only on seed, draw, prompt and place, so a reply
is a function of the weights.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from learner.model import causal_model
from learner.tensors import PAD_ID


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: frozenset[int],
    *,
    most_tokens: int,
    draws: int,
    temperature: float,
    seed: int,
) -> list[list[int]] | None:
    """A greedy reply to each of N prompts, then `draws` times a sampled one to each.

    The replies come without their ends. All of them are decoded together. None if a logit that
    decides a token is not a number.
    """
    rows, device = [*prompts] * (1 + draws), model.device
    width = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    end_ids = torch.tensor(sorted(ends), device=device)
    is_open = torch.ones(len(rows), dtype=torch.bool, device=device)
    # Only the last position's logits are needed: those of a long prompt would be large.
    can_keep = "logits_to_keep" in signature(causal_model(model).forward).parameters
    options = {"logits_to_keep": 1} if can_keep else {}
    cache, chosen = None, list[Tensor]()
    for place in range(most_tokens):
        made = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.size(1) :],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        cache, logits = made.past_key_values, made.logits[:, -1].float()
        # The largest is not a number if any is not; a token may be masked with -inf.
        if not torch.isfinite(logits.max(dim=1).values[is_open]).all():
            return None
        for draw, row in enumerate(range(len(prompts), len(rows))):
            of = (place, seed, draw // len(prompts), *rows[row])
            logits[row] += temperature * gumbel_noise(logits[row], of)
        chosen.append(logits.argmax(dim=1))
        is_open &= ~torch.isin(chosen[-1], end_ids)
        if not is_open.any():
            break
        ids, mask = chosen[-1][:, None], pad(mask, (0, 1), value=1)
    return [up_to_end(reply, ends) for reply in torch.stack(chosen, dim=1).tolist()]


def gumbel_noise(like: Tensor, of: tuple[int, ...]) -> Tensor:
    """(V,) standard Gumbel noise for logits `like` (V,), always the same for the same `of`."""
    draw = torch.Generator(like.device).manual_seed(hash(of))
    return -torch.empty_like(like).exponential_(generator=draw).log()


def up_to_end(reply: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The reply before the first token that ends it."""
    for at, token in enumerate(reply):
        if token in ends:
            return list(reply[:at])
    return list(reply)
