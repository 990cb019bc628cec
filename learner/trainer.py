"""TRL's GRPO trainer, fed with recorded samples in place of its own rollouts.

One long `train()` draws updates from an iterator: each is one optimizer step over all its samples.
Loss, clipping, optimizer and precision are TRL's and transformers'. What is ours: the batch, the
teacher's and the base's log-probabilities, the advantage, the check that engine and learner agree
before a step is taken, and the bound on how far a step may go. Three of the overridden methods are
private, hence the exact TRL pin and the parity test.
"""
# pyright: basic

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from learner.advantages import WEIGHTS, teacher_gap, token_advantages
from learner.batch import Batch, collate, micro_batches
from learner.config import LearnerConfig
from learner.metrics import TokenStats, drift, join, policy_change, token_metrics
from learner.model import load_model, load_tokenizer, lora_config
from learner.trl_grpo import GRPOConfig, GRPOTrainer, use_adapter
from nextstate.errors import LearnerError
from nextstate.records import Sample

_ENDLESS = 2**31 - 1
_MAX_CUTS = 10


@dataclass(frozen=True, slots=True)
class Update:
    """The samples of one optimizer step."""

    samples: Sequence[Sample]
    version: int
    """The version whose weights the step starts from."""


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
        self._updates: Iterator[Update] = iter(())
        self._tokens: list[TokenStats] = []
        self._logprobs: Tensor | None = None
        self._trained: list[tuple[Batch, Tensor]] = []
        """The update's micro-batches with the policy's log-probabilities (B, T) before the step."""
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

    def train_on(self, updates: Iterable[Update]) -> None:
        """Takes one optimizer step per update, until the iterator ends.

        The iterator is asked for the next update only after the step: what it does in between sees
        the new weights and `metrics`. Raises LearnerError before a step that must not be taken.
        """
        self._updates = self._until_end(updates)
        self.train()

    def _until_end(self, updates: Iterable[Update]) -> Iterator[Update]:
        for update in updates:
            before = [weight.detach().clone() for weight in self._trainable()]
            yield update
            self._bound_step(before)
        # Without this the trainer spins through its remaining 2**31 steps.
        self.control.should_training_stop = True

    def get_train_dataloader(self) -> DataLoader[dict[str, Update]]:
        # Not prepared by accelerate, whose loaders read one batch ahead of the step.
        return DataLoader(_Stream(self._updates), batch_size=None, collate_fn=lambda item: item)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of every micro-batch; refuses a batch that drifted."""
        started = time.perf_counter()
        update: Update = inputs["update"]
        self._tokens, self._trained = [], []
        loss = torch.zeros((), device=self.args.device)
        for samples in micro_batches(update.samples, self.config.micro_batch_size):
            batch: Any = collate(
                samples,
                current=update.version,
                weights=self.weights,
                share=len(samples) / len(update.samples),
            )
            loss += super().training_step(model, batch, num_items_in_batch)
        tokens = join(self._tokens)
        self._refuse_drift(drift(tokens), model)
        self.metrics = {
            **token_metrics(tokens),
            "score/mean": sum(s.score for s in update.samples) / len(update.samples),
            "batch/size": len(update.samples),
            "step/seconds": time.perf_counter() - started,
        }
        return loss

    def _refuse_drift(self, measured: float | None, model: Any) -> None:
        limit = self.config.drift_limit
        if measured is not None and not measured <= limit:
            model.zero_grad()
            raise LearnerError(
                f"the learner's log-probabilities differ from the engine's by {measured:.4f} nats "
                f"a token for the same version, over [learner] drift_limit = {limit:g}: nothing "
                "was trained; check that [engine] model, dtype and adapter are the learner's"
            )

    @torch.no_grad()
    def _bound_step(self, before: Sequence[Tensor]) -> None:
        """Shortens the step just taken until the policy changed by at most `step_kl`.

        The change is measured on the update's own tokens. It grows with the square of a small step
        (its Hessian is the Fisher information), which tells how much shorter the step has to be.
        """
        limit, length = self.config.step_kl, 1.0
        change = self._policy_change()
        for _ in range(_MAX_CUTS):
            if change <= limit:
                break
            factor = min(0.9, math.sqrt(limit / change)) if math.isfinite(change) else 0.1
            length *= factor
            for weight, old in zip(self._trainable(), before, strict=True):
                weight.copy_(torch.lerp(old, weight, factor))
            change = self._policy_change()
        if not change <= limit:
            raise LearnerError(
                f"the step changes the policy by {change:g} nats a token even after {_MAX_CUTS} "
                f"cuts, over [learner] step_kl = {limit:g}, and is not kept: lower [learner] "
                f"learning_rate = {self.config.learning_rate:g}"
            )
        self.metrics |= {"step/kl": change, "step/length": length}

    def _policy_change(self) -> float:
        """`policy_change` of the update's tokens since `training_step`."""
        old, new = [], []
        for batch, logprobs in self._trained:
            mask = batch.completion_mask.bool()
            old.append(logprobs[mask])
            new.append(
                self.completion_logprobs(
                    batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask
                )[mask]
            )
        return policy_change(torch.cat(old), torch.cat(new))

    def _trainable(self) -> list[torch.nn.Parameter]:
        parameters = self.accelerator.unwrap_model(self.model).parameters()
        return [weight for weight in parameters if weight.requires_grad]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's inputs for one micro-batch: its tensors, the advantages and the reference."""
        batch: Batch = generation_batch.to(self.args.device)
        behaviour = batch.behaviour_logprobs
        with torch.no_grad():
            rows = batch.hinted_rows
            gap = behaviour.new_zeros((0, behaviour.size(1)))
            if len(rows):
                teacher = self.completion_logprobs(
                    batch.hinted_prompt_ids,
                    batch.hinted_prompt_mask,
                    batch.completion_ids[rows],
                    batch.completion_mask[rows],
                )
                gap = teacher_gap(teacher, behaviour[rows], self.config.teacher_gap_clip)
            reference = None
            if self.beta != 0.0:
                with use_adapter(self.accelerator.unwrap_model(self.model), None):
                    reference = self.completion_logprobs(
                        batch.prompt_ids,
                        batch.prompt_mask,
                        batch.completion_ids,
                        batch.completion_mask,
                    )
        return {
            "prompt_ids": batch.prompt_ids,
            "prompt_mask": batch.prompt_mask,
            "completion_ids": batch.completion_ids,
            "completion_mask": batch.completion_mask,
            "old_per_token_logps": behaviour,
            "ref_per_token_logps": reference,
            "advantages": token_advantages(
                batch.scores, gap, rows, batch.completion_mask, self.weights
            ),
            "batch": batch,
            "gap": gap,
        }

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        batch: Batch = inputs["batch"]
        loss = super()._compute_loss(model, inputs) * batch.share
        assert self._logprobs is not None
        self._trained.append((batch, self._logprobs))
        self._tokens.append(self._token_stats(inputs, self._logprobs))
        return loss

    def _token_stats(self, inputs: dict[str, Any], logprobs: Tensor) -> TokenStats:
        batch: Batch = inputs["batch"]
        mask = batch.completion_mask.bool()
        reference = inputs["ref_per_token_logps"]
        return TokenStats(
            policy=logprobs[mask].float().cpu(),
            behaviour=batch.behaviour_logprobs[mask].cpu(),
            advantage=inputs["advantages"][mask].float().cpu(),
            current=batch.current[:, None].expand_as(mask)[mask].cpu(),
            gap=inputs["gap"][mask[batch.hinted_rows]].float().cpu(),
            reference=None if reference is None else reference[mask].float().cpu(),
        )

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        # The loss needs this very forward pass: keeping its result saves drift a pass of its own.
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logprobs = result[0].detach()
        return result

    def completion_logprobs(
        self, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor
    ) -> Tensor:
        """Log-probabilities (B, T) of the completion `ids` after the prompts, in nats."""
        logprobs, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([prompt_ids, ids], dim=1),
            torch.cat([prompt_mask, mask], dim=1),
            ids.size(1),
        )
        return logprobs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Takes over loss and gradient norm of the step just taken; TRL would print them."""
        self._metrics["train"].clear()
        if "loss" in logs:
            self.metrics["loss"] = float(logs["loss"])
            self.metrics["grad/norm"] = float(logs.get("grad_norm", math.nan))

    def adapter_weights(self) -> dict[str, Tensor]:
        """A copy of the adapter as float32 tensors on the CPU, under the names that vLLM loads."""
        state = get_peft_model_state_dict(
            self.accelerator.unwrap_model(self.model), save_embedding_layers=False
        )
        # A copy even on a CPU, where `float` and `cpu` would hand out the weights themselves.
        copied = {name: v.detach().to("cpu", torch.float32, copy=True) for name, v in state.items()}
        return {name: v.contiguous() for name, v in copied.items()}

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
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restores `training_state`; only once training has begun, when there is an optimizer."""
        self._adam.load_state_dict(state["optimizer"])
        self.state.global_step = state["step"]
        # The optimizer's own settings are the configuration's, not those of the checkpoint.
        for group in self._adam.param_groups:
            group["lr"] = self.config.learning_rate
        torch.set_rng_state(state["rng"])
        for rng in state["device_rng"][: int(self.args.device.type == "cuda")]:
            torch.cuda.set_rng_state(rng)

    def forget_moments(self) -> None:
        """A fresh Adam: its moments belong to weights that are no longer trained."""
        self._adam.state.clear()


def build_trainer(config: LearnerConfig, model_path: str, work_dir: Path) -> PolicyTrainer:
    """A trainer with a fresh adapter. Raises StartError or ConfigError, naming the key to fix."""
    # It warns of an empty dataset whenever training is told to stop before the first batch.
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    if config.threads:
        torch.set_num_threads(config.threads)
    model = load_model(config, model_path)
    return PolicyTrainer(config, model, load_tokenizer(model_path), work_dir)


def _arguments(config: LearnerConfig, model: PreTrainedModel, work_dir: Path) -> GRPOConfig:
    on_cpu = model.device.type == "cpu"
    arguments = GRPOConfig(
        output_dir=str(work_dir),
        # The report's surrogate: token ratios clipped to [1 - 0.2, 1 + 0.28], a mean over each
        # completion's tokens, then over completions.
        loss_type="grpo",
        importance_sampling_level="token",
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.ratio_cap,
        beta=config.kl_coef,
        use_bias_correction_kl=False,
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
