"""The policy as a classifier: how likely it finds each of a few words after a prompt.

Only the first token of the answer counts. Under a grammar that allows the words alone, it can be
any token with which a word begins: a word's probability is the sum over those. So the numbers here
are those that vLLM reports for the same prompt. The weights, the optimizer, the clipping and the
precision are `PolicyTrainer`'s; the loss is the cross-entropy of the word.
"""
# pyright: basic

from __future__ import annotations

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
"""AdamW's first rate; it falls to 0."""


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
        self, examples: Sequence[Example], epochs: int, done: Callable[[int], object]
    ) -> list[float]:
        """Trains on the examples `epochs` times, in another order each time.

        The upper layers learn, if they can be run alone; otherwise all. Returns each step's loss in
        nats. Raises LearnerError if it is not a number.
        """
        trainer = self.trainer
        order = torch.Generator().manual_seed(trainer.config.seed)
        chosen = [
            group.tolist()
            for _ in range(epochs)
            for group in torch.randperm(len(examples), generator=order).split(BATCH)
        ]
        trainer.model.train()
        read = self._reader([example.prompt_ids for example in examples])
        if read == self._upper.read:
            # The activations of these few layers take less memory than an update of the policy.
            trainer.policy.gradient_checkpointing_disable()
        losses: list[float] = []
        for step, places in enumerate(chosen):
            trainer.rate = RATE * (1 - step / len(chosen))
            losses.append(self._step([examples[place] for place in places], read, done))
            if not losses[-1] < float("inf"):
                raise LearnerError(
                    f"the judge's loss is {losses[-1]} at step {step + 1}: nothing is kept"
                )
        return losses

    def _step(
        self, examples: Sequence[Example], read: _Reader, done: Callable[[int], object]
    ) -> float:
        """One step of the optimizer; returns its loss."""
        loss = 0.0
        for group in self._passes(examples, [example.prompt_ids for example in examples]):
            values = self._words([example.prompt_ids for example in group], read)
            labels = torch.tensor([example.label for example in group], device=values.device)
            part = nll_loss(values, labels, reduction="sum") / len(examples)
            self.trainer.accelerator.backward(part)
            loss += float(part.detach())
            done(len(group))
        self.trainer.optimizer_step()
        return loss

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
