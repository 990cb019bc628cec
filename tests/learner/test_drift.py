"""How far the log-probs of engine and learner may differ, and what the error says beyond that."""

from dataclasses import replace

import pytest

from learner.config import LearnerConfig
from learner.drift import drift_limit, drift_objection
from nextstate.training_status import read_training_status
from tests.learner.running_stage import FakeEngine, train
from tests.learner.test_tiny_model import CONFIG, Recorded, save_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recorded(tmp_path, model_path) -> Recorded:
    return Recorded(tmp_path / "state", model_path)


@pytest.mark.parametrize(
    ("learner", "engine", "expected"),
    [
        ("float32", "float32", 0.02),
        ("bfloat16", "bfloat16", 0.1),
        ("float32", "bfloat16", 0.1),
        ("float32", "auto", 0.1),
        ("bfloat16", "float32", 0.1),
        ("4bit", "auto", 0.1),
    ],
)
def test_the_default_admits_what_precision_explains(learner, engine, expected):
    assert drift_limit(LearnerConfig(), learner, engine) == expected
    assert drift_limit(LearnerConfig(drift_limit=0.3), learner, engine) == 0.3


def test_a_drift_over_the_limit_names_both_precisions_and_the_likeliest_cause_first():
    config = LearnerConfig()
    assert (
        drift_objection(0.052, "for the same version", None, config, "bfloat16", "bfloat16") is None
    )
    near = drift_objection(0.12, "for the same version", None, config, "bfloat16", "float16")
    far = drift_objection(1.2, "for the same version", None, config, "bfloat16", "float16")
    for text in (near, far):
        assert "learner computes in bfloat16, the engine in float16" in text
        assert "drift_limit = 0.1, the default between bfloat16 and float16" in text
    assert near.index("precision (") < near.index("another base (")
    assert far.index("another base (") < far.index("precision (")
    assert drift_objection(float("nan"), "", None, config, "float32", "float32") is not None


@pytest.mark.parametrize(("shift", "trains"), [(0.05, True), (0.3, False)])
def test_a_bfloat16_learner_trains_on_what_a_bfloat16_engine_says(
    recorded, model_path, shift, trains, monkeypatch
):
    for _ in range(16):
        recorded.add(shift=shift)
    engine = FakeEngine(recorded.store)
    config = replace(CONFIG, dtype="bfloat16", gate_canaries=0, step_kl=9.0, gate_kl_parent=9.0)
    if trains:
        train(recorded, model_path, engine, config)
        assert engine.published == [1]
    else:
        with pytest.raises(Exception, match=r"bfloat16 and float32: nothing was trained"):
            train(recorded, model_path, engine, config)
        assert recorded.states() == {"ready": 16}
        assert "drift_limit" in read_training_status(recorded.store.dir, ["main"])["main"]
