"""The `[learner]` section, importable without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from nextstate.errors import ConfigError

Method = Literal["binary", "opd", "combined"]


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    """How samples become adapters; defaults follow the report's recipe (arXiv 2603.10165)."""

    method: Method = "combined"
    """Which signals train: the score (binary), the hint (opd) or both (combined)."""
    batch_size: int = 16
    """Samples of one update; each update makes one version."""
    micro_batch_size: int = 1
    """Samples of one forward pass; more is faster for short turns and takes more memory."""
    learning_rate: float = 1e-5
    """AdamW's step, constant; 1e-5 suits a model of some billion parameters."""
    weight_decay: float = 0.1
    """AdamW's decay of the adapter's weights."""
    adam_beta1: float = 0.9
    """AdamW's memory of the gradient."""
    adam_beta2: float = 0.98
    """AdamW's memory of the squared gradient."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    step_kl: float = 0.01
    """A step that changes the policy by more is shortened: KL(before ‖ after), nats a token."""
    lora_rank: int = 16
    """Rank of each low-rank pair; at most `[engine] max_lora_rank`."""
    lora_alpha: int = 32
    """The pair's product is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Names of the linear layers that get a pair."""
    epsilon: float = 0.2
    """Lower clip of the importance ratio: below 1 - epsilon a token no longer falls."""
    epsilon_high: float = 0.28
    """Upper clip of the importance ratio: above 1 + epsilon_high a token no longer rises."""
    ratio_cap: float = 4.0
    """Truncation of the importance ratio of tokens that are pushed down, which no clip bounds."""
    kl_coef: float = 0.1
    """Weight of the KL divergence to the base model; 0 saves one forward pass."""
    teacher_gap_clip: float = 1.0
    """Largest |teacher - behaviour| log-probability of one token that counts, in nats."""
    max_lag: int = 8
    """Samples from more than this many versions ago are dropped."""
    max_tokens: int = 32768
    """Samples with more tokens of prompt and completion are dropped; never cut."""
    holdout: float = 0.1
    """Share of the sessions whose turns never train: new versions are checked on them. 0: none."""
    holdout_samples: int = 32
    """The newest held-out turns that a new version is checked on, at most 4 of a session."""
    gate_weight_change: float = 1.0
    """Rejects an adapter that changes a layer by more than this times the layer's own norm."""
    gate_kl_parent: float = 0.1
    """Rejects a version further from its parent, in nats a token of held-out turns."""
    gate_kl_base: float = 1.0
    """Rejects a version further from the base, in nats a token of held-out turns."""
    gate_level: float = 0.01
    """How often a version just at `gate_drop` is rejected for its ranking of held-out turns."""
    gate_drop: float = 0.02
    """A ranking that is worse by no more than this, in nats a token, is never a reason."""
    gate_canaries: int = 2
    """Recorded prompts that a new version answers, greedily and sampled; 0: none."""
    gate_canary_tokens: int = 32
    """Tokens of each such answer, at most."""
    watch_level: float = 0.01
    """How often a version no worse than before is rolled back by mistake, ever; 0: no watch."""
    watch_drop: float = 0.2
    """A mean score (-1 to 1) that is lower by no more than this is never a reason to roll back."""
    drift_limit: float = 0.02
    """Largest mean |policy - behaviour| on the current version's own samples, in nats a token."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base; auto is float32 on a CPU and bfloat16 on a GPU. LoRA is float32."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; auto takes a GPU where there is one."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    threads: int = 0
    """CPU threads of a training step; 0 is torch's default."""
    seed: int = 0
    """Of the adapter's first weights."""
    poll_s: float = 1.0
    """Seconds between looks into the store while too few samples are ready."""

    def __post_init__(self) -> None:
        for key in (
            "batch_size",
            "micro_batch_size",
            "lora_rank",
            "lora_alpha",
            "max_tokens",
            "holdout_samples",
            "gate_canary_tokens",
        ):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in (
            "learning_rate",
            "max_grad_norm",
            "teacher_gap_clip",
            "drift_limit",
            "poll_s",
            "step_kl",
            "gate_weight_change",
            "gate_kl_parent",
            "gate_kl_base",
        ):
            _require(getattr(self, key) > 0, key, getattr(self, key), "more than 0")
        for key in (
            "weight_decay",
            "epsilon_high",
            "kl_coef",
            "max_lag",
            "threads",
            "seed",
            "gate_drop",
            "gate_canaries",
            "watch_drop",
        ):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        for key in ("adam_beta1", "adam_beta2", "epsilon", "holdout", "watch_level"):
            _require(0 <= getattr(self, key) < 1, key, getattr(self, key), "in [0, 1)")
        level = self.gate_level
        _require(0 < level <= 0.5, "gate_level", level, "more than 0 and at most 0.5")
        _require(
            self.ratio_cap > 1 + self.epsilon_high,
            "ratio_cap",
            self.ratio_cap,
            f"more than 1 + epsilon_high = {1 + self.epsilon_high:g}",
        )
        _require(bool(self.lora_targets), "lora_targets", [], "at least one layer's name")
        known_device = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        _require(known_device, "device", self.device, "auto, cpu, cuda or cuda:N")


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"[learner] {key} = {value!r}: expected {expected}")
