"""The policy as a classifier: how likely it finds each of a few words after a prompt.

Only the first token of the answer counts. Under a grammar that allows the words alone, it can be
any token with which a word begins: a word's probability is the sum over those. So the numbers here
are those that vLLM reports for the same prompt. The weights, the optimizer, the clipping and the
precision are `PolicyTrainer`'s; the loss is the cross-entropy of the word.
"""
# pyright: basic

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from learner.config import LearnerConfig
from learner.divergence import head_logits
from learner.tensors import fill_passes
from learner.trainer import PolicyTrainer, build_trainer
from learner.trl_grpo import use_adapter
from learner.upper_layers import UpperLayers
from nextstate.errors import LearnerError
from nextstate.records import Json

_Item = TypeVar("_Item")
_Reader = Callable[[Sequence[Sequence[int]]], Tensor]
"""Gives the last states (B, L, H) of B prompts, padded on the right."""
BATCH = 8
"""Prompts of one optimizer step."""
RATE = 2e-3
"""AdamW's first rate; it falls to 0 at the last epoch."""
PATIENCE = 2
"""Training ends after so many epochs without a gain."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with the word that should follow."""

    prompt_ids: tuple[int, ...]
    label: int
    """The word's place in the list of words."""


class WordClassifier:
    """A trainer's policy that answers with one of C words."""

    def __init__(self, trainer: PolicyTrainer, words: Sequence[str]) -> None:
        """Raises LearnerError for words that begin alike, or that no token begins."""
        self.trainer = trainer
        self._tokenizer: Any = trainer.processing_class
        self._beginnings = _beginnings(self._tokenizer, words)
        self._upper = UpperLayers(trainer)

    def render(self, messages: Sequence[Json]) -> tuple[int, ...]:
        """The prompt's token ids as the engine renders them."""
        rendered = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        return tuple(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        done: Callable[[int], object],
        *,
        base: bool = False,
    ) -> list[list[float]]:
        """The words' log-probs after each prompt, normalised over the words; of the `base` alone.

        `done` gets the number of prompts that each pass has read.
        """
        self.trainer.model.eval()
        found: dict[int, list[float]] = {}
        with use_adapter(self.trainer.policy, None) if base else nullcontext():
            read = self._reader(prompts)
            for group in self._passes(range(len(prompts)), prompts):
                values = self._words([prompts[place] for place in group], read)
                found |= dict(zip(group, values.tolist(), strict=True))
                done(len(group))
        return [found[place] for place in range(len(prompts))]

    def fit(
        self,
        examples: Sequence[Example],
        watched: Sequence[Example],
        epochs: int,
        done: Callable[[int], object],
    ) -> list[float]:
        """Trains on the examples at most `epochs` times, in another order each time.

        The upper layers learn, if they can be run alone; otherwise all. It ends when the loss on
        `watched`, which is not learned from, has not fallen for `PATIENCE` epochs. Kept are the
        weights where it was least. Returns that loss in nats an example, before the first epoch and
        after each; `done` gets the number of examples that each pass has learned from. Raises
        LearnerError if a loss is not a number.
        """
        trainer = self.trainer
        order = torch.Generator().manual_seed(trainer.config.seed)
        every = [example.prompt_ids for example in (*examples, *watched)]
        read = self._reader(every)
        if read == self._upper.read:
            # The activations of these few layers take less memory than an update of the policy.
            trainer.policy.gradient_checkpointing_disable()
        losses = [self._loss(watched, read)]
        best = trainer.weights.copy()
        for epoch in range(epochs):
            groups = torch.randperm(len(examples), generator=order).split(BATCH)
            trainer.model.train()
            for step, places in enumerate(groups):
                trainer.rate = RATE * (1 - (epoch + step / len(groups)) / epochs)
                self._step([examples[place] for place in places.tolist()], read, done)
            losses.append(self._loss(watched, read))
            least = losses.index(min(losses))
            if least == epoch + 1:
                best = trainer.weights.copy()
            elif epoch + 1 - least >= PATIENCE:
                break
        trainer.weights.put(best)
        return losses

    @torch.no_grad()
    def _loss(self, examples: Sequence[Example], read: _Reader) -> float:
        """The mean loss in nats."""
        self.trainer.model.eval()
        total = 0.0
        for group in self._passes(examples, [example.prompt_ids for example in examples]):
            total += float(self._losses(group, read).sum())
        return _finite(total) / len(examples)

    def _losses(self, examples: Sequence[Example], read: _Reader) -> Tensor:
        """The loss (B) of each example."""
        values = self._words([example.prompt_ids for example in examples], read)
        labels = torch.tensor([example.label for example in examples], device=values.device)
        return nll_loss(values, labels, reduction="none")

    def _step(
        self, examples: Sequence[Example], read: _Reader, done: Callable[[int], object]
    ) -> None:
        """One step of the optimizer."""
        for group in self._passes(examples, [example.prompt_ids for example in examples]):
            part = self._losses(group, read).sum() / len(examples)
            _finite(float(part.detach()))
            self.trainer.accelerator.backward(part)
            done(len(group))
        self.trainer.optimizer_step()

    def _reader(self, prompts: Sequence[Sequence[int]]) -> _Reader:
        """How the prompts are read: by the upper layers if these suffice."""
        suffice = bool(prompts) and self._upper.suffice(prompts[0])
        return self._upper.read if suffice else self._upper.read_whole

    def _passes(
        self, items: Sequence[_Item], prompts: Sequence[Sequence[int]]
    ) -> list[list[_Item]]:
        lengths = [len(prompt) for prompt in prompts]
        return fill_passes(items, lengths, self.trainer.config.micro_batch_tokens)

    def _words(self, prompts: Sequence[Sequence[int]], read: _Reader) -> Tensor:
        """Log-probs (B, C) of the words after B prompts."""
        states = read(prompts)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=states.device)
        last = states[torch.arange(len(prompts), device=states.device), ends]
        head = self.trainer.head
        values: list[Tensor] = []
        for tokens in self._beginnings:
            bias = None if head.bias is None else head.bias[tokens]
            part = replace(head, weight=head.weight[tokens], bias=bias)
            values.append(head_logits(last, part).logsumexp(-1))
        return torch.stack(values, dim=-1).log_softmax(-1)


def build_classifier(
    config: LearnerConfig, model_path: str, work_dir: Path, words: Sequence[str]
) -> WordClassifier:
    """A classifier with a fresh adapter. Raises StartError, ConfigError and LearnerError."""
    return WordClassifier(build_trainer(config, model_path, work_dir), words)


@contextmanager
def within_memory() -> Generator[None]:
    """Turns an error for want of the GPU's memory inside the block into a LearnerError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LearnerError(
            f"the judge's training did not fit: {str(error).split('. ')[0]}; end `nextstate up` "
            'meanwhile, or set [learner] device = "cpu"'
        ) from error


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise LearnerError(f"the judge's loss is {loss}: nothing is kept")
    return loss


def _beginnings(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """For each word the tokens with which it can begin."""
    found: list[list[int]] = [[] for _ in words]
    for token, number in tokenizer.get_vocab().items():
        meant = [place for place, word in enumerate(words) if token and word.startswith(token)]
        if len(meant) > 1:
            raise LearnerError(f"the token {token!r} begins several of the words {list(words)}")
        if meant:
            found[meant[0]].append(number)
    if not all(found):
        raise LearnerError(f"no token of this model begins one of the words {list(words)}")
    return [sorted(tokens) for tokens in found]
