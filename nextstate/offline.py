"""Environment variables that keep libraries from using the internet, and from reporting.

The libraries read them when they are imported, so `go_offline` must come first: the command line
and the package `learner` begin with it, and `nextstate.egress.guard`, which each part of ours calls
before it loads a plugin. Children get them from who starts them.
"""

from __future__ import annotations

import os
from types import MappingProxyType

SWITCHES = MappingProxyType(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "WANDB_ERROR_REPORTING": "false",
    }
)
"""They override the user's shell: models are loaded from local files, and nothing reports. TRL
reports by the hub's client, and heeds its switches."""
_NO_METRICS = MappingProxyType({"WANDB_MODE": "disabled"})


def switches(sends_metrics: bool) -> dict[str, str]:
    """All variables to set; `sends_metrics`: `[learner] wandb` is set, and allowed."""
    return {**SWITCHES, **({} if sends_metrics else _NO_METRICS)}


def go_offline(*, sends_metrics: bool = True) -> None:
    """Sets them in this process; without `sends_metrics` also that of Weights & Biases."""
    os.environ.update(switches(sends_metrics))
