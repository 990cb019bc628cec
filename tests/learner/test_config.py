"""`[learner]`: an impossible value is refused with its key."""

import pytest

from nextstate.app.settings import Settings
from nextstate.errors import ConfigError


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"learning_rate": -1.0},
        {"kl_coef": -0.1},
        {"lora_targets": ()},
        {"micro_batch_tokens": 0},
        {"max_wait_s": -1.0},
        {"lora_targets": ("all-linear", "q_proj")},
        {"holdout": 1.0},
        {"holdout": -0.1},
        {"keep_versions": 1},
        {"device": "tpu"},
        {"device": "cuda:1"},
    ],
)
def test_an_impossible_setting_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"\[learner\] {next(iter(wrong))} = "):
        Settings.read(overrides={"learner": wrong})
