"""The log-probabilities of completions under the sampler that drew them.

A sampler changes single logits (bias, allowed tokens, penalties), divides all by the temperature,
and leaves unlikely tokens out (min-p, top-k, top-p), in this order, which is vLLM's. Two numbers
describe a token y then: log p(y) under the first two steps, and log M, where M is the mass of the
tokens that are left. What the sampler drew from, and what vLLM reports in the mode
`processed_logprobs`, is p(y) / M. So the importance ratio of a truncated turn is

    ratio = p_now(y) / (M_now · behaviour(y))

Both sides have the same support, so for unchanged weights the ratio is 1 and the gradient has the
mean 0 for an advantage of 1 (Σ p/M ∇ log(p/M) = 0). Without M_now the ratio would be M for
unchanged weights; with M at sampling instead, a score of -1 would raise tokens that were never
drawn, by ∇ log M. See docs/architecture.md for the bounds.

What is left out is found anew from the present weights, like the engine would. The drawn token is
always let in: the policy may have moved since, or rounded otherwise.

Logits are computed for `CHUNK_TOKENS` at a time, and computed again in the backward pass.
"""
# pyright: basic

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from learner.divergence import CHUNK_TOKENS, Head, head_logits
from learner.tensors import Sequences

_LOOKED_AT = 1024
"""The likeliest tokens among which a truncation's edge is looked for before all are sorted."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """B completions' tokens, in nats; 0 outside."""

    whole: Tensor
    """(B, T) log p: after penalties and temperature, before anything is left out"""
    kept: Tensor
    """(B, T) log M, at most 0; 0 where nothing is left out"""
    raw: Tensor
    """(B, T) without any of the sampler's steps; no gradient"""

    @property
    def sampled(self) -> Tensor:
        """(B, T) log p - log M: of the distribution that the sampler draws from"""
        return self.whole - self.kept


def completion_logprobs(states: Tensor, head: Head, sequences: Sequences) -> TokenLogprobs:
    """Reads the completions in `sequences` from the last layer's `states` (R, L, H)."""
    mask = sequences.completion_mask.bool()
    turns, steps = mask.nonzero(as_tuple=True)
    drawn = sequences.completion_ids[mask]
    at = sequences.predicting(states, torch.arange(len(mask), device=mask.device))
    parts = [
        checkpoint(
            _chunk,
            at[chunk],
            head,
            drawn[chunk],
            turns[chunk],
            steps[chunk],
            sequences,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for chunk in torch.arange(len(drawn), device=mask.device).split(CHUNK_TOKENS)
    ]
    whole, kept, raw = (torch.cat(values) for values in zip(*parts, strict=True))
    return TokenLogprobs(*map(sequences.by_turn, (whole, kept, raw)))


def _chunk(
    states: Tensor, head: Head, drawn: Tensor, turns: Tensor, steps: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor, Tensor]:
    """`TokenLogprobs` (N,) of N tokens."""
    used = [sequences.samplings[turn] for turn in turns.tolist()]
    logits = head_logits(states, head)
    raw = _logprob(logits, drawn)
    if all(sampling.is_plain for sampling in used):
        return raw, torch.zeros_like(raw), raw.detach()
    logits = edited(logits, turns, steps, sequences)
    logits = logits / _column([sampling.divisor for sampling in used], logits)
    whole = _logprob(logits, drawn)
    if not any(sampling.truncates for sampling in used):
        return whole, torch.zeros_like(whole), raw.detach()
    logprobs = logits.log_softmax(-1)
    shaped = [(s.min_p, s.top_k, s.top_p) if s.truncates else (0.0, 0, 1.0) for s in used]
    min_p, top_k, top_p = (_column(values, logits) for values in zip(*shaped, strict=True))
    return whole, log_kept(logprobs, min_p, top_k.long(), top_p, drawn), raw.detach()


def _column(values, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _logprob(logits: Tensor, drawn: Tensor) -> Tensor:
    return logits.gather(-1, drawn[:, None]).squeeze(-1) - logits.logsumexp(-1)


def edited(logits: Tensor, turns: Tensor, steps: Tensor, sequences: Sequences) -> Tensor:
    """`logits` (N, V) after allowed tokens, bias and penalties.

    Row n predicts token `steps[n]` of the completion of turn `turns[n]`; the rows of a turn follow
    each other. The repetition penalty counts prompt and completion, the others only the completion
    (vLLM's `apply_penalties`; repetition: arXiv 1909.05858, section 4.1).
    """
    for turn in turns.unique().tolist():
        sampling = sequences.samplings[turn]
        if not sampling.edits_logits:
            continue
        rows = (turns == turn).nonzero().squeeze(-1)
        part = logits[rows]
        if sampling.allowed_token_ids:
            barred = torch.ones(part.size(-1), dtype=torch.bool, device=part.device)
            barred[torch.tensor(sampling.allowed_token_ids, device=part.device)] = False
            part = part.masked_fill(barred, -torch.inf)
        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias, strict=True)
            bias = torch.zeros_like(part[0])
            bias[torch.tensor(ids, device=part.device)] = torch.tensor(biases).to(bias)
            part = part + bias
        said = _counts_before(sequences.completion_ids[turn], steps[rows], part)
        seen = said > 0
        seen[:, sequences.prompt(turn)] = True
        repetition = sampling.repetition_penalty
        penalised = torch.where(part > 0, part / repetition, part * repetition)
        part = torch.where(seen, penalised, part)
        part = part - sampling.frequency_penalty * said
        part = part - sampling.presence_penalty * (said > 0).to(said.dtype)
        logits = logits.index_copy(0, rows, part)
    return logits


def _counts_before(completion: Tensor, steps: Tensor, like: Tensor) -> Tensor:
    """(n, V): how often each token came before each of the consecutive `steps` (n,)."""
    counts = torch.zeros_like(like, requires_grad=False)
    first = int(steps[0])
    counts[0] = completion[:first].bincount(minlength=like.size(-1)).to(like.dtype)
    later = torch.arange(1, len(steps), device=like.device)
    counts[later, completion[steps[:-1]]] = 1.0
    return counts.cumsum(0)


def log_kept(
    logprobs: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, drawn: Tensor
) -> Tensor:
    """log M (N,): the mass of what min-p, then top-k, then top-p leave, with the drawn token.

    `logprobs` (N, V) sum to 1; min_p, top_k and top_p (N, 1) are 0, 0 and 1 where they are off;
    `drawn` (N,). Top-p keeps the likeliest tokens until their share of what the others left reaches
    it. Tokens as likely as the last one that top-k keeps are kept too.
    """
    # What is kept is a fact about the weights, not something to differentiate: M itself is.
    chosen = logprobs.detach()
    count = min(_LOOKED_AT, chosen.size(-1))
    values = chosen.topk(count).values
    lowest = values[:, :1] + min_p.log()
    if top_k.any():
        count = max(count, min(int(top_k.max()), chosen.size(-1)))
        values = chosen.topk(count).values
        kth = values.gather(-1, (top_k.clamp(max=count) - 1).clamp(min=0))
        lowest = torch.where(top_k > 0, torch.maximum(lowest, kth), lowest)
    if (top_p < 1).any():
        left = torch.where(chosen >= lowest, chosen.exp(), 0.0).sum(-1, keepdim=True)
        wanted = torch.where(top_p < 1, top_p * left, 0.0)
        edge, found = _nucleus_edge(values, lowest, wanted)
        if not found:
            edge, _ = _nucleus_edge(chosen.sort(descending=True).values, lowest, wanted)
        lowest = torch.where(top_p < 1, torch.maximum(lowest, edge), lowest)
    kept = (chosen >= lowest).scatter(-1, drawn[:, None], True)
    off = (min_p == 0) & (top_k == 0) & (top_p == 1)
    mass = logprobs.masked_fill(~kept, -torch.inf).logsumexp(-1)
    return torch.where(off.squeeze(-1), 0.0, mass.clamp(max=0.0))


def _nucleus_edge(values: Tensor, lowest: Tensor, wanted: Tensor) -> tuple[Tensor, bool]:
    """The smallest log-probability (N, 1) that top-p keeps, and whether all edges were found.

    `values` (N, K) are the likeliest in order. A token is kept if those before it have less mass
    than `wanted`.
    """
    mass = torch.where(values >= lowest, values.exp(), 0.0)
    after = mass.cumsum(-1)
    inside = (after - mass < wanted) & (values >= lowest)
    inside[:, 0] = True
    edge = values.gather(-1, inside.sum(-1, keepdim=True) - 1)
    beyond = inside[:, -1:] & (after[:, -1:] < wanted)
    return edge, not beyond.any()
