"""Environment variables that keep libraries from using the internet.

The libraries read them when they are imported, so `go_offline` must come first: the command line
and the package `learner` begin with it.
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
        "WANDB_ERROR_REPORTING": "false",
    }
)
"""They override the user's shell: models are loaded from local files, and nothing reports."""
_NO_METRICS = MappingProxyType({"WANDB_MODE": "disabled"})


def switches(sends_metrics: bool) -> dict[str, str]:
    """All variables to set; `sends_metrics`: `[learner] wandb` is set, and allowed."""
    return {**SWITCHES, **({} if sends_metrics else _NO_METRICS)}


def go_offline() -> None:
    """Sets `SWITCHES` in this process."""
    os.environ.update(SWITCHES)
