"""The `[learner]` section and the recipe behind it, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from learner.schedule import parse_schedule
from nextstate.errors import ConfigError

ALL_LINEAR = "all-linear"
"""peft's word for every linear layer but the output's."""
_Count = Annotated[int, Ge(1)]
_Positive = Annotated[float, Gt(0)]
_NotNegative = Annotated[float, Ge(0)]
_Share = Annotated[float, Ge(0), Lt(1)]
Method = Literal["binary", "opd", "opd_topk", "combined", "combined_sampled"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What nobody needs to choose: measured (benchmarks/RESULTS.md) or the report's.

    No file sets it. Benchmarks and tests may, in code.
    """

    topk: _Count = 20
    """The teacher's likeliest tokens that are compared one by one; all others are one bin."""
    teacher: Literal["policy", "base"] = "policy"
    """Which model reads the hint: the policy as it is, or the base without an adapter."""
    teacher_temperature: _Positive = 0.6
    """The most at which the teacher is read. A turn drawn at less has a teacher of its own
    temperature."""
    min_batch: _Count = 1
    """This many samples are enough for an update after they have waited for max_wait_s."""
    adam_beta1: _Share = 0.3
    """AdamW's memory of the gradient. Long memory moves the policy further in the direction of
    earlier samples than the present ones ask for."""
    step_kl_floor: Annotated[float, Gt(0), Le(1)] = 0.1
    """The bound never falls below this fraction of step_kl; 1: it is step_kl for every batch."""
    lora_alpha: _Count = 32
    """The pair's product is scaled by alpha / rank."""
    teacher_gap_clip: _Positive = 1.0
    """Largest |teacher - behaviour| log-probability of one token that counts, in nats."""
    max_lag: Annotated[int, Ge(0)] = 8
    """Samples from more than this many versions ago are dropped."""
    holdout_after: Annotated[int, Ge(0)] = 3
    """Versions that are made before any session is held out: the first turns teach most, and too
    few of them could not tell versions apart."""
    gate_weight_change: _Positive = 1.0
    """Rejects an adapter that changes a layer by more than this times the layer's own norm."""
    gate_kl_parent: _Positive = 0.1
    """Rejects a version further from its parent, in nats a token of held-out turns."""
    gate_kl_base: _Positive = 1.0
    """Rejects a version further from the base, in nats a token of held-out turns."""
    gate_drop: _NotNegative = 0.02
    """Rejects a version that ranks held-out turns worse by clearly more than this, in nats a
    token."""
    gate_canaries: Annotated[int, Ge(0)] = 2
    """Recorded prompts that a new version answers before it serves; 0: none."""
    quantization: Literal["none", "4bit"] = "none"
    """Of the frozen base. `4bit` is bitsandbytes' NF4: only on a GPU, and vLLM cannot serve it."""
    poll_s: _Positive = 0.5
    """Seconds between looks into the store while too few samples are ready."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the adapter's first weights and of sampled canary replies."""
    tensorboard: bool = True
    """Writes metrics as TensorBoard's event files too, in the lineage's folder."""
    idle_patience_s: _NotNegative = 60.0
    """`idle`: after this long behind a busy engine one micro-batch goes ahead."""
    divided: bool = False
    """Each of the ranks holds a share of the base's layers instead of a whole base: set where that
    would not fit (`learner/memory.py`)."""


@dataclass(frozen=True, slots=True)
class LearnerConfig(Recipe):
    """How samples become adapters; defaults follow the report's recipe (arXiv 2603.10165)."""

    method: Method = "combined"
    """Which signals train: the score (binary), the hint (opd, opd_topk) or both (combined,
    combined_sampled). opd and combined_sampled compare policy and teacher at the sampled token
    alone, as the report does; opd_topk and combined at the teacher's likeliest tokens."""
    batch_size: _Count = 16
    """Samples of one update; each update makes one version."""
    max_wait_s: _NotNegative = 0.0
    """Seconds that at least min_batch samples wait for a full batch; 0: only a full one trains."""
    micro_batch_tokens: _Count = 8192
    """Tokens of one forward pass, padding included; a longer turn gets a pass of its own."""
    learning_rate: _NotNegative = 0.0
    """AdamW's rate; 0: found, so that an update changes the policy by about its bound
    (`step_kl`). A rate given here is only lowered by the bound."""
    epochs: _Count = 4
    """Optimizer steps of one update on the same samples."""
    step_kl: _Positive = 0.02
    """How far one update changes the policy: KL(before ‖ after), nats a token.
    It is the bound for a batch whose mean score is at most 0. A better batch has less to correct:
    its bound falls with 1 - mean score."""
    lora_rank: Annotated[int, Ge(0), Le(512)] = 16
    """Rank of each low-rank pair; vLLM accepts up to 512. 0: no pairs; all weights are trained, and
    each version is a whole model with an engine of its own (docs/scale.md)."""
    lora_targets: Annotated[tuple[str, ...], MinLen(1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Names of the linear layers that get a pair; `all-linear` alone: all but the output layer."""
    kl_coef: _NotNegative = 0.1
    """Weight of the KL divergence to the base model; 0 saves one forward pass."""
    max_tokens: _Count = 32768
    """Samples with more tokens of prompt and completion are dropped; never cut."""
    holdout: _Share = 0.1
    """Fraction of the sessions whose turns never train: new versions are checked on them."""
    watch: bool = True
    """Rolls back a version that is clearly worse than those before it (`learner/watch.py`)."""
    keep_versions: Annotated[int, Ge(2)] = 40
    """The newest adapters that stay on disk (`learner/pruning.py`)."""
    drift_limit: _NotNegative = 0.0
    """Largest mean |policy - behaviour| on the current version's own samples, in nats a token; 0
    chooses by the precision of engine and learner (`learner/drift.py`)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen base; auto: float32 on a CPU, bfloat16 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`cpu` or `cuda`, the first GPU that the process sees; auto takes a GPU if there is one."""
    ranks: _Count = 1
    """Processes that take each update together, each with a device. Each holds the whole base, or
    where that does not fit, a share of it; see docs/scale.md."""
    gradient_checkpointing: bool = True
    """Computes activations twice instead of keeping them: a third more time, and for long turns a
    tenth of the memory."""
    threads: Annotated[int, Ge(0)] = 0
    """CPU threads of a training step; 0 is torch's default. Beside a managed vLLM without a GPU:
    the number of cores that only the learner gets (`nextstate/app/cores.py`)."""
    wandb: str = ""
    """Project of Weights & Biases that gets the metrics; its host must be in `allow_hosts`."""
    schedule: str = "always"
    """`idle` waits while the engine serves; a time such as `22:00-07:00` begins updates only then,
    local time of every day. The watch looks at any time."""

    def __post_init__(self) -> None:
        if ALL_LINEAR in self.lora_targets and len(self.lora_targets) > 1:
            raise ConfigError(
                f"[learner] lora_targets = {list(self.lora_targets)}: expected names of layers, or "
                f"{ALL_LINEAR!r} alone"
            )
        if self.trains_all:
            self._check_full_weights()
        try:
            parse_schedule(self.schedule)
        except ValueError as error:
            raise ConfigError(f"[learner] schedule = {self.schedule!r}: {error}") from None

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained instead of low-rank pairs."""
        return self.lora_rank == 0

    def _check_full_weights(self) -> None:
        for key, wrong, value, why in (
            ("ranks", self.ranks > 1, self.ranks, "each rank would hold six copies of the model"),
            ("dtype", self.dtype == "bfloat16", self.dtype, "small steps would be rounded away"),
            ("quantization", self.quantization != "none", self.quantization, "it freezes the base"),
        ):
            if wrong:
                raise ConfigError(
                    f"[learner] lora_rank = 0 trains all weights, and {key} = {value!r} does not "
                    f"go with that: {why}; leave {key} out, or set lora_rank = 16"
                )
