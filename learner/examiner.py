"""What a candidate version does to held-out turns and to recorded prompts, measured by the trainer.

What a version that passed said is its successor's parent's: a candidate costs one forward pass over
the held-out turns, and a new held-out turn two more; its replies take few passes more, as its
parent's are drafts of them. What the parent must be asked is asked before the step.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from learner.batch import fill_passes, micro_batches, place, token_count
from learner.config import LearnerConfig
from learner.gate import Canaries, Measured, is_broken, ranking
from learner.replies import answers
from learner.trainer import PolicyTrainer
from learner.trl_grpo import use_adapter
from nextstate.records import Sample

Logprobs = dict[str, Tensor]
"""Log-probabilities (T,) of completions by their turn, float32 on the CPU, nats."""
Replies = dict[tuple[int, ...], Sequence[Sequence[int]]]
"""A greedy and a sampled reply by their prompt, without ends."""


class Examiner:
    """Measures candidates of one trainer, each against the version that its step started from."""

    def __init__(self, config: LearnerConfig, trainer: PolicyTrainer) -> None:
        self._config = config
        self._trainer = trainer
        self._held: list[Sample] = []
        self._recorded: list[Sample] = []
        self._prompts: list[tuple[int, ...]] = []
        self._parent: int | None = None
        self._of_base: Logprobs = {}
        self._of_parent: Logprobs = {}
        self._of_candidate: Logprobs = {}
        self._parents_replies: Replies = {}
        self._candidates_replies: Replies = {}
        self._norms: dict[str, Tensor] = {}

    def prepare(self, held: Sequence[Sample], batch: Sequence[Sample], parent: int) -> None:
        """Asks the version whose weights the trainer has now, before it takes a step on `batch`.

        It reads the held-out turns and replies to recorded prompts.
        """
        self._held = [s for s in held if token_count(s) <= self._config.max_tokens]
        if parent != self._parent:
            self._of_parent, self._parents_replies = {}, {}
        self._parent = parent
        turns = [sample.turn for sample in self._held]
        self._of_base = {t: self._of_base[t] for t in turns if t in self._of_base}
        self._of_parent = {t: self._of_parent[t] for t in turns if t in self._of_parent}
        with use_adapter(self._model, None):
            self._of_base |= self._logprobs([s for s in self._held if s.turn not in self._of_base])
        self._of_parent |= self._logprobs([s for s in self._held if s.turn not in self._of_parent])
        self._recorded = [*self._held, *batch]
        self._prompts = canary_prompts(self._held or batch, self._config.gate_canaries)
        known = self._parents_replies
        self._parents_replies = {p: known[p] for p in self._prompts if p in known}
        self._parents_replies |= self._replies([p for p in self._prompts if p not in known])

    def measure(self) -> Measured:
        """What the trainer's weights are now, after the step that was prepared for.

        The divergences are the larger of those on held-out turns and those that the trainer has
        measured on the batch: from the parent, and of the parent from the base, where the loss has
        that term. The turns that trained are fresh, and what the policy says now is better seen
        there.
        """
        self._of_candidate = self._logprobs(self._held)
        self._candidates_replies = self._replies(self._prompts)
        metrics = self._trainer.metrics
        return Measured(
            weight_change=weight_change(self._model, self._norms),
            kl_parent=self._divergence(self._of_parent, self._of_candidate, metrics.get("step/kl")),
            kl_base=self._divergence(self._of_candidate, self._of_base, metrics.get("kl/base")),
            ranking=ranking(
                [(s.session, s.score * self._change(s.turn)) for s in self._held if s.score]
            ),
            canaries=self._looked_at(self._candidates_replies),
            parents_canaries=self._looked_at(self._parents_replies),
        )

    def accept(self, number: int) -> None:
        """The candidate measured last is the version `number`, and the next one's parent."""
        self._parent, self._of_parent = number, self._of_candidate
        self._parents_replies = self._candidates_replies

    @property
    def _model(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    def _change(self, turn: str) -> float:
        return float((self._of_candidate[turn] - self._of_parent[turn]).mean())

    def _divergence(self, old: Logprobs, new: Logprobs, on_trained: float | None) -> float | None:
        if not self._held:
            return on_trained
        recorded = torch.cat([torch.tensor(s.behaviour_logprobs) for s in self._held])
        turns = [sample.turn for sample in self._held]
        found = divergence(
            torch.cat([old[t] for t in turns]),
            torch.cat([new[t] for t in turns]),
            recorded,
            self._config.ratio_cap,
        )
        # In this order, so that what is not a number stays.
        return found if on_trained is None or not found <= on_trained else on_trained

    @torch.no_grad()
    def _logprobs(self, samples: Sequence[Sample]) -> Logprobs:
        found: Logprobs = {}
        device = self._trainer.args.device
        for sequences in micro_batches(samples, self._config.micro_batch_tokens):
            self._trainer.before_micro_batch()
            turns = [turn for sequence in sequences for turn in sequence]
            rows = self._trainer.completion_logprobs(place(sequences).to(device)).float().cpu()
            for sample, row in zip(turns, rows, strict=True):
                found[sample.turn] = row[: len(sample.completion_ids)].clone()
        return found

    def _replies(self, prompts: Sequence[tuple[int, ...]]) -> Replies:
        """Replies to the prompts, one greedy and one sampled each; always drawn alike.

        Those are missing that a logit which was not finite would have decided.
        """
        model, config = self._model, self._config
        rows = [2 * (len(prompt) + config.gate_canary_tokens) for prompt in prompts]
        replies: Replies = {}
        was_training = model.training
        model.eval()  # or checkpointing of gradients would turn the cache off
        try:
            for group in fill_passes(prompts, rows, config.micro_batch_tokens):
                self._trainer.before_micro_batch()
                with self._trainer.accelerator.autocast():
                    replies |= self._replies_to(group)
        finally:
            model.train(was_training)
        return replies

    def _replies_to(self, prompts: Sequence[tuple[int, ...]]) -> Replies:
        known: Replies = {s.prompt_ids: (s.completion_ids,) * 2 for s in self._recorded}
        known |= self._parents_replies
        drafts = [known[prompt] for prompt in prompts]
        found = answers(
            self._model,
            prompts,
            end_ids(self._trainer),
            most_tokens=self._config.gate_canary_tokens,
            seed=self._config.seed,
            drafts=[greedy for greedy, _ in drafts] + [sampled for _, sampled in drafts],
            others=[sample.completion_ids for sample in self._recorded],
        )
        if found is None:
            return {}
        pairs = zip(found[: len(prompts)], found[len(prompts) :], strict=True)
        return dict(zip(prompts, pairs, strict=True))

    def _looked_at(self, replies: Replies) -> Canaries | None:
        """What the gate sees of replies to the prompts; None without any prompt."""
        if not self._prompts:
            return None
        broken = sum(is_broken(reply) for pair in replies.values() for reply in pair)
        # There are fewer where a logit was not finite.
        return Canaries(2 * len(self._prompts), broken, finite=len(replies) == len(self._prompts))


def divergence(old: Tensor, new: Tensor, recorded: Tensor, cap: float) -> float:
    """KL(old ‖ new) in nats a token, from log-probabilities (N,) of tokens that `recorded` drew.

    Each token's estimate, as in `learner.metrics.policy_change`, is weighted by old / recorded, cut
    off at `cap`: a token that `old` would hardly draw hardly counts.
    """
    difference = new - old
    weight = (old - recorded).exp().clamp(max=cap)
    return float((weight * (difference.exp() - difference - 1)).mean())


def weight_change(model: torch.nn.Module, norms: dict[str, Tensor]) -> float:
    """Largest ‖scale · B·A‖ / ‖W‖ over the adapted layers, Frobenius norms.

    ‖B·A‖² is the sum of (BᵀB) ∘ (AAᵀ), which are as small as the rank. It bounds how much a layer's
    output can change by how much the layer does, whatever the model's scale. `norms` remembers ‖W‖
    by layer: it never changes, and reading all of a large model takes seconds.
    """
    found = torch.zeros(())
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        a = layer.lora_A["default"].weight.detach().float()
        b = layer.lora_B["default"].weight.detach().float()
        product = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt() * layer.scaling["default"]
        if name not in norms:
            weight = dequantize_module_weight(layer.get_base_layer()).detach()
            norms[name] = torch.linalg.vector_norm(weight, dtype=torch.float32)
        found = torch.maximum(found, (product / norms[name]).cpu())  # keeps what is not a number
    return float(found)


def canary_prompts(samples: Sequence[Sample], count: int) -> list[tuple[int, ...]]:
    """The `count` shortest prompts among the samples, each once: the cheapest to answer."""
    return sorted({sample.prompt_ids for sample in samples}, key=lambda p: (len(p), p))[:count]


def end_ids(trainer: PolicyTrainer) -> frozenset[int]:
    """The tokens with which the model ends a reply."""
    found = trainer.accelerator.unwrap_model(trainer.model).generation_config.eos_token_id
    listed = found if isinstance(found, list) else [found]
    of_tokenizer: Any = trainer.processing_class
    return frozenset(id_ for id_ in (*listed, of_tokenizer.eos_token_id) if id_ is not None)
