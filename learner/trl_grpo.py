"""TRL's GRPO trainer, imported without the vLLM client that TRL would bring along.

TRL imports all of vLLM wherever it is installed (9 s, a gigabyte, a warning about the version),
and the learner never generates.
"""
# pyright: basic

from __future__ import annotations

from trl import import_utils

import_utils.is_vllm_available = lambda min_version=None: False

from trl.trainer.grpo_config import GRPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head, use_adapter  # noqa: E402

__all__ = ["GRPOConfig", "GRPOTrainer", "add_fused_lm_head", "use_adapter"]
