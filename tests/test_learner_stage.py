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
from learner.adapters import load_weights, verify_adapter
from learner.checkpoint import load_checkpoint
from learner.config import LearnerConfig
from learner.schedule import Schedule
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
        self.attempts = 0
        self.after: Callable[[PolicyVersion], None] = lambda _: None
        self._store = store
        self._wanted = wanted
        self._failures = failures

    def __call__(self, version: PolicyVersion) -> None:
        self.attempts += 1
        if self.attempts <= self._failures:
            raise EngineError("the engine is restarting")
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


def test_few_samples_train_once_they_have_waited(recorded, model_path):
    recorded.add_mixed(5)
    config = replace(CONFIG, min_batch=4, max_wait_s=0.02)
    train(recorded, model_path, FakeEngine(recorded.store), config)
    assert recorded.states() == {"trained": 5}
    assert recorded.store.versions("main")[0].metrics["batch/size"] == 5


def test_too_few_samples_wait_for_ever(recorded, model_path):
    recorded.add_mixed(3)
    engine = FakeEngine(recorded.store)
    looked = iter(range(5))
    ready_samples = recorded.store.ready_samples

    def look(lineage: str, scored: bool, hinted: bool) -> int:
        if next(looked, None) is None:
            engine.stop.set()
        return ready_samples(lineage, scored, hinted)

    recorded.store.ready_samples = look
    train(recorded, model_path, engine, replace(CONFIG, min_batch=4, max_wait_s=1e-6))
    assert recorded.states() == {"ready": 3}


def test_stale_samples_may_differ_by_no_more_than_the_steps_since_explain(recorded, model_path):
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    for _ in range(16):
        recorded.add(shift=0.5, version=0)
    engine = FakeEngine(recorded.store)
    with pytest.raises(LearnerError, match=r"step_kl lets the steps in between explain.*drift"):
        train(recorded, model_path, engine)
    assert recorded.states() == {"trained": 16, "ready": 16}


def test_turns_of_one_session_train_with_what_came_between_masked(recorded, model_path):
    """The rewarded reply rises and the tool's answer between two replies is nobody's."""
    tool = (40, 41, 42)
    for _ in range(8):
        recorded.add(GOOD, 1)
        recorded.add(BAD, -1, prompt=(*PROMPT, *GOOD, *tool))
    base = load_float64(model_path)
    later = (*PROMPT, *GOOD, *tool)
    with torch.no_grad():
        before = [logprobs(base, PROMPT, GOOD).sum(), logprobs(base, later, BAD).sum()]
    train(recorded, model_path, FakeEngine(recorded.store))
    (version,) = recorded.store.versions("main")
    policy = PeftModel.from_pretrained(load_float64(model_path), version.path).double()
    with torch.no_grad():
        after = [logprobs(policy, PROMPT, GOOD).sum(), logprobs(policy, later, BAD).sum()]
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert version.metrics["drift/mean"] < 1e-5


@pytest.mark.parametrize("rolled_back", [False, True])
def test_the_average_teacher_is_resumed_and_begins_anew_after_a_rollback(
    tmp_path, model_path, rolled_back
):
    config = replace(CONFIG, teacher="average", teacher_decay=0.5)
    averages = []
    for runs in ([2], [1, 1]):
        recorded = Recorded(tmp_path / str(len(runs)), model_path)
        for _ in range(16):
            recorded.add_mixed(1)
            recorded.add(GOOD, -1, hinted=(9, *PROMPT))
        for wanted in runs:
            engine = FakeEngine(recorded.store, wanted)
            if rolled_back:
                engine.after = lambda _, store=recorded.store: store.set_serving("main", 0)
            train(recorded, model_path, engine, config)
        checkpoint = load_checkpoint(recorded.store.dir / "learner/main")
        newest = load_weights(Path(recorded.store.versions("main")[-1].path))
        averages.append(checkpoint.state["average"])
    assert all(map(torch.equal, *averages))
    assert {v.shape for v in averages[0]} == {v.shape for v in newest.values()}
    first = averages[0][1]  # the first layer's first B, which begins at 0
    ours = newest["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    if rolled_back:  # after one step from the base it is half of that step
        assert torch.allclose(first, 0.5 * ours)
    else:
        assert not torch.allclose(first, 0.5 * ours)


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


def test_a_changed_adapter_stops_the_start(recorded, model_path):
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    (version,) = recorded.store.versions("main")
    with (Path(version.path) / "adapter_model.safetensors").open("ab") as file:
        file.write(b"!")
    with pytest.raises(LearnerError, match="changed on disk"):
        train(recorded, model_path, FakeEngine(recorded.store))


def test_another_rank_cannot_go_on_from_old_weights(recorded, model_path):
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    with pytest.raises(LearnerError, match="lora_rank"):
        train(recorded, model_path, FakeEngine(recorded.store), replace(CONFIG, lora_rank=2))


def test_an_idle_learner_asks_the_engine_before_every_micro_batch(recorded, model_path):
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store)
    busy = iter([1, 0, 0, 2, 0, 0])
    config = replace(CONFIG, schedule="idle", micro_batch_tokens=40)
    stage.run(recorded.store, config, model_path, "main", engine, engine.stop, lambda: next(busy))
    assert next(busy, None) is None
    assert recorded.states() == {"trained": 16}


def test_outside_its_window_the_learner_leases_nothing(recorded, model_path, monkeypatch):
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store)

    def closed_until_the_end(schedule: Schedule) -> None:
        assert recorded.states() == {"ready": 16}
        engine.stop.set()

    monkeypatch.setattr(Schedule, "before_update", closed_until_the_end)
    train(recorded, model_path, engine)
    assert recorded.states() == {"ready": 16}


def test_without_an_engine_an_idle_schedule_is_refused(recorded, model_path):
    with pytest.raises(StartError, match=r"schedule = \"idle\" asks the engine"):
        train(recorded, model_path, FakeEngine(recorded.store), replace(CONFIG, schedule="idle"))


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"rslora": True}])
def test_weights_go_on_only_with_the_scale_they_were_trained_for(recorded, model_path, change):
    recorded.add_mixed(32)
    train(recorded, model_path, FakeEngine(recorded.store))
    with pytest.raises(LearnerError, match=r"lora_alpha = 8, rslora = false.* set them back"):
        train(recorded, model_path, FakeEngine(recorded.store), replace(CONFIG, **change))
    assert recorded.states() == {"trained": 16, "ready": 16}


def test_a_rank_stabilised_adapter_of_all_linear_layers_learns(recorded, model_path):
    recorded.add_mixed(32)
    config = replace(CONFIG, rslora=True, lora_targets=("all-linear",))
    train(recorded, model_path, FakeEngine(recorded.store, 2), config)
    first, second = recorded.store.versions("main")
    saved = json.loads((Path(second.path) / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == sorted(LearnerConfig().lora_targets)
    assert saved["use_rslora"] is True
    # The saved folder, read as an engine would, is the policy that the learner had.
    assert first.metrics["drift/mean"] < 1e-5
    assert adapted_logprobs(model_path, second, GOOD) > adapted_logprobs(model_path, first, GOOD)


def test_a_missing_model_is_one_clear_message(recorded, tmp_path):
    with pytest.raises(StartError, match=r"\[engine\] model = "):
        train(recorded, str(tmp_path / "nowhere"), FakeEngine(recorded.store), LearnerConfig())
