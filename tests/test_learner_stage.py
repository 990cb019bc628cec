"""The stage on a real store and a tiny model: each sample settles once, and the policy moves."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from learner import stage
from learner.config import LearnerConfig
from nextstate.adapters import verify_adapter
from nextstate.errors import EngineError, LearnerError, StartError
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.test_learner_tiny import (
    BAD,
    CONFIG,
    GOOD,
    PROMPT,
    Recorded,
    load_float64,
    logprobs,
    save_tiny_model,
)


class FakeEngine:
    """A publisher that flips at once, remembers what it got and stops after `wanted` versions."""

    def __init__(self, store: Store, wanted: int = 1, failures: int = 0) -> None:
        self.stop = threading.Event()
        self.published: list[int] = []
        self.withdrawn: list[int] = []
        self.attempts = 0
        self.after: Callable[[PolicyVersion], None] = lambda _: None
        self._store = store
        self._wanted = wanted
        self._failures = failures

    def __call__(self, version: PolicyVersion, withdraw: bool = False) -> None:
        self.attempts += 1
        if self.attempts <= self._failures:
            raise EngineError("the engine is restarting")
        if withdraw:
            self._store.replace_serving(version, version.parent)
            self.withdrawn.append(version.number)
            return
        self._store.set_serving(version.lineage, version.number)
        self.published.append(version.number)
        self.after(version)
        if len(self.published) >= self._wanted:
            self.stop.set()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recorded(tmp_path, model_path) -> Recorded:
    return Recorded(tmp_path / "state", model_path)


def train(recorded: Recorded, model_path: str, engine: FakeEngine, config=CONFIG) -> None:
    stage.run(recorded.store, config, model_path, "main", engine, engine.stop)


def adapted_logprobs(model_path: str, version: PolicyVersion, reply: tuple[int, ...]) -> float:
    policy = PeftModel.from_pretrained(load_float64(model_path), version.path).double()
    with torch.no_grad():
        return logprobs(policy, PROMPT, reply).sum().item()


def test_one_update_settles_its_samples_once(recorded, model_path):
    turns = recorded.add_mixed(20)
    engine = FakeEngine(recorded.store)
    train(recorded, model_path, engine)

    assert recorded.states() == {"trained": 16, "ready": 4}
    (version,) = recorded.store.versions("main")
    assert (version.number, version.parent, version.samples) == (1, 0, 16)
    assert version.state is VersionState.SERVING
    assert engine.published == [1]
    verify_adapter(Path(version.path), version.sha256)
    assert json.loads((Path(version.path) / "card.json").read_text())["turns"] == turns[:16]
    (line,) = (recorded.store.dir / "learner/main/metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics.pop("version") == 1
    assert metrics == version.metrics
    assert metrics["drift/mean"] < 1e-5
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["batch/size"] == 16
    assert metrics["score/mean"] == metrics["lag/max"] == 0
    assert {"loss", "kl/base", "advantage/mean", "grad/norm", "step/seconds"} <= set(metrics)


@pytest.mark.parametrize("method", ["binary", "combined"])
def test_rewarded_replies_rise_and_punished_ones_fall(recorded, model_path, method):
    recorded.add_mixed(32)
    train(recorded, model_path, FakeEngine(recorded.store, 2), replace(CONFIG, method=method))
    first, second = recorded.store.versions("main")
    base = load_float64(model_path)
    with torch.no_grad():
        good, bad = (logprobs(base, PROMPT, reply).sum().item() for reply in (GOOD, BAD))
    assert good < adapted_logprobs(model_path, first, GOOD)
    assert good < adapted_logprobs(model_path, second, GOOD)
    assert bad > adapted_logprobs(model_path, second, BAD)
    assert second.metrics["lag/max"] == 1


def test_distillation_moves_towards_what_the_hinted_policy_would_say(recorded, model_path):
    hinted = (9, *PROMPT)
    with torch.no_grad():
        base = load_float64(model_path)
        liked, disliked = (
            reply
            for _, reply in sorted(
                ((logprobs(base, hinted, r) - logprobs(base, PROMPT, r)).sum().item(), r)
                for r in (GOOD, BAD)
            )[::-1]
        )
    for _ in range(8):
        recorded.add(liked, -1, hinted=hinted)
        recorded.add(disliked, -1, hinted=hinted)
    recorded.add(GOOD, 1)
    before = {r: logprobs(base, PROMPT, r).sum().item() for r in (GOOD, BAD)}
    train(recorded, model_path, FakeEngine(recorded.store), replace(CONFIG, method="opd"))
    (version,) = recorded.store.versions("main")
    moved = {r: adapted_logprobs(model_path, version, r) - before[r] for r in (GOOD, BAD)}
    assert moved[liked] > moved[disliked]
    assert recorded.states() == {"trained": 16, "ready": 1}  # a score alone is no use to opd


def test_too_old_and_too_long_samples_are_dropped_and_the_rest_waits(recorded, model_path):
    for number in range(1, 10):
        version = PolicyVersion("main", number, number - 1, None, None, 0, VersionState.RETIRED, {})
        recorded.store.add_version(version, None)
    recorded.store.set_serving("main", 9)
    old = recorded.add(version=0)
    long = recorded.add(prompt=(7,) * 90, version=9)
    for _ in range(15):
        recorded.add(version=9)
    engine = FakeEngine(recorded.store)
    released = recorded.store.release_samples

    def release_then_stop(lineage: str) -> int:
        count = released(lineage)
        if recorded.states().get("dropped") == 2:
            engine.stop.set()
        return count

    recorded.store.release_samples = release_then_stop
    train(recorded, model_path, engine, replace(CONFIG, max_tokens=80))
    assert recorded.states() == {"ready": 15, "dropped": 2}
    assert engine.published == []
    assert recorded.reason(old) == "lag 9 over the limit of 8"
    assert recorded.reason(long) == "93 tokens over the limit of 80"


def test_a_dropped_sample_is_not_settled_with_its_batch(recorded, model_path):
    recorded.add(prompt=(7,) * 90)
    turns = recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store), replace(CONFIG, max_tokens=80))
    assert recorded.states() == {"trained": 16, "dropped": 1}
    (version,) = recorded.store.versions("main")
    assert json.loads((Path(version.path) / "card.json").read_text())["turns"] == turns


def test_drifted_log_probs_refuse_to_train_and_lose_nothing(recorded, model_path):
    for _ in range(16):
        recorded.add(shift=0.05)
    engine = FakeEngine(recorded.store)
    with pytest.raises(LearnerError, match=r"0\.0500 nats .*drift_limit = 0\.02"):
        train(recorded, model_path, engine)
    assert recorded.states() == {"ready": 16}
    assert recorded.store.versions("main") == []


def test_an_older_versions_samples_may_differ(recorded, model_path):
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    for _ in range(16):
        recorded.add(shift=0.05, version=0)
    train(recorded, model_path, engine := FakeEngine(recorded.store))
    assert engine.published == [2]
    assert "drift/mean" not in recorded.store.versions("main")[-1].metrics


def test_weights_that_blow_up_never_become_a_version(recorded, model_path):
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store)
    config = replace(CONFIG, learning_rate=float("inf"))
    with pytest.raises(LearnerError, match=r"changes the policy by nan .* learning_rate = inf"):
        train(recorded, model_path, engine, config)
    assert recorded.states() == {"ready": 16}
    assert not list((recorded.store.dir / "versions/main").glob("*"))


def test_a_failing_engine_is_tried_again(recorded, model_path, monkeypatch):
    monkeypatch.setattr(stage, "_FIRST_WAIT_S", 0.001)
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store, failures=3)
    train(recorded, model_path, engine)
    assert (engine.attempts, engine.published) == (4, [1])


def test_an_unpublished_version_is_published_at_the_next_start(recorded, model_path):
    recorded.add_mixed(16)
    down = FakeEngine(recorded.store, failures=10)
    down.stop.set()
    with pytest.raises(EngineError):
        down(PolicyVersion("main", 1, 0, None, None, 0, VersionState.CANDIDATE))
    down.stop.clear()
    publish = down.__call__

    def fail_and_stop(version: PolicyVersion) -> None:
        down.stop.set()
        publish(version)

    stage.run(recorded.store, CONFIG, model_path, "main", fail_and_stop, down.stop)
    assert recorded.store.versions("main")[0].state is VersionState.CANDIDATE
    up = FakeEngine(recorded.store)
    train(recorded, model_path, up)
    assert up.published == [1]
    assert recorded.store.serving("main").number == 1


def test_a_restart_goes_on_with_weights_and_optimizer(tmp_path, model_path):
    adapters = []
    for runs in ([2], [1, 1]):
        recorded = Recorded(tmp_path / str(len(runs)), model_path)
        recorded.add_mixed(32)
        for wanted in runs:
            train(recorded, model_path, FakeEngine(recorded.store, wanted))
        adapters.append(recorded.store.versions("main")[-1].sha256)
    assert adapters[0] == adapters[1]


def test_after_a_rollback_training_goes_on_from_the_serving_version(recorded, model_path):
    recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 3)

    def roll_back(version: PolicyVersion) -> None:
        if version.number == 2:
            recorded.store.set_serving("main", 1)

    engine.after = roll_back
    train(recorded, model_path, engine)
    assert [v.parent for v in recorded.store.versions("main")] == [0, 1, 1]


def test_a_rollback_to_the_base_starts_from_the_base(recorded, model_path):
    recorded.add_mixed(16 * 2)
    engine = FakeEngine(recorded.store, 2)
    engine.after = lambda _: recorded.store.set_serving("main", 0)
    train(recorded, model_path, engine)
    assert [v.parent for v in recorded.store.versions("main")] == [0, 0]


def damage(version: PolicyVersion) -> None:
    with (Path(version.path) / "adapter_model.safetensors").open("ab") as file:
        file.write(b"!")


def test_a_changed_adapter_of_the_serving_version_falls_back_to_its_parent(recorded, model_path):
    recorded.add_mixed(16 * 3)
    train(recorded, model_path, FakeEngine(recorded.store, 2))
    first, second = recorded.store.versions("main")
    damage(second)
    engine = FakeEngine(recorded.store)
    train(recorded, model_path, engine)
    assert (engine.withdrawn, engine.published) == ([2], [3])
    _, second, third = recorded.store.versions("main")
    assert second.state is VersionState.REJECTED
    assert "changed on disk" in second.reason
    assert (third.parent, third.state) == (first.number, VersionState.SERVING)


def test_a_chain_of_changed_adapters_falls_back_to_the_base(recorded, model_path):
    recorded.add_mixed(16 * 3)
    train(recorded, model_path, FakeEngine(recorded.store, 2))
    for version in recorded.store.versions("main"):
        damage(version)
    engine = FakeEngine(recorded.store)
    train(recorded, model_path, engine)
    assert engine.withdrawn == [2, 1]
    assert [v.parent for v in recorded.store.versions("main")] == [0, 1, 0]


def test_a_changed_candidate_is_rejected_and_training_goes_on_without_it(recorded, model_path):
    recorded.add_mixed(16 * 2)
    engine = FakeEngine(recorded.store, 1)
    verified = []

    def publish(version: PolicyVersion, withdraw: bool = False) -> None:
        if not verified:
            verified.append(version.number)
            damage(version)
        verify_adapter(Path(version.path), version.sha256)
        engine(version, withdraw)

    stage.run(recorded.store, CONFIG, model_path, "main", publish, engine.stop)
    first, second = recorded.store.versions("main")
    assert (first.state, second.state) == (VersionState.REJECTED, VersionState.SERVING)
    assert "changed on disk" in first.reason
    assert second.parent == 0


def test_another_rank_cannot_go_on_from_old_weights(recorded, model_path):
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    with pytest.raises(LearnerError, match="lora_rank"):
        train(recorded, model_path, FakeEngine(recorded.store), replace(CONFIG, lora_rank=2))


def test_a_missing_model_is_one_clear_message(recorded, tmp_path):
    with pytest.raises(StartError, match=r"\[engine\] model = "):
        train(recorded, str(tmp_path / "nowhere"), FakeEngine(recorded.store), LearnerConfig())
