"""`[learner]`: an impossible value is refused with its key."""

from dataclasses import replace

import pytest

from learner.config import LearnerConfig
from nextstate.errors import ConfigError


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"kl_coef": -0.1},
        {"lora_targets": ()},
        {"topk": 0},
        {"micro_batch_tokens": 0},
        {"max_wait_s": -1.0},
        {"min_batch": 17},
        {"adam_beta1": 1.0},
        {"lora_targets": ("all-linear", "q_proj")},
        {"device": "tpu"},
        {"device": "cuda:1"},
    ],
)
def test_an_impossible_setting_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"\[learner\] {next(iter(wrong))} = "):
        LearnerConfig(**wrong)


def test_a_negative_patience_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[learner\] idle_patience_s = -1"):
        replace(LearnerConfig(), idle_patience_s=-1)
