"""TRL's GRPO trainer and its settings, imported without the vLLM client that TRL would bring along.

TRL imports all of vLLM wherever it is installed (9 s, 1 GB, a warning about the version), and the
learner never generates with vLLM.
"""
# pyright: basic

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import PreTrainedModel
from trl import import_utils

import_utils.is_vllm_available = lambda min_version=None: False

from trl.trainer.grpo_config import GRPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402

from learner.config import LearnerConfig  # noqa: E402
from learner.kl import RATIO_CAP  # noqa: E402
from learner.step_size import FIRST_RATE  # noqa: E402

__all__ = ["EPSILON", "EPSILON_HIGH", "GRPOTrainer", "grpo_config", "use_adapter"]

EPSILON, EPSILON_HIGH = 0.2, 0.28
"""Clip of the importance ratio: it counts between 1 - EPSILON and 1 + EPSILON_HIGH."""
_MOST_NORM = 1.0
"""A longer gradient is shortened to this norm."""
_EVEN = 10.0
"""AdamW moves each weight equally far, however small its gradient. Of all weights most gradients
are noise, whose moves use up the bound on the policy's change. With an epsilon of so many times the
root mean square of a gradient with the largest norm, a weight moves about as its gradient says."""


def grpo_config(config: LearnerConfig, model: PreTrainedModel, work_dir: Path) -> GRPOConfig:
    """The report's surrogate loss and AdamW, in TRL's words.

    The loss is a mean over each completion's tokens, then over completions.
    """
    on_cpu = model.device.type == "cpu"
    count = sum(weight.numel() for weight in model.parameters())
    arguments = GRPOConfig(
        output_dir=str(work_dir),
        loss_type="grpo",
        importance_sampling_level="token",
        epsilon=EPSILON,
        epsilon_high=EPSILON_HIGH,
        delta=RATIO_CAP,  # no clip bounds the ratio of tokens that are pushed down
        # With a weight TRL would load the base again. `PolicyTrainer` sets it afterwards.
        beta=0.0 if config.trains_all else config.kl_coef,
        use_bias_correction_kl=True,
        temperature=1.0,
        disable_dropout=True,
        learning_rate=config.learning_rate or FIRST_RATE,
        # It pulls pairs to the base, and whole weights to zero.
        weight_decay=0.0 if config.trains_all else 0.1,
        adam_beta1=config.adam_beta1,
        adam_beta2=0.98,
        adam_epsilon=_EVEN * _MOST_NORM / math.sqrt(count) if config.trains_all else 1e-8,
        max_grad_norm=_MOST_NORM,
        optim="adamw_torch",
        per_device_train_batch_size=2,
        num_generations=2,
        gradient_accumulation_steps=1,
        bf16=not on_cpu and model.dtype == torch.bfloat16,
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=on_cpu,
        seed=config.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if not on_cpu:
        arguments._n_gpu = 1  # otherwise transformers spreads a batch over every visible GPU
    return arguments
