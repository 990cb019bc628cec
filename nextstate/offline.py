"""What keeps libraries from the internet: one list, for this process and for its children.

The libraries read these variables when they are imported, so `go_offline` must come first: the
command line begins with it, and so does the import of `learner`, which imports them all.
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
"""Whatever the user's shell says: models are loaded from local files only, and nothing reports."""
_NO_METRICS = MappingProxyType({"WANDB_MODE": "disabled"})


def switches(external_metrics: bool) -> dict[str, str]:
    """All variables to set; `external_metrics` is `[privacy]`'s permission to send metrics."""
    return {**SWITCHES, **({} if external_metrics else _NO_METRICS)}


def go_offline() -> None:
    """Sets `SWITCHES` in this process."""
    os.environ.update(SWITCHES)
