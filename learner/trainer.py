"""TRL's GRPO trainer, fed with recorded samples in place of its own rollouts.

One long `train()` draws updates from an iterator: each is one optimizer step over all its samples,
or several. Loss, clipping, optimizer and precision are TRL's and transformers'. What is ours: the
batch, the teacher's and the base's log-probabilities, the advantage, the check that engine and
learner agree before a step is taken, and the bound on how far an update may go. Three of the
overridden methods are private, hence the exact TRL pin and the parity test.
"""
# pyright: basic

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from learner.advantages import WEIGHTS, teacher_gap, token_advantages, usefulness
from learner.average import AverageWeights
from learner.batch import Batch, Sequences, collate, micro_batches, place
from learner.config import LearnerConfig
from learner.divergence import (
    TopTokens,
    head_of,
    require_plain_logits,
    top_tokens,
    topk_divergence,
)
from learner.drift import drift_objection
from learner.metrics import (
    TokenStats,
    drift,
    join,
    policy_change,
    token_metrics,
    unexplained_drift,
)
from learner.model import load_model, load_tokenizer, lora_config
from learner.selection import Parents, policy_lag
from learner.token_means import DR_GRPO_TOKENS, PER_TOKEN_LOSSES, token_mean
from learner.trl_grpo import GRPOConfig, GRPOTrainer, use_adapter
from nextstate.errors import LearnerError
from nextstate.records import Sample

_ENDLESS = 2**31 - 1
_MAX_CUTS = 10


@dataclass(frozen=True, slots=True)
class Update:
    """The samples of one update."""

    samples: Sequence[Sample]
    version: int
    """The version whose weights the step starts from."""
    parents: Parents = field(default_factory=dict[int, int | None])
    """Each version's parent."""

    @property
    def lags(self) -> dict[int, int]:
        """By version: the updates between it and the one that trains."""
        versions = {sample.policy_version for sample in self.samples}
        return {v: policy_lag(self.parents, self.version, v) for v in versions}


@dataclass(frozen=True, slots=True)
class _Scored:
    """What one forward pass says of B completions."""

    logprobs: Tensor
    """(B, T)"""
    entropies: Tensor
    """(B, T)"""
    aux_loss: Tensor | None
    """Of a mixture of experts, its balance."""
    states: Tensor
    """(R, L, H): the last layer's, before the head"""


@dataclass(frozen=True, slots=True)
class Parked:
    """All that the next step depends on, copied to the CPU."""

    weights: Mapping[str, Tensor]
    """`PolicyTrainer.adapter_weights`"""
    state: Mapping[str, Any]
    """`PolicyTrainer.training_state`"""


class _Stream(IterableDataset[dict[str, Update]]):
    """An iterator as a dataset of the dictionaries that transformers expects."""

    def __init__(self, updates: Iterator[Update]) -> None:
        self._updates = updates

    def __iter__(self) -> Iterator[dict[str, Update]]:
        return ({"update": update} for update in self._updates)


class PolicyTrainer(GRPOTrainer):
    """Trains a LoRA adapter on a frozen base; see the module."""

    def __init__(
        self,
        config: LearnerConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        work_dir: Path,
    ) -> None:
        self.config = config
        self.weights = WEIGHTS[config.method]
        self.metrics: dict[str, float] = {}
        """Of the last update."""
        self.before_micro_batch: Callable[[], None] = lambda: None
        """Waits where the machine is needed for something else; also asked before the passes that
        measure a step and those of `learner.examiner`."""
        self.engine_dtype = "float32"
        """What the engine computes in."""
        self._updates: Iterator[Update] = iter(())
        self._epoch = 0
        """Of the update: the steps that it has taken before."""
        self._tokens: list[TokenStats] = []
        self._prepared: list[dict[str, Any]] = []
        """TRL's inputs for each micro-batch of the update."""
        self._bound = config.step_kl
        """How much the update may change the policy, in nats a token."""
        self._scored: _Scored
        """The policy's forward pass over the micro-batch whose loss is computed."""
        self._trained: list[tuple[Batch, Tensor]] = []
        """The update's micro-batches with the policy's log-probabilities (B, T) before it."""
        super().__init__(
            model=model,
            args=_arguments(config, model, work_dir),
            # TRL insists on both and neither is used: the batches come from `train_on`.
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": ""}] * 2),
            processing_class=tokenizer,
            # A PeftModel in place of a config would get a frozen copy of itself as reference,
            # which moves with every restart; this way the reference is always the base.
            peft_config=lora_config(config),
        )
        self.remove_callback(PrinterCallback)
        # On a 4-bit base TRL makes them bfloat16, of which small steps are lost.
        for weight in self._trainable():
            weight.data = weight.data.float()
        if self.args.bf16:
            # Autocast rounds to bfloat16 whatever an adapter reads; peft would widen it first.
            for layer in self.accelerator.unwrap_model(self.model).modules():
                if isinstance(layer, LoraLayer):
                    layer.cast_input_dtype_enabled = False
        self._head = head_of(self.accelerator.unwrap_model(self.model))
        averaged = self._trainable() if config.teacher == "average" else []
        self._average = AverageWeights(averaged, config.teacher_decay)
        """Of no weights for any other teacher."""

    def train_on(self, updates: Iterable[Update]) -> None:
        """Takes each update's optimizer steps, until the iterator ends.

        The iterator is asked for the next update only after them: what it does in between sees
        the new weights and `metrics`. Raises LearnerError before a step that must not be taken.
        """
        self._updates = self._until_end(updates)
        self.train()

    def _until_end(self, updates: Iterable[Update]) -> Iterator[Update]:
        for update in updates:
            before = [weight.detach().clone() for weight in self._trainable()]
            for epoch in range(self.config.epochs):
                self._epoch = epoch
                yield update
                if self._bound_step(before):
                    break
            self.metrics["step/epochs"] = self._epoch + 1
            self._average.follow()
        # Without this the trainer spins through its remaining 2**31 steps.
        self.control.should_training_stop = True

    def get_train_dataloader(self) -> DataLoader[dict[str, Update]]:
        # Not prepared by accelerate, whose loaders read one batch ahead of the step.
        return DataLoader(_Stream(self._updates), batch_size=None, collate_fn=lambda item: item)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of every micro-batch; refuses a batch that drifted."""
        started = time.perf_counter()
        update: Update = inputs["update"]
        if self._epoch == 0:
            self._tokens, self._trained, self._prepared = [], [], []
            self._bound = step_bound([s.score for s in update.samples], self.config)
        loss = torch.zeros((), device=self.args.device)
        micros = micro_batches(update.samples, self.config.micro_batch_tokens)
        for number, sequences in enumerate(micros):
            self.before_micro_batch()
            inputs = self._prepared[number] if self._epoch else self._collated(update, sequences)
            loss += super().training_step(model, inputs, num_items_in_batch)
        if self._epoch == 0:
            tokens = join(self._tokens)
            self._refuse_drift(tokens, model)
            self.metrics = {
                **token_metrics(tokens, self.config.step_kl),
                "score/mean": sum(s.score for s in update.samples) / len(update.samples),
                "batch/size": len(update.samples),
                "step/bound": self._bound,
                "step/seconds": 0.0,
            }
        self.metrics["step/seconds"] += time.perf_counter() - started
        return loss

    def _collated(self, update: Update, sequences: Sequence[Sequence[Sample]]) -> Batch:
        part = [turn for sequence in sequences for turn in sequence]
        return collate(
            sequences,
            lags=update.lags,
            weights=self.weights,
            pass_tokens=self.config.micro_batch_tokens,
            share=self._size(part) / self._size(update.samples),
        )

    def _size(self, samples: Sequence[Sample]) -> int:
        """What the loss averages over: turns, or their tokens."""
        if self.config.loss_type in PER_TOKEN_LOSSES:
            return sum(len(sample.completion_ids) for sample in samples)
        return len(samples)

    def _refuse_drift(self, tokens: TokenStats, model: Any) -> None:
        measured, compared = drift(tokens), "for the same version"
        if measured is None:
            measured = unexplained_drift(tokens, self.config.step_kl)
            compared = "more than [learner] step_kl lets the steps in between explain"
        reason = drift_objection(
            measured, compared, self.config, self._precision, self.engine_dtype
        )
        if reason is not None:
            model.zero_grad()
            raise LearnerError(reason)

    @property
    def _precision(self) -> str:
        """What the frozen base is kept in."""
        if self.config.quantization != "none":
            return self.config.quantization
        return str(self.accelerator.unwrap_model(self.model).dtype).removeprefix("torch.")

    @torch.no_grad()
    def _bound_step(self, before: Sequence[Tensor]) -> bool:
        """Shortens the way from `before` until the policy changed by at most the update's bound.

        Returns whether it had to.

        The change is measured on the update's own tokens. It grows with the square of a small step
        (its Hessian is the Fisher information), which tells how much shorter the step has to be.
        """
        limit, length = self._bound, 1.0
        change = self._policy_change()
        for _ in range(_MAX_CUTS):
            if change <= limit:
                break
            factor = min(0.9, math.sqrt(limit / change)) if math.isfinite(change) else 0.1
            length *= factor
            for weight, old in zip(self._trainable(), before, strict=True):
                weight.copy_(torch.lerp(old, weight, factor))
            change = self._policy_change()
        # What is not a number no cut can mend: the gate rejects such a version.
        if math.isfinite(change) and change > limit:
            raise LearnerError(
                f"the step changes the policy by {change:g} nats a token even after {_MAX_CUTS} "
                f"cuts, over the {limit:g} of [learner] step_kl, and is not kept: lower [learner] "
                f"learning_rate = {self.config.learning_rate:g}"
            )
        self.metrics |= {"step/kl": change, "step/length": length}
        return length < 1.0

    def _policy_change(self) -> float:
        """`policy_change` of the update's tokens since `training_step`."""
        old, new = [], []
        for batch, logprobs in self._trained:
            self.before_micro_batch()
            mask = batch.completion_mask.bool()
            old.append(logprobs[mask])
            new.append(self.completion_logprobs(batch.sequences)[mask])
        return policy_change(torch.cat(old), torch.cat(new))

    def _trainable(self) -> list[torch.nn.Parameter]:
        parameters = self.accelerator.unwrap_model(self.model).parameters()
        return [weight for weight in parameters if weight.requires_grad]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's inputs for one micro-batch: its turns, the advantages and the reference.

        Those of an update's first step serve its later ones: the teacher reads a reply only once.
        """
        if self._epoch:
            return generation_batch
        batch: Batch = generation_batch.to(self.args.device)
        sequences, mask = batch.sequences, batch.completion_mask
        with torch.no_grad():
            gap, top = self._teach(batch)
            reference = None
            if self.beta != 0.0:
                with use_adapter(self.accelerator.unwrap_model(self.model), None):
                    reference = self.completion_logprobs(sequences)
        inputs = {
            # TRL joins prompts and completions for a forward pass that has taken place by then.
            "prompt_ids": mask[:, :0],
            "prompt_mask": mask[:, :0],
            "completion_ids": sequences.completion_ids,
            "completion_mask": mask,
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": batch.behaviour_logprobs,
            "ref_per_token_logps": reference,
            "advantages": token_advantages(
                batch.scores, gap, mask, self.weights, self.config.teacher_gap_clip
            ),
            "batch": batch,
            "gap": gap,
            "top": top,
        }
        self._prepared.append(inputs)
        return inputs

    def _teach(self, batch: Batch) -> tuple[Tensor, list[TopTokens]]:
        """The teacher's clipped gap (B, T), 0 without a hint, and its top tokens for each pass."""
        gap, top = torch.zeros_like(batch.behaviour_logprobs), []
        with self._as_teacher():
            for hinted in batch.hinted:
                scored = self._score(self.model, hinted.sequences)
                behaviour = batch.behaviour_logprobs[hinted.turns]
                limit = self.config.teacher_gap_clip
                gap[hinted.turns] = teacher_gap(scored.logprobs, behaviour, limit)
                if self.weights.topk != 0:
                    every = torch.arange(len(hinted.turns), device=gap.device)
                    states = hinted.sequences.predicting(scored.states, every)
                    top.append(top_tokens(states, self._head, self.config.topk))
        return gap, top

    @torch.no_grad()
    def with_best_hints(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, each with the hinted prompt under which its teacher is most useful."""
        return [self._with_best_hint(s) if s.other_prompts else s for s in samples]

    def _with_best_hint(self, sample: Sample) -> Sample:
        offered = (sample.hinted_prompt_ids, *sample.other_prompts)
        room = self.config.max_tokens - len(sample.completion_ids)
        prompts = [prompt for prompt in offered if prompt and len(prompt) <= room]
        behaviour = torch.tensor(sample.behaviour_logprobs)
        found: list[tuple[float, tuple[int, ...]]] = []
        with self._as_teacher():
            for prompt in prompts:
                self.before_micro_batch()
                placed = place([[replace(sample, prompt_ids=prompt)]]).to(self.args.device)
                teacher = self.completion_logprobs(placed)[0].float().cpu()
                gap = teacher_gap(teacher, behaviour, self.config.teacher_gap_clip)
                found.append((usefulness(gap, sample.score), prompt))
        if not found:
            return sample
        _, best = max(found, key=lambda at: at[0])  # the first of equals: the judge's own choice
        return replace(sample, hinted_prompt_ids=best)

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """The model with the teacher's weights."""
        match self.config.teacher:
            case "policy":
                yield
            case "base":
                with use_adapter(self.accelerator.unwrap_model(self.model), None):
                    yield
            case "average":
                with self._average.in_place():
                    yield

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        batch: Batch = inputs["batch"]
        self._scored = self._score(model, batch.sequences)
        loss = super()._compute_loss(model, inputs)
        divergence = None
        if self.weights.topk != 0:
            divergence = self._divergence(batch, self._scored.states, inputs["top"])
            averaged = token_mean(divergence, batch.completion_mask, self.config.loss_type)
            loss = loss + self.weights.topk * averaged
        if self._epoch == 0:
            logprobs = self._scored.logprobs.detach()
            self._trained.append((batch, logprobs))
            self._tokens.append(self._token_stats(inputs, logprobs, divergence))
        del self._scored  # or the last layer's states would stay in memory
        return loss * batch.share

    def _divergence(self, batch: Batch, states: Tensor, top: Sequence[TopTokens]) -> Tensor:
        """KL(policy ‖ teacher) (B, T) on the teacher's top tokens, 0 without a hint."""
        found = torch.zeros_like(batch.behaviour_logprobs)
        for hinted, tokens in zip(batch.hinted, top, strict=True):
            at = batch.sequences.predicting(states, hinted.turns)
            mask = hinted.sequences.completion_mask.bool()
            values = topk_divergence(at, self._head, tokens).to(found.dtype)
            found[hinted.turns] = torch.zeros_like(found[hinted.turns]).masked_scatter(mask, values)
        return found

    def _token_stats(
        self, inputs: dict[str, Any], logprobs: Tensor, divergence: Tensor | None
    ) -> TokenStats:
        batch: Batch = inputs["batch"]
        mask = batch.completion_mask.bool()
        taught = mask & batch.has_teacher[:, None]
        reference = inputs["ref_per_token_logps"]
        return TokenStats(
            policy=logprobs[mask].float().cpu(),
            behaviour=batch.behaviour_logprobs[mask].cpu(),
            advantage=inputs["advantages"][mask].float().cpu(),
            lag=batch.lags[:, None].expand_as(mask)[mask].cpu(),
            gap=inputs["gap"][taught].float().cpu(),
            reference=None if reference is None else reference[mask].float().cpu(),
            divergence=None if divergence is None else divergence.detach()[taught].float().cpu(),
        )

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> Any:
        # TRL's loss asks for its forward pass, whose rows are turns. Ours are sequences.
        return self._scored.logprobs, self._scored.entropies, self._scored.aux_loss

    def _score(self, model: Any, sequences: Sequences) -> _Scored:
        """One forward pass, with logits of one tile of tokens at a time."""
        kept: list[Any] = []
        backbone = self.accelerator.unwrap_model(self.model).get_base_model().base_model
        hook = backbone.register_forward_hook(lambda *made: kept.append(made[2].last_hidden_state))
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        try:
            with self.accelerator.autocast():
                outputs = model(
                    input_ids=sequences.ids,
                    attention_mask=sequences.mask,
                    labels=sequences.labels,
                    fused_lm_head=True,
                    **extra,
                )
        finally:
            hook.remove()
        return _Scored(
            sequences.by_turn(outputs.log_probs),
            sequences.by_turn(outputs.entropy),
            outputs.aux_loss,
            kept[0],
        )

    def completion_logprobs(self, sequences: Sequences) -> Tensor:
        """Log-probabilities (B, T) of the completions in the sequences, in nats."""
        return self._score(self.model, sequences).logprobs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Takes over loss and gradient norm of the step just taken; TRL would print them."""
        self._metrics["train"].clear()
        if "loss" in logs:
            self.metrics["loss"] = float(logs["loss"])
            self.metrics["grad/norm"] = float(logs.get("grad_norm", math.nan))

    def adapter_weights(self) -> dict[str, Tensor]:
        """A float32 copy of the adapter on the CPU, under the names that peft and vLLM load."""
        state = get_peft_model_state_dict(
            self.accelerator.unwrap_model(self.model), save_embedding_layers=False
        )
        return {name: v.detach().to("cpu", torch.float32, copy=True) for name, v in state.items()}

    def load_adapter(self, weights: Mapping[str, Tensor]) -> None:
        """Goes on from these weights; raises LearnerError if they are of another shape."""
        expected = {name: tuple(v.shape) for name, v in self.adapter_weights().items()}
        found = {name: tuple(v.shape) for name, v in weights.items()}
        if expected != found:
            raise LearnerError(
                "the adapter to go on from has other layers or another rank than [learner] "
                "lora_rank and lora_targets say: set them back, or start a new lineage"
            )
        set_peft_model_state_dict(self.accelerator.unwrap_model(self.model), dict(weights))

    def reset_adapter(self) -> None:
        """Goes on from the base: an adapter without effect yet."""
        torch.manual_seed(self.config.seed)
        for module in self.accelerator.unwrap_model(self.model).modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)

    def restart_teacher(self) -> None:
        """The average teacher begins anew, as the policy is."""
        self._average.restart()

    @property
    def _adam(self) -> Any:
        """The optimizer; there is none before training has begun."""
        return self.optimizer

    def training_state(self) -> dict[str, Any]:
        """Everything beside the weights that the next step depends on."""
        devices = [torch.cuda.get_rng_state()] if self.args.device.type == "cuda" else []
        return {
            "optimizer": self._adam.state_dict(),
            "step": self.state.global_step,
            "rng": torch.get_rng_state(),
            "device_rng": devices,
            "average": self._average.state(),
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restores `training_state`; only once training has begun, when there is an optimizer."""
        self._adam.load_state_dict(state["optimizer"])
        self.state.global_step = state["step"]
        # transformers divides the loss by the steps since this one, and is silent where there are
        # none.
        self._globalstep_last_logged = state["step"]
        # The optimizer's own settings are the configuration's, not those of the checkpoint.
        for group in self._adam.param_groups:
            group["lr"] = self.config.learning_rate
        if self.config.teacher == "average":
            self._average.load(state.get("average", []))
        torch.set_rng_state(state["rng"])
        for rng in state["device_rng"][: int(self.args.device.type == "cuda")]:
            torch.cuda.set_rng_state(rng)

    def parked(self) -> Parked:
        """A copy that later steps leave alone; only once training has begun."""
        return Parked(self.adapter_weights(), _copied(self.training_state()))

    def unpark(self, parked: Parked) -> None:
        """Goes on from `parked`, whose moments may become the optimizer's own: use it once."""
        self.load_adapter(parked.weights)
        self.load_training_state(parked.state)

    def forget_moments(self) -> None:
        """A fresh Adam: its moments belong to weights that are no longer trained."""
        self._adam.state.clear()


def step_bound(scores: Sequence[int], config: LearnerConfig) -> float:
    """How much an update may change the policy, in nats a token: less where less was blamed."""
    to_correct = 1.0 - sum(scores) / len(scores)
    return config.step_kl * min(1.0, max(config.step_kl_floor, to_correct))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The state with its tensors copied to the CPU: an optimizer hands out its own."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def build_trainer(config: LearnerConfig, model_path: str, work_dir: Path) -> PolicyTrainer:
    """A trainer with a fresh adapter. Raises StartError or ConfigError, naming the key to fix."""
    # It warns of an empty dataset whenever training is told to stop before the first batch.
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    if config.threads:
        torch.set_num_threads(config.threads)
    model = load_model(config, model_path)
    if WEIGHTS[config.method].topk != 0:
        require_plain_logits(model, config.method)
    return PolicyTrainer(config, model, load_tokenizer(model_path), work_dir)


def _arguments(config: LearnerConfig, model: PreTrainedModel, work_dir: Path) -> GRPOConfig:
    on_cpu = model.device.type == "cpu"
    arguments = GRPOConfig(
        output_dir=str(work_dir),
        # The defaults are the report's surrogate: token ratios clipped to [1 - 0.2, 1 + 0.28], a
        # mean over each completion's tokens, then over completions.
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_sampling_level,
        max_completion_length=DR_GRPO_TOKENS,
        epsilon=config.epsilon,
        # cispo's is the largest ratio itself.
        epsilon_high=config.ratio_cap if config.loss_type == "cispo" else config.epsilon_high,
        delta=config.ratio_cap,
        beta=config.kl_coef,
        use_bias_correction_kl=True,
        temperature=1.0,
        disable_dropout=True,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        max_steps=_ENDLESS,
        per_device_train_batch_size=2,
        num_generations=2,
        gradient_accumulation_steps=1,
        bf16=not on_cpu and model.dtype == torch.bfloat16,
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=on_cpu,
        seed=config.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if not on_cpu:
        # Or transformers would spread the batch over every visible GPU.
        arguments._n_gpu = 1
    return arguments
