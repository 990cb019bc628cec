"""Samples as padded tensors: a pass over sequences, and the turns' completions in them.

Turns of one session whose tokens extend each other are one sequence, so that their common tokens
are computed once. A forward pass reads sequences, (R, L), padded on the right. The loss reads
turns, one row each, (B, T): `Sequences` knows the place of each turn's tokens. So the loss is the
same number whether turns share a sequence or not. Nothing is cut. Padding is `PAD_ID` in ids and
0.0 in log-probabilities, and the masks mark it.
"""
# pyright: basic

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from learner.advantages import Signals
from nextstate.records import Sample
from nextstate.sampling import Sampling

PAD_ID = 0
"""Any id works: the masks keep it out of every sum."""
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Sequences:
    """R token sequences and the B completions in them; masks are 1 on real tokens."""

    ids: Tensor
    """(R, L)"""
    mask: Tensor
    """(R, L)"""
    places: Tensor
    """(B, T) where each completion token stands among all R · L ids"""
    completion_mask: Tensor
    """(B, T)"""
    samplings: tuple[Sampling, ...]
    """B: what each completion was drawn with"""

    @property
    def completion_ids(self) -> Tensor:
        """(B, T)"""
        return self.ids.flatten()[self.places].masked_fill(self.completion_mask == 0, PAD_ID)

    def by_turn(self, values: Tensor) -> Tensor:
        """(B, T) from `values` (N,) of the N completion tokens, turn by turn; 0 elsewhere."""
        mask = self.completion_mask.bool()
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    def predicting(self, states: Tensor, turns: Tensor) -> Tensor:
        """(N, H): those of `states` (R, L, H) that predict the N tokens of the rows `turns`."""
        scored = self.places[turns][self.completion_mask[turns].bool()]
        return states.flatten(0, 1)[scored - 1]

    def divisors(self, turns: Tensor) -> Tensor:
        """(N, 1): the temperature of the N tokens of the rows `turns`, 1 for a greedy turn."""
        every = torch.tensor([sampling.divisor for sampling in self.samplings])
        every = every.to(self.completion_mask.device)[turns]
        return every.repeat_interleave(self.completion_mask[turns].sum(-1))[:, None]

    def sharper(self, temperature: float) -> Sequences:
        """The same, as if every completion had been drawn at most at this temperature."""
        return replace(
            self, samplings=tuple(drawn.sharper(temperature) for drawn in self.samplings)
        )

    def prompt(self, turn: int) -> Tensor:
        """The ids (P,) before the completion of one turn."""
        row, start = divmod(int(self.places[turn, 0]), self.ids.size(1))
        return self.ids[row, :start]

    def to(self, device: torch.device) -> Sequences:
        """The same on another device."""
        return replace(
            self,
            ids=self.ids.to(device),
            mask=self.mask.to(device),
            places=self.places.to(device),
            completion_mask=self.completion_mask.to(device),
        )


@dataclass(frozen=True, slots=True)
class Hinted:
    """One pass of the teacher: the completions of some turns after their hinted prompts."""

    turns: Tensor
    """(H,) rows of the batch"""
    sequences: Sequences
    """H sequences with one completion each, as wide as the batch's: (H, T)."""

    def to(self, device: torch.device) -> Hinted:
        """The same on another device."""
        return Hinted(self.turns.to(device), self.sequences.to(device))


@dataclass(frozen=True, slots=True)
class Batch:
    """B turns that take one forward and backward pass."""

    sequences: Sequences
    behaviour_logprobs: Tensor
    """(B, T) float32, in nats"""
    scores: Tensor
    """(B,) float32: in {-1, 0, 1}, or the advantage of a step of an episode"""
    weights: Tensor
    """(B,) float32: of each turn's loss; see `turn_weights`"""
    lags: Tensor
    """(B,) updates since the version that sampled each turn; 0 for the version in training"""
    hinted: tuple[Hinted, ...]
    """The teacher's passes over the turns with a hint"""
    loss_weight: float
    """Weight of its mean loss in the mean of the whole update."""

    @property
    def completion_mask(self) -> Tensor:
        """(B, T)"""
        return self.sequences.completion_mask

    @property
    def has_teacher(self) -> Tensor:
        """(B,) bool: turns with a hinted prompt"""
        found = torch.zeros(len(self.scores), dtype=torch.bool, device=self.scores.device)
        for teacher in self.hinted:
            found[teacher.turns] = True
        return found

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            sequences=self.sequences.to(device),
            behaviour_logprobs=self.behaviour_logprobs.to(device),
            scores=self.scores.to(device),
            weights=self.weights.to(device),
            lags=self.lags.to(device),
            hinted=tuple(teacher.to(device) for teacher in self.hinted),
            loss_weight=self.loss_weight,
        )


def sequences_of(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Groups turns into sequences: each turn's prompt begins with all tokens of the one before it.

    Every sample is in exactly one sequence, and turns of different sessions never share one. A turn
    that could follow several others follows the longest. The second branch of a fork is a sequence
    of its own.
    """
    grown: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: len(s.prompt_ids)):
        followed = [turns for turns in grown if _extends(sample, turns[-1])]
        if followed:
            max(followed, key=lambda turns: _length(turns[-1])).append(sample)
        else:
            grown.append([sample])
    return grown


def collate(
    sequences: Sequence[Sequence[Sample]],
    *,
    lags: Mapping[int, int],
    signals: Signals,
    pass_tokens: int,
    weights: Mapping[str, float] | None = None,
    loss_weight: float = 1.0,
) -> Batch:
    """One batch of all `sequences`, its turns in their order.

    `lags` by version, `weights` by turn; each is 1 without them. Hinted prompts are used only if
    the method has a teacher, and where it also reads the score, not of praised turns: the teacher
    would pull away from what was liked. No pass of the teacher has more than `pass_tokens` padded
    tokens, except for a single longer turn.
    """
    samples = [turn for sequence in sequences for turn in sequence]
    placed = place(sequences)
    width = placed.completion_mask.size(1)
    wanted = [
        (row, (*sample.hinted_prompt_ids, *sample.completion_ids))
        for row, sample in enumerate(samples)
        if signals.distils and sample.hinted_prompt_ids is not None
        if signals.rl == 0 or sample.score <= 0
    ]
    hinted = [
        Hinted(
            torch.tensor([turn for turn, _ in group]),
            _lay_out(
                [ids for _, ids in group],
                [
                    (row, len(ids) - (size := len(samples[turn].completion_ids)), size)
                    for row, (turn, ids) in enumerate(group)
                ],
                width,
                tuple(samples[turn].sampling for turn, _ in group),
            ),
        )
        for group in fill_passes(wanted, [len(ids) for _, ids in wanted], pass_tokens)
    ]
    behaviour, _ = pad_right([s.behaviour_logprobs for s in samples], 0.0)
    return Batch(
        sequences=placed,
        behaviour_logprobs=behaviour,
        scores=torch.tensor([s.credit for s in samples]),
        weights=torch.tensor([1.0 if weights is None else weights[s.turn] for s in samples]),
        lags=torch.tensor([lags[s.policy_version] for s in samples]),
        hinted=tuple(hinted),
        loss_weight=loss_weight,
    )


def place(sequences: Sequence[Sequence[Sample]]) -> Sequences:
    """The tokens of all `sequences`, each as long as its last turn; the turns in their order."""
    turns = [(row, turn) for row, sequence in enumerate(sequences) for turn in sequence]
    return _lay_out(
        [(*sequence[-1].prompt_ids, *sequence[-1].completion_ids) for sequence in sequences],
        [(row, len(turn.prompt_ids), len(turn.completion_ids)) for row, turn in turns],
        max(len(turn.completion_ids) for _, turn in turns),
        tuple(turn.sampling for _, turn in turns),
    )


def micro_batches(samples: Sequence[Sample], pass_tokens: int) -> list[list[list[Sample]]]:
    """The samples' sequences, in groups of at most `pass_tokens` padded tokens.

    A group has sequences of similar length, so that little is padded. A longer sequence is alone.
    """
    found = sequences_of(samples)
    return fill_passes(found, [*map(sequence_length, found)], pass_tokens)


def fill_passes(
    items: Sequence[_Item], lengths: Sequence[int], pass_tokens: int
) -> list[list[_Item]]:
    """Groups whose size times longest is at most `pass_tokens`; a longer item is alone."""
    groups: list[list[_Item]] = []
    for index in sorted(range(len(items)), key=lambda index: lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= pass_tokens:
            groups[-1].append(items[index])
        else:
            groups.append([items[index]])
    return groups


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` (B, T) over each turn's tokens, then over turns, as in TRL's grpo loss.

    `mask` (B, T) is 1 on completion tokens (arXiv 2402.03300, equation 3).
    """
    return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def turn_weights(samples: Sequence[Sample]) -> dict[str, float]:
    """How much each turn's loss counts in an update's mean over turns; 1.0 on average.

    The steps of an episode count as much as one turn of a person, each by its share of their
    tokens: so the loss is the mean over an episode's tokens, then over episodes. Otherwise long
    episodes would weigh more.

    >>> step = Sample("a", "e", 0, (1,), (2,), (-1.0,), 1, None, advantage=0.5)
    >>> longer = replace(step, turn="b", completion_ids=(2, 3, 4), behaviour_logprobs=(-1.0,) * 3)
    >>> turn_weights([step, longer, replace(step, turn="c", session="s", advantage=None)])
    {'a': 0.375, 'b': 1.125, 'c': 1.5}
    """
    units = [(s.session, "") if s.advantage is not None else (s.session, s.turn) for s in samples]
    tokens: Counter[tuple[str, str]] = Counter()
    for unit, sample in zip(units, samples, strict=True):
        tokens[unit] += len(sample.completion_ids)
    average = len(samples) / max(len(tokens), 1)
    return {
        sample.turn: average * len(sample.completion_ids) / tokens[unit]
        for unit, sample in zip(units, samples, strict=True)
    }


def sequence_length(turns: Sequence[Sample]) -> int:
    """Tokens of a sequence, which is as long as its last turn."""
    return _length(turns[-1])


def token_count(sample: Sample) -> int:
    """Tokens of the longest sequence that the sample needs: prompt or hinted prompt, and reply."""
    prompts = len(sample.prompt_ids), len(sample.hinted_prompt_ids or ())
    return max(prompts) + len(sample.completion_ids)


def pad_right(rows: Sequence[Sequence[float]], filler: float) -> tuple[Tensor, Tensor]:
    """Values and mask, both (rows, longest); an integer `filler` makes integer values."""
    width = max(map(len, rows), default=0)
    values = [list(row) + [filler] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    dtype = torch.long if isinstance(filler, int) else torch.float32
    return _matrix(values, width, dtype), _matrix(mask, width, torch.long)


def _lay_out(
    rows: Sequence[Sequence[int]],
    completions: Sequence[tuple[int, int, int]],
    width: int,
    samplings: tuple[Sampling, ...],
) -> Sequences:
    """`rows` of ids with `completions` as (row, start, length) in them; T is `width`."""
    ids, mask = pad_right(rows, PAD_ID)
    starts = torch.tensor([row * ids.size(1) + start for row, start, _ in completions])
    lengths = torch.tensor([length for _, _, length in completions])
    steps = torch.arange(width)
    completion_mask = (steps < lengths[:, None]).long()
    places = (starts[:, None] + steps) * completion_mask
    return Sequences(ids, mask, places, completion_mask, samplings)


def _extends(sample: Sample, earlier: Sample) -> bool:
    if sample.session != earlier.session or len(sample.prompt_ids) < _length(earlier):
        return False
    cut = len(earlier.prompt_ids)
    return (
        sample.prompt_ids[:cut] == earlier.prompt_ids
        and sample.prompt_ids[cut : _length(earlier)] == earlier.completion_ids
    )


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)


def _matrix(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), width)
