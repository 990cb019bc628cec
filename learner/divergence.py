"""How far the policy is from its teacher, over whole next-token distributions.

    KL(policy ‖ teacher) = Σ_k p_k (log p_k − log q_k)      k: the teacher's top K tokens, and one
                                                            bin with the probability of all others

This is the reverse KL of on-policy distillation (arXiv 2306.13649) on K + 1 bins. It is at most the
KL on all tokens, because merging tokens into a bin can only lower a KL. It compares every likely
token, while the teacher gap compares only the sampled one.

Its expectation over the next token is exact and does not depend on the sampled token, so it needs
no importance ratio. For stale samples only the prefixes are off-policy, by as much as
`max_lag` steps of at most `step_kl` allow.

Logits are (tokens, vocabulary), by far the largest tensors of a model. They are computed for
`CHUNK_TOKENS` at a time, and computed again in the backward pass.
"""
# pyright: basic

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 128
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@dataclass(frozen=True, slots=True)
class Head:
    """The layer that turns hidden states into logits."""

    weight: Tensor
    """(V, H)"""
    bias: Tensor | None
    """(V,)"""
    scale: float = 1.0
    """Some models multiply their logits by this."""
    softcap: float | None = None
    """Then some bound them: softcap · tanh(logit / softcap)."""


@dataclass(frozen=True, slots=True)
class TopTokens:
    """A teacher's likeliest tokens at N places."""

    ids: Tensor
    """(N, K)"""
    logprobs: Tensor
    """(N, K + 1) float32; the last is of all other tokens together"""

    def __getitem__(self, places: slice | Tensor) -> TopTokens:
        return TopTokens(self.ids[places], self.logprobs[places])


def head_of(model: Any) -> Head:
    """The head of a causal language model, with or without an adapter.

    Each family of models has its own name for a scale; `trl.trainer.utils.add_fused_lm_head`, which
    computes the policy's log-probabilities, reads the same names.
    """
    layer = model.get_output_embeddings()
    text = model.config.get_text_config()
    scales = (getattr(text, name, None) for name in _SCALES)
    scale = next((scale for scale in scales if scale is not None), 1.0)
    divisor = getattr(text, "logits_scaling", None)
    if divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return Head(layer.weight, layer.bias, scale, getattr(text, "final_logit_softcapping", None))


@torch.no_grad()
def top_tokens(states: Tensor, head: Head, k: int, temperature: Tensor | float = 1.0) -> TopTokens:
    """The `k` likeliest tokens after `states` (N, H); at most all of the vocabulary but one.

    `temperature` is one for all, or each token's own (N, 1).
    """
    k = min(k, head.weight.size(0) - 1)
    ids, logprobs = [], []
    each = _each(temperature, states)
    chunks = zip(states.split(CHUNK_TOKENS), each.split(CHUNK_TOKENS), strict=True)
    for at, divisor in chunks:
        logits = head_logits(at, head) / divisor
        ids.append(logits.topk(k).indices)
        logprobs.append(binned_logprobs(logits, ids[-1]))
    return TopTokens(torch.cat(ids), torch.cat(logprobs))


def topk_divergence(
    states: Tensor, head: Head, teacher: TopTokens, temperature: Tensor | float = 1.0
) -> Tensor:
    """KL(policy ‖ teacher) (N,) in nats at the policy's `states` (N, H), over K + 1 bins.

    The policy is read at one `temperature`, or at each token's own (N, 1). Differentiable in
    `states` only; N is at least 1.
    """
    each = _each(temperature, states)
    parts = [
        checkpoint(
            _divergence,
            states[start : start + CHUNK_TOKENS],
            head,
            teacher[start : start + CHUNK_TOKENS],
            each[start : start + CHUNK_TOKENS],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, len(states), CHUNK_TOKENS)
    ]
    return torch.cat(parts)


def binned_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (N, K + 1) of the tokens `ids` (N, K) and of all others together.

    From `logits` (N, V), V > K. The last bin is a sum over its tokens: 1 minus the others would
    lose all digits if they are nearly certain.
    """
    total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), rest], dim=-1) - total


def reverse_kl(policy: Tensor, teacher: Tensor) -> Tensor:
    """KL(policy ‖ teacher) (N,) in nats, from log-probabilities (N, bins)."""
    return (policy.exp() * (policy - teacher)).sum(-1)


def _divergence(states: Tensor, head: Head, teacher: TopTokens, temperature: Tensor) -> Tensor:
    logits = head_logits(states, head) / temperature
    return reverse_kl(binned_logprobs(logits, teacher.ids), teacher.logprobs)


def _each(temperature: Tensor | float, states: Tensor) -> Tensor:
    return torch.as_tensor(temperature, device=states.device).expand(len(states), 1)


def head_logits(states: Tensor, head: Head) -> Tensor:
    """Logits (N, V), in float32 or better, after `states` (N, H)."""
    bias = None if head.bias is None else head.bias.to(states.dtype)
    logits = linear(states, head.weight.to(states.dtype), bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
