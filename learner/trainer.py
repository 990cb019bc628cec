"""TRL's GRPO trainer, fed with recorded samples: `PolicyTrainer.update` is one whole update.

The loss, AdamW, the clipping of gradients and the precision are TRL's and transformers'. Ours are
the batch, the log-probabilities of teacher and base, the advantages, the check that engine and
learner agree, and the bound on a step. `GRPOTrainer.train` is never called. Of TRL's private
methods `_compute_loss` is called and `_get_per_token_logps_and_entropies` is overridden: hence the
exact TRL pin and the parity test.
"""
# pyright: basic

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from learner.advantages import SIGNALS, teacher_gap, token_advantages
from learner.config import LearnerConfig
from learner.divergence import (
    TopTokens,
    head_of,
    top_tokens,
    topk_divergence,
)
from learner.divided import join_passes
from learner.drift import drift_objection
from learner.full_weights import FullWeights
from learner.kl import kl_divergence
from learner.likelihood import TokenLogprobs, completion_logprobs
from learner.metrics import (
    TokenStats,
    drift,
    join,
    raw_drift,
    token_metrics,
    unexplained_drift,
)
from learner.model import causal_model, load_model, load_tokenizer, lora_config
from learner.ranks import Ranks
from learner.step_size import MAX_TRIES, fit_step, longest_way, step_bound
from learner.tensors import Batch, Sequences, collate, micro_batches, token_mean, turn_weights
from learner.trl_grpo import GRPOTrainer, grpo_config
from learner.weights import LoraWeights, Snapshot, Weights, copied
from nextstate.errors import LearnerError
from nextstate.records import Sample
from nextstate.sampling import Sampling


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one update did."""

    before: Snapshot
    """The state that the update started from: restore it to undo the update."""
    metrics: Mapping[str, float]
    """Numbers with `area/what` names. `step/kl` is the measured change, in nats a token."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """The result of one forward pass over B completions."""

    logprobs: TokenLogprobs
    aux_loss: Tensor | None
    """The load-balancing loss of a mixture of experts."""
    states: Tensor
    """(R, L, H): the last layer's output, before the head"""


@dataclass(slots=True)
class _MicroBatch:
    """B turns of an update, prepared once for all of its optimizer steps."""

    batch: Batch
    inputs: dict[str, Any]
    """What TRL's loss reads."""
    gap: Tensor
    """(B, T): the teacher's clipped gap, 0 without a hint"""
    top: Sequence[TopTokens]
    """The teacher's likeliest tokens, one item for each of its passes."""
    before: Tensor | None = None
    """(B, T): the policy's log-probabilities before the update, under each turn's sampler"""

    @property
    def teaches(self) -> bool:
        """False if the pull to the base is all that its gradient has."""
        return bool(self.batch.hinted) or bool(self.inputs["advantages"].any())


class PolicyTrainer(GRPOTrainer):
    """Trains LoRA weights on a frozen base, or all weights; see the module."""

    def __init__(
        self,
        config: LearnerConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        work_dir: Path,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.signals = SIGNALS[config.method]
        self.before_pass: Callable[[], None] = lambda: None
        """Called before the passes over a micro-batch; may wait while the machine is needed."""
        self.engine_dtype = "float32"
        """The precision in which the engine computes."""
        self._scored: _Scored
        """The policy's forward pass over the micro-batch whose loss TRL computes."""
        super().__init__(
            model=model,
            args=grpo_config(config, model, work_dir),
            # TRL requires both. Neither is used: samples come through `update`.
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": ""}] * 2),
            processing_class=tokenizer,
            # With a PeftModel instead of a configuration, TRL's reference would be a frozen copy of
            # the adapter, which changes with every restart. This way the reference is the base.
            peft_config=None if config.trains_all else lora_config(config),
        )
        self.beta = config.kl_coef
        self.policy: Any = self.accelerator.unwrap_model(self.model)
        """The peft model, or the model itself if all of it is trained."""
        kind = FullWeights if config.trains_all else LoraWeights
        self.weights: Weights = kind(self.policy, config, autocast=self.args.bf16)
        self.trained: list[torch.nn.Parameter] = [
            weight for weight in self.policy.parameters() if weight.requires_grad
        ]
        if self.args.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        self.create_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.current_gradient_accumulation_steps = 1  # TRL's loss divides by it
        self.head = head_of(self.policy)
        if config.divided:
            join_passes(self)

    def update(self, samples: Sequence[Sample], lags: Mapping[int, int]) -> UpdateResult:
        """Takes the optimizer steps of one update on the samples.

        `lags`: for each policy version among the samples, the updates between it and the present
        weights. Raises LearnerError where a step must not be taken; then nothing has changed.
        """
        before = self.snapshot()
        self.ranks.tell((samples, lags, before))
        return self._update_or_restore(samples, lags, before)

    def follow(self) -> None:
        """Takes part in each update of rank 0, from its state. Raises EOFError at the end."""
        while True:
            samples, lags, before = self.ranks.receive()
            self.restore(before)
            with suppress(LearnerError):  # raised on every rank: rank 0 says what follows from it
                self._update_or_restore(samples, lags, before)

    def _update_or_restore(
        self, samples: Sequence[Sample], lags: Mapping[int, int], before: Snapshot
    ) -> UpdateResult:
        try:
            return self._update(samples, lags, before)
        except (LearnerError, torch.OutOfMemoryError):
            self.model.zero_grad()
            self.restore(before)
            raise

    def _update(
        self, samples: Sequence[Sample], lags: Mapping[int, int], before: Snapshot
    ) -> UpdateResult:
        started = time.perf_counter()
        scores = [sample.quality for sample in samples]
        bound = step_bound(scores, self.config)
        micros: list[_MicroBatch] = []

        def prepare() -> list[bool]:
            micros.extend(self._prepare(samples, lags, self.ranks.mine(samples)))
            return [micro.teaches for micro in micros]

        teaches = any(self.ranks.all(prepare))
        found: dict[str, float] = {}
        for epoch in range(1, self.config.epochs + 1):
            parts = self.ranks.all(lambda: [self._backward(micro) for micro in micros])
            self.ranks.sum_gradients(self.trained)
            if epoch == 1:
                tokens = join([tokens for _, tokens in parts])
                self._refuse_drift(tokens)
                found = token_metrics(tokens, self.config.step_kl)
            rate, most = self.rate, 1.0
            if teaches and not self.config.learning_rate:
                most = longest_way(rate, first=not self.optimizer.state)
            grad_norm = self.ranks.together(self.optimizer_step)
            share = (epoch / self.config.epochs) ** 2  # of the change: its root grows evenly
            kl, length = self._fit_step(before, micros, share * bound, most)
            found |= {
                "loss": float(sum(loss for loss, _ in parts)),
                "grad/norm": grad_norm,
                "step/kl": kl,
                "step/length": length,
                "step/rate": rate * length,
            }
        self.ranks.require_equal(self.trained)
        return UpdateResult(
            before,
            {
                **found,
                "score/mean": sum(scores) / len(scores),
                "batch/size": len(samples),
                "step/bound": bound,
                "step/seconds": time.perf_counter() - started,
            },
        )

    def try_batch(self, rows: int, tokens: int) -> None:
        """One forward and backward pass over a micro-batch of that size, without a trace.

        It raises whatever torch raises where memory is too small.
        """
        reply = (1,) * (tokens - 1)
        heavy = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
        one = Sample("", "", 0, (1,), reply, (-1.0,) * len(reply), 1, (1,), heavy)
        samples = [replace(one, turn=str(row), session=str(row)) for row in range(rows)]
        self.gradient(samples, {0: 0})
        self.model.zero_grad()

    def gradient(self, samples: Sequence[Sample], lags: Mapping[int, int]) -> None:
        """Adds the gradient of the samples' loss; takes no step."""
        for micro in self._prepare(samples, lags, samples):
            self._backward(micro)

    def _prepare(
        self, samples: Sequence[Sample], lags: Mapping[int, int], share: Sequence[Sample]
    ) -> list[_MicroBatch]:
        """A share of the samples as micro-batches, read by the teacher and by the base."""
        weights = turn_weights(samples)
        found: list[_MicroBatch] = []
        for sequences in micro_batches(share, self.config.micro_batch_tokens):
            self.before_pass()
            batch = collate(
                sequences,
                lags=lags,
                signals=self.signals,
                pass_tokens=self.config.micro_batch_tokens,
                weights=weights,
                loss_weight=sum(map(len, sequences)) / len(samples),
            )
            found.append(self._prepared(batch.to(self.args.device)))
        return found

    @torch.no_grad()
    def _prepared(self, batch: Batch) -> _MicroBatch:
        mask = batch.completion_mask
        gap, top = self._teach(batch)
        reference = None
        if self.beta != 0.0:
            with self.weights.base():
                reference = self._score(batch.sequences).logprobs.whole
        inputs = {
            # TRL joins prompts and completions for its own forward pass, which ours replaces.
            "prompt_ids": mask[:, :0],
            "prompt_mask": mask[:, :0],
            "completion_ids": batch.sequences.completion_ids,
            "completion_mask": mask,
            "num_items_in_batch": mask.sum(),
            "ref_per_token_logps": reference,
            # A turn's weight is that of its loss, which is linear in the advantage.
            "advantages": batch.weights[:, None]
            * token_advantages(batch.scores, gap, mask, self.signals, self.config.teacher_gap_clip),
        }
        return _MicroBatch(batch, inputs, gap, top)

    def _backward(self, micro: _MicroBatch) -> tuple[Tensor, TokenStats]:
        """Adds the micro-batch's part to the gradient. Returns its part of the loss."""
        self.before_pass()
        self.model.train()
        batch = micro.batch
        self._scored = self._score(batch.sequences)
        logprobs = self._scored.logprobs
        # Log M belongs to the policy's side of the ratio, with its gradient. It stands on the other
        # side because TRL uses one tensor for the ratio and for the KL to the base, and that KL is
        # one of whole distributions.
        behaviour = batch.behaviour_logprobs + logprobs.kept
        inputs = {**micro.inputs, "old_per_token_logps": behaviour}
        loss = self._compute_loss(self.model, inputs)
        divergence = None
        if self.signals.topk != 0:
            divergence = self._divergence(batch, self._scored.states, micro.top)
            weighted = batch.weights[:, None] * divergence
            loss = loss + self.signals.topk * token_mean(weighted, batch.completion_mask)
        loss = loss * batch.loss_weight
        del self._scored  # otherwise the last layer's states stay in memory
        self.accelerator.backward(loss)
        self._metrics["train"].clear()  # TRL collects them for its own log
        if micro.before is None:
            micro.before = logprobs.sampled.detach()
        return loss.detach(), _token_stats(micro, logprobs, divergence)

    def optimizer_step(self) -> float:
        """Clips the gradient, takes one step with it and returns its norm before clipping."""
        norm: Any = self.accelerator.clip_grad_norm_(
            self.model.parameters(), self.args.max_grad_norm
        )
        self.optimizer.step()
        self.model.zero_grad()
        self.state.global_step += 1
        return float(norm)

    @torch.no_grad()
    def _fit_step(
        self, before: Snapshot, micros: Sequence[_MicroBatch], limit: float, most: float
    ) -> tuple[float, float]:
        """Makes the way from `before` as long as `limit` allows; see `learner/step_size.py`.

        Returns the change, in nats a token of the update, and how many times as long the way is
        now. The next step's rate follows.
        """
        kl, length = fit_step(
            lambda: self._kl_since(micros),
            lambda factor: self.weights.scale_way(before.weights, factor),
            limit,
            most,
        )
        # If it is not a number, the gate rejects the version.
        if math.isfinite(kl) and kl > limit:
            raise LearnerError(
                f"the step changes the policy by {kl:g} nats a token even after it was shortened "
                f"{MAX_TRIES} times, over the {limit:g} of [learner] step_kl, and is not kept: "
                "raise it"
            )
        if not self.config.learning_rate:
            self.rate *= length
        return kl, length

    def _kl_since(self, micros: Sequence[_MicroBatch]) -> float:
        """KL(policy before the update ‖ policy now), in nats a token of the update."""

        def read(micro: _MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
            assert micro.before is not None
            self.before_pass()
            mask = micro.batch.completion_mask.bool()
            now = self.completion_logprobs(micro.batch.sequences)
            return micro.before[mask], now[mask], micro.batch.behaviour_logprobs[mask]

        parts = self.ranks.all(lambda: [read(micro) for micro in micros])
        return kl_divergence(*map(torch.cat, zip(*parts, strict=True)))

    @property
    def rate(self) -> float:
        """AdamW's rate. Where it is found, the optimizer's state in a checkpoint keeps it."""
        return self.optimizer.param_groups[0]["lr"]

    @rate.setter
    def rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def _refuse_drift(self, tokens: TokenStats) -> None:
        """Raises LearnerError if engine and learner disagree about the same weights."""
        measured, compared = drift(tokens), "for the same version"
        if measured is None:
            measured = unexplained_drift(tokens, self.config.step_kl)
            compared = "more than [learner] step_kl lets the steps in between explain"
        precision = str(self.policy.dtype).removeprefix("torch.")
        if self.config.quantization != "none":
            precision = self.config.quantization
        reason = drift_objection(
            measured, compared, raw_drift(tokens), self.config, precision, self.engine_dtype
        )
        if reason is not None:
            raise LearnerError(reason)

    def _teach(self, batch: Batch) -> tuple[Tensor, list[TopTokens]]:
        """The teacher's clipped gap (B, T), 0 without a hint, and its top tokens for each pass."""
        gap, top = torch.zeros_like(batch.behaviour_logprobs), []
        is_base = self.config.teacher == "base"
        with self.weights.base() if is_base else nullcontext():
            for hinted in batch.hinted:
                read = hinted.sequences.sharper(self.config.teacher_temperature)
                scored = self._score(read)
                behaviour = batch.behaviour_logprobs[hinted.turns]
                limit = self.config.teacher_gap_clip
                gap[hinted.turns] = teacher_gap(scored.logprobs.sampled, behaviour, limit)
                if self.signals.topk != 0:
                    every = torch.arange(len(hinted.turns), device=gap.device)
                    states = read.predicting(scored.states, every)
                    top.append(
                        top_tokens(states, self.head, self.config.topk, read.divisors(every))
                    )
        return gap, top

    def _divergence(self, batch: Batch, states: Tensor, top: Sequence[TopTokens]) -> Tensor:
        """KL(policy ‖ teacher) (B, T) on the teacher's top tokens, 0 without a hint."""
        found = torch.zeros_like(batch.behaviour_logprobs)
        for hinted, tokens in zip(batch.hinted, top, strict=True):
            at = batch.sequences.predicting(states, hinted.turns)
            mask = hinted.sequences.completion_mask.bool()
            temperature = batch.sequences.divisors(hinted.turns)
            values = topk_divergence(at, self.head, tokens, temperature).to(found.dtype)
            found[hinted.turns] = torch.zeros_like(found[hinted.turns]).masked_scatter(mask, values)
        return found

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> Any:
        # TRL's loss asks for its own forward pass, whose rows are turns. Our rows are sequences.
        # It wants entropies for its log only, which is thrown away.
        whole = self._scored.logprobs.whole
        return whole, -whole.detach(), self._scored.aux_loss

    def _score(self, sequences: Sequences) -> _Scored:
        """One forward pass, with the logits of one chunk of tokens at a time."""
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = self.read(sequences.ids, sequences.mask, **extra)
        states, aux_loss = outputs.last_hidden_state, None
        if self.aux_loss_enabled:
            text = self.policy.config.get_text_config()
            aux_loss: Any = load_balancing_loss_func(
                outputs.router_logits, text.num_experts, text.num_experts_per_tok, sequences.mask
            )
        return _Scored(completion_logprobs(states, self.head, sequences), aux_loss, states)

    def read(self, ids: Tensor, mask: Tensor, **extra: Any) -> Any:
        """One forward pass over R sequences, both (R, L), without the head."""
        backbone = causal_model(self.policy).base_model
        with self.accelerator.autocast():
            return backbone(input_ids=ids, attention_mask=mask, use_cache=False, **extra)

    def completion_logprobs(self, sequences: Sequences) -> Tensor:
        """Log-probabilities (B, T) of the completions in nats, each under its own sampler."""
        return self._score(sequences).logprobs.sampled

    def snapshot(self) -> Snapshot:
        """A copy of everything that the next update depends on."""
        devices = [torch.cuda.get_rng_state()] if self.args.device.type == "cuda" else []
        training = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.state.global_step,
            "rng": torch.get_rng_state(),
            "device_rng": devices,
        }
        return Snapshot(self.weights.copy(), copied(training))

    def restore(self, snapshot: Snapshot) -> None:
        """Continues from the snapshot, which stays as it is."""
        self.weights.put(snapshot.weights)
        self.restore_training(snapshot.training)

    def restore_training(self, training: Mapping[str, Any]) -> None:
        """Restores `Snapshot.training` and leaves the weights as they are."""
        self.optimizer.load_state_dict(copied(training["optimizer"]))
        if self.config.learning_rate:
            self.rate = self.config.learning_rate
        self.state.global_step = training["step"]
        torch.set_rng_state(training["rng"])
        for rng in training["device_rng"][: int(self.args.device.type == "cuda")]:
            torch.cuda.set_rng_state(rng)

    def forget_moments(self) -> None:
        """Empties AdamW's state: its moments belong to weights that are no longer trained."""
        self.optimizer.state.clear()


def _token_stats(
    micro: _MicroBatch, logprobs: TokenLogprobs, divergence: Tensor | None
) -> TokenStats:
    batch = micro.batch
    mask = batch.completion_mask.bool()
    taught = mask & batch.has_teacher[:, None]
    reference, kept = micro.inputs["ref_per_token_logps"], logprobs.kept.detach()
    return TokenStats(
        policy=logprobs.sampled.detach()[mask].float().cpu(),
        raw=logprobs.raw[mask].float().cpu(),
        behaviour=batch.behaviour_logprobs[mask].cpu(),
        advantage=micro.inputs["advantages"][mask].float().cpu(),
        lag=batch.lags[:, None].expand_as(mask)[mask].cpu(),
        gap=micro.gap[taught].float().cpu(),
        # The difference from the policy is that of whole distributions.
        reference=None if reference is None else (reference - kept)[mask].float().cpu(),
        divergence=None if divergence is None else divergence.detach()[taught].float().cpu(),
    )


def build_trainer(
    config: LearnerConfig, model_path: str, work_dir: Path, ranks: Ranks | None = None
) -> PolicyTrainer:
    """A trainer with a fresh adapter. Raises StartError or ConfigError, naming the key to fix."""
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    if config.threads:
        torch.set_num_threads(config.threads)
    load = partial(load_model, config, model_path)
    model = ranks.in_turn(load) if ranks and config.divided else load()
    return PolicyTrainer(config, model, load_tokenizer(model_path), work_dir, ranks)
