"""Samples as padded tensors: prompts padded on the left, completions on the right.

Nothing is cut: a batch is as wide as its longest prompt and its longest completion. Padding holds
`PAD_ID` in ids and 0.0 in log-probabilities, and the masks say where it is.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from learner.advantages import Weights
from nextstate.records import Sample

PAD_ID = 0
"""Any id would do: the masks keep it out of every sum."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples, H of them with a hinted prompt for the teacher; masks are 1 on real tokens."""

    prompt_ids: Tensor
    """(B, P)"""
    prompt_mask: Tensor
    """(B, P)"""
    completion_ids: Tensor
    """(B, T)"""
    completion_mask: Tensor
    """(B, T)"""
    behaviour_logprobs: Tensor
    """(B, T) float32, in nats"""
    scores: Tensor
    """(B,) float32 in {-1, 0, 1}"""
    current: Tensor
    """(B,) bool: sampled from the very version that trains now"""
    hinted_rows: Tensor
    """(H,) rows of the samples with a hinted prompt"""
    hinted_prompt_ids: Tensor
    """(H, Q)"""
    hinted_prompt_mask: Tensor
    """(H, Q)"""
    share: float
    """B over the size of the whole update: what its mean loss weighs there."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: v.to(device) for name, v in moved.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def collate(
    samples: Sequence[Sample], *, current: int, weights: Weights, share: float = 1.0
) -> Batch:
    """One batch of all `samples`; hinted prompts only where the method distils."""
    hinted = [
        (row, sample.hinted_prompt_ids)
        for row, sample in enumerate(samples)
        if weights.opd != 0 and sample.hinted_prompt_ids is not None
    ]
    prompt_ids, prompt_mask = pad_left([s.prompt_ids for s in samples], PAD_ID)
    completion_ids, completion_mask = pad_right([s.completion_ids for s in samples], PAD_ID)
    behaviour, _ = pad_right([s.behaviour_logprobs for s in samples], 0.0)
    hinted_prompt_ids, hinted_prompt_mask = pad_left([ids for _, ids in hinted], PAD_ID)
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        behaviour_logprobs=behaviour,
        scores=torch.tensor([float(s.score) for s in samples]),
        current=torch.tensor([s.policy_version == current for s in samples]),
        hinted_rows=torch.tensor([row for row, _ in hinted], dtype=torch.long),
        hinted_prompt_ids=hinted_prompt_ids,
        hinted_prompt_mask=hinted_prompt_mask,
        share=share,
    )


def micro_batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Groups of at most `size` samples of similar length, so that little is padded."""
    by_length = sorted(samples, key=token_count)
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def token_count(sample: Sample) -> int:
    """Tokens of the longest sequence that the sample needs: prompt or hinted prompt, and reply."""
    prompts = len(sample.prompt_ids), len(sample.hinted_prompt_ids or ())
    return max(prompts) + len(sample.completion_ids)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Values and mask, both (rows, longest)."""
    width = max(map(len, rows), default=0)
    values = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return _matrix(values, width, torch.long), _matrix(mask, width, torch.long)


def pad_right(rows: Sequence[Sequence[float]], pad: float) -> tuple[Tensor, Tensor]:
    """Values and mask, both (rows, longest); an integer `pad` makes integer values."""
    width = max(map(len, rows), default=0)
    values = [list(row) + [pad] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    dtype = torch.long if isinstance(pad, int) else torch.float32
    return _matrix(values, width, dtype), _matrix(mask, width, torch.long)


def _matrix(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), width)
