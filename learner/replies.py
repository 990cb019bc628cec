"""Replies that a model makes itself, several tokens to a forward pass.

Each token of a reply is a choice made from the logits before it. One pass over a whole draft makes
every choice at once; a choice is right if all tokens before it are, and the others are the next
pass's draft (Jacobi decoding, arXiv 2305.10427). A pass makes at least one more token right: the
replies are those of one token at a time, in no more passes, and in one if the draft was right.

A sampled token is a choice as well: the largest of logit plus Gumbel noise, which is a draw from
their softmax. The noise belongs to seed, prompt and place. So a reply is a function of the weights,
and the reply by a version's parent is a good draft of its own. Where a reply leaves its draft, it
is guessed to go on as other replies did after the same tokens (as in arXiv 2304.04487).
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from learner.batch import PAD_ID

_PASS_LOGITS = 128
"""Rows of logits that one pass makes, at most: each is as wide as the vocabulary."""
_AHEAD = 8
"""Tokens of each reply that a pass reads once a draft was wrong. On a CPU each costs time, and few
more are ever right."""
_PHRASES = (4, 2)
"""So many tokens must be the same for a reply to go on as another did; the most count first."""
_BEGINNING = -1
"""Stands for the token before a reply's first."""


@torch.no_grad()
def answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: frozenset[int],
    *,
    most_tokens: int,
    seed: int,
    drafts: Sequence[Sequence[int]] = (),
    others: Sequence[Sequence[int]] = (),
) -> list[list[int]] | None:
    """A greedy reply to each of N prompts, then a sampled one to each, without their ends.

    `drafts` are guesses at them in this order, and `others` are replies that they may resemble; how
    long it takes is all that depends on either. None as soon as a logit that decides a token is not
    a number. All are decoded together: that takes hardly longer.
    """
    count, device = len(prompts), model.device
    passes = _Passes(model, [*prompts, *prompts], most_tokens)
    phrases = Phrases([reply[:most_tokens] for reply in (*drafts, *others)])
    most_ahead = max(1, _PASS_LOGITS // (2 * count)) if passes.may_read_ahead else 1
    ahead = most_ahead
    end_ids = torch.tensor(sorted(ends), device=device)
    said = torch.full((2 * count, most_tokens), PAD_ID, device=device)
    for row, draft in zip(said, drafts, strict=False):
        row[: len(draft)] = torch.tensor(draft[:most_tokens], device=device)
    right = torch.zeros(2 * count, dtype=torch.long, device=device)
    is_open = torch.ones_like(right, dtype=torch.bool)
    while is_open.any():
        start = int(right[is_open].min())
        stop = min(start + ahead, most_tokens)
        logits = passes.logits(said, start, stop)
        # The largest is not a number if any is not; a token may well be masked with -inf.
        finite = torch.isfinite(logits.max(dim=2).values)
        logits[count:] += torch.stack(
            [gumbel_noise(logits, (seed, *prompt), start, stop) for prompt in prompts]
        )
        guessed = said[:, start:stop]
        # What was right stays: a pass of another width may round otherwise.
        stays = torch.arange(start, stop, device=device) < right[:, None]
        chosen = torch.where(stays, guessed, logits.argmax(dim=2))
        is_end = torch.isin(chosen, end_ids)
        goes_on = (chosen == guessed) & ~is_end
        is_right = pad(goes_on[:, :-1].long().cumprod(dim=1), (1, 0), value=1).bool()
        is_right &= is_open[:, None]
        if not finite[is_right].all():
            return None
        said[:, start:stop] = chosen
        right = torch.maximum(right, start + is_right.sum(dim=1))
        is_open &= ~(is_end & is_right).any(dim=1) & (right < most_tokens)
        ahead = min(_AHEAD, most_ahead)
        if ahead > 1:
            _guess(said, right, is_open & (right < stop), phrases)
    return [up_to_end(row, ends) for row in said.tolist()]


def _guess(said: Tensor, right: Tensor, astray: Tensor, phrases: Phrases) -> None:
    """Writes into the rows `astray` of the replies `said` (R, T) how they may go on."""
    for row in astray.nonzero()[:, 0].tolist():
        known = int(right[row])
        tail = phrases.after(said[row, :known].tolist())[: said.size(1) - known]
        said[row, known : known + len(tail)] = torch.tensor(tail, device=said.device)


class Phrases:
    """How some replies went on after the same tokens; a reply's beginning counts as a token."""

    def __init__(self, replies: Sequence[Sequence[int]]) -> None:
        self._places: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}
        for reply in replies:
            tokens = (_BEGINNING, *reply)
            for size in _PHRASES:
                for end in range(size, len(tokens)):
                    self._places.setdefault(tokens[end - size : end], (reply, end - 1))

    def after(self, begun: Sequence[int]) -> Sequence[int]:
        """What followed in the first reply that has the last tokens of one that has begun so."""
        tokens = (_BEGINNING, *begun)
        for size in _PHRASES:
            if found := self._places.get(tokens[-size:]):
                reply, place = found
                return reply[place:]
        return ()


class _Passes:
    """Forward passes over prompts and the replies to them, which read nothing twice."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], most_tokens: int) -> None:
        width = max(map(len, prompts))
        padded = [[PAD_ID] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        real = [[0] * (width - len(p)) + [1] * (len(p) + most_tokens) for p in prompts]
        self._model = model
        self._prompts = torch.tensor(padded, device=model.device)
        self._mask = torch.tensor(real, device=model.device)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._cache: Any = croppable_cache(model)
        self.may_read_ahead = self._cache is not None
        """Whether what was read of a draft can be forgotten again."""
        self._has_read = 0
        # The last positions' logits are a fraction of all that a long prompt has.
        known = signature(model.get_base_model().forward).parameters
        self._can_keep = "logits_to_keep" in known

    def logits(self, said: Tensor, start: int, stop: int) -> Tensor:
        """(R, stop - start, V) float32, which decide these tokens of the replies `said` (R, T).

        Tokens before `start` are those of the passes before, of rows that matter.
        """
        width = self._prompts.size(1)
        begin, end = (width + start - 1 if self._has_read else 0), width + stop - 1
        if self._has_read > begin:
            self._cache.crop(begin - self._has_read)
        options = {"logits_to_keep": stop - start} if self._can_keep else {}
        made = self._model(
            input_ids=torch.cat([self._prompts, said], dim=1)[:, begin:end],
            attention_mask=self._mask[:, :end],
            position_ids=self._positions[:, begin:end],
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
        self._cache, self._has_read = made.past_key_values, end
        return made.logits[:, start - stop :].float()


def croppable_cache(model: Any) -> DynamicCache | None:
    """An empty cache from which tokens can be taken away again; None if the model has no such one.

    A recurrent state cannot go back, and a sliding window has dropped what it would go back to.
    """
    cache = DynamicCache(config=model.config)
    goes_back = all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache if goes_back and not model.get_base_model()._is_stateful else None


def gumbel_noise(like: Tensor, of: tuple[int, ...], start: int, stop: int) -> Tensor:
    """(stop - start, V) standard Gumbel noise of these places, for logits `like` (..., V).

    Each place's is drawn by itself: it does not depend on which others are asked for.
    """
    draw = torch.Generator(like.device)
    noise = like.new_empty(stop - start, like.size(-1))
    for row, place in zip(noise, range(start, stop), strict=True):
        row.exponential_(generator=draw.manual_seed(hash((place, *of))))
    return -noise.log()


def up_to_end(reply: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The reply before the first token that ends it."""
    for at, token in enumerate(reply):
        if token in ends:
            return list(reply[:at])
    return list(reply)
