"""The stage on a real store and a tiny model: each sample settles once, and the policy moves."""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from learner import examiner, stage
from learner.adapters import load_weights
from learner.checkpoint import load_checkpoint
from learner.config import LearnerConfig
from learner.schedule import Schedule
from learner.selection import is_held_out
from learner.trainer import PolicyTrainer
from nextstate.app.views import version_card
from nextstate.engine.adapter_files import verify_adapter
from nextstate.errors import EngineError, LearnerError, StartError
from nextstate.records import Feedback, PolicyVersion, VersionState
from nextstate.store.store import Store
from tests.learner.test_tiny_model import (
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
    stage.run(recorded.store, config, model_path, ["main"], engine, engine.stop)


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


@pytest.mark.parametrize("method", ["binary", "combined", "combined_sampled"])
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


def test_a_step_that_blows_up_is_rejected_and_training_goes_on(recorded, model_path, monkeypatch):
    step, steps = PolicyTrainer.training_step, []

    def first_explodes(self, *given):
        loss = step(self, *given)
        if not steps:
            self._trainable()[0].grad.fill_(math.nan)
        steps.append(loss)
        return loss

    monkeypatch.setattr(PolicyTrainer, "training_step", first_explodes)
    recorded.add_mixed(16 * 2)
    train(recorded, model_path, engine := FakeEngine(recorded.store))
    first, second = recorded.store.versions("main")
    assert engine.published == [2]
    assert (first.state, second.parent) == (VersionState.REJECTED, 0)
    assert first.reason.startswith("the adapter's largest change of a layer, is nan")
    assert recorded.states() == {"dropped": 16, "trained": 16}
    assert "step/kl" not in first.metrics
    assert "step/length" in version_card(first, [])


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

    stage.run(recorded.store, CONFIG, model_path, ["main"], fail_and_stop, down.stop)
    assert recorded.store.versions("main")[0].state is VersionState.CANDIDATE
    up = FakeEngine(recorded.store)
    train(recorded, model_path, up)
    assert up.published == [1]
    assert recorded.store.serving("main").number == 1


def test_a_restart_goes_on_with_weights_optimizer_and_loss(tmp_path, model_path):
    adapters, losses = [], []
    for runs in ([2], [1, 1]):
        recorded = Recorded(tmp_path / str(len(runs)), model_path)
        recorded.add_mixed(32)
        for wanted in runs:
            train(recorded, model_path, FakeEngine(recorded.store, wanted))
        newest = recorded.store.versions("main")[-1]
        adapters.append(newest.sha256)
        losses.append(newest.metrics["loss"])
    assert adapters[0] == adapters[1]
    assert losses[0] == losses[1]


def test_after_a_rollback_training_goes_on_from_the_serving_version(recorded, model_path):
    recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 3)

    def roll_back(version: PolicyVersion) -> None:
        if version.number == 2:
            recorded.store.set_serving("main", 1)

    engine.after = roll_back
    train(recorded, model_path, engine)
    assert [v.parent for v in recorded.store.versions("main")] == [0, 1, 1]


def test_a_return_to_the_newest_version_takes_training_back_to_it(recorded, model_path):
    recorded.add_mixed(32)
    engine = FakeEngine(recorded.store, 3)
    engine.after = lambda version: version.number == 2 and recorded.store.set_serving("main", 1)

    def back_again(_: float) -> bool:  # what a person does while the learner finds nothing to train
        if recorded.store.serving("main").number == 1:
            recorded.store.set_serving("main", 2)
            recorded.add_mixed(16)
        return engine.stop.is_set()

    engine.stop.wait = back_again
    train(recorded, model_path, engine)
    assert [v.parent for v in recorded.store.versions("main")] == [0, 1, 2]


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

    stage.run(recorded.store, CONFIG, model_path, ["main"], publish, engine.stop)
    first, second = recorded.store.versions("main")
    assert (first.state, second.state) == (VersionState.REJECTED, VersionState.SERVING)
    assert "changed on disk" in first.reason
    assert second.parent == 0


def test_another_rank_cannot_go_on_from_old_weights(recorded, model_path):
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    with pytest.raises(LearnerError, match="lora_rank"):
        train(recorded, model_path, FakeEngine(recorded.store), replace(CONFIG, lora_rank=2))


def test_an_idle_learner_asks_the_engine_before_the_passes_over_every_micro_batch(
    recorded, model_path, monkeypatch
):
    """Those of the step, of measuring it, and of the gate."""
    events = []
    score, replies = PolicyTrainer._score, examiner.answers

    def passes(trainer, model, sequences):
        events.append("pass")
        return score(trainer, model, sequences)

    def decodes(*given, **options):
        events.append("pass")
        return replies(*given, **options)

    def asked() -> int:
        events.append("ask")
        return 1 if len(events) in (1, 4, 9) else 0

    monkeypatch.setattr(PolicyTrainer, "_score", passes)
    monkeypatch.setattr(examiner, "answers", decodes)
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store)
    config = replace(CONFIG, schedule="idle", micro_batch_tokens=28)
    stage.run(recorded.store, config, model_path, ["main"], engine, engine.stop, asked)
    assert recorded.states() == {"trained": 16}
    runs = [len(run.split()) for run in " ".join(events).split("ask")]
    assert runs[0] == 0
    assert sum(runs) >= 12
    assert max(runs) <= 2, "the policy and the base read each micro-batch"


def test_a_gpu_that_is_full_is_told_with_what_would_help(recorded, model_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(PolicyTrainer, "_score", full)
    recorded.add_mixed(16)
    with pytest.raises(LearnerError, match=r"CUDA out of memory; lower .*micro_batch_tokens"):
        train(recorded, model_path, FakeEngine(recorded.store))


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


SURE = replace(CONFIG, gate_canaries=0)


def reject_all(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Lets the gate object to the versions with these numbers, or to all."""

    def objection(_found: object, _config: object) -> str | None:
        calls.append(len(calls) + 1)
        return "it was told to" if not numbers or calls[-1] in numbers else None

    calls: list[int] = []
    monkeypatch.setattr(stage, "objection", objection)


def test_a_rejected_candidate_never_serves_and_its_samples_are_dropped_with_the_reason(
    recorded, model_path, monkeypatch
):
    reject_all(monkeypatch, 2)
    turns = recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 2)
    train(recorded, model_path, engine, SURE)
    first, second, third = recorded.store.versions("main")
    assert engine.published == [1, 3]
    assert (second.state, second.reason) == (VersionState.REJECTED, "it was told to")
    assert (second.path, second.sha256) == (None, None)
    assert (first.parent, second.parent, third.parent) == (0, 1, 1)
    assert recorded.states() == {"trained": 32, "dropped": 16}
    assert recorded.reason(turns[16]) == "their version 2 was rejected: it was told to"
    assert [t for t, _ in recorded.store.used_turns("main", 2)] == turns[16:32]
    folder = recorded.store.dir / "versions/main"
    assert sorted(p.name for p in folder.iterdir()) == ["v000001", "v000003"]


def test_after_a_rejection_training_goes_on_as_if_the_step_had_not_been(
    tmp_path, model_path, monkeypatch
):
    """Weights and moments: the version after it is the one that a learner without it makes."""
    found = []
    for rejected in (True, False):
        recorded = Recorded(tmp_path / str(rejected), model_path)
        recorded.add_mixed(16)
        train(recorded, model_path, FakeEngine(recorded.store), SURE)
        with monkeypatch.context() as patched:
            if rejected:
                # Other samples than those that the second learner takes.
                for _ in range(16):
                    recorded.add(GOOD, -1)
                reject_all(patched, 1)
            for _ in range(16):
                recorded.add(BAD, 1)
            train(recorded, model_path, FakeEngine(recorded.store), SURE)
        found.append(recorded.store.versions("main")[-1])
    assert [version.number for version in found] == [3, 2]
    assert found[0].sha256 == found[1].sha256
    assert found[0].metrics["loss"] == found[1].metrics["loss"]


def test_rejections_in_a_row_say_what_to_change_and_go_on(
    recorded, model_path, monkeypatch, caplog
):
    reject_all(monkeypatch, 1, 2, 3)
    recorded.add_mixed(16 * 4)
    engine = FakeEngine(recorded.store)
    train(recorded, model_path, engine, SURE)
    assert engine.published == [4]
    assert recorded.states() == {"dropped": 48, "trained": 16}
    (said,) = (r.getMessage() for r in caplog.records if "in a row" in r.getMessage())
    assert said.startswith("3 versions in a row were rejected lineage=main: lower [learner] learn")


def test_a_step_that_the_bounds_forbid_is_rejected_by_the_real_gate(recorded, model_path):
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store)
    config = replace(SURE, gate_kl_parent=1e-12, poll_s=0.001)
    released = recorded.store.ready_samples

    def stop_when_done(*arguments: object) -> int:
        if recorded.states() == {"dropped": 16}:
            engine.stop.set()
        return released(*arguments)

    recorded.store.ready_samples = stop_when_done
    train(recorded, model_path, engine, config)
    (version,) = recorded.store.versions("main")
    assert version.state is VersionState.REJECTED
    assert "gate_kl_parent = 1e-12" in version.reason
    assert version.metrics["gate/kl_parent"] > 1e-12
    assert engine.published == []


def held_config(share: float) -> LearnerConfig:
    return replace(CONFIG, holdout=share)


def test_held_out_sessions_never_train_and_every_candidate_is_checked_on_them(recorded, model_path):
    names = [f"s{i}" for i in range(80)]
    held = {name for name in names if is_held_out("main", name, 0.3)}
    for i, name in enumerate(names):
        recorded.add(GOOD if i % 2 else BAD, 1 if i % 2 else -1, session=name)
    train(recorded, model_path, FakeEngine(recorded.store, 3), held_config(0.3))
    assert recorded.states() == {"trained": 48, "held": len(held), "ready": 32 - len(held)}
    checked_on = recorded.store.held_samples("main", 100, 4)
    assert {s.session for s in checked_on} == held
    versions = recorded.store.versions("main")
    assert [v.metrics["gate/sessions"] for v in versions] == [len(held)] * 3
    assert all(v.metrics["gate/rank"] > 0 for v in versions)
    used = {turn for v in versions for turn, _ in recorded.store.used_turns("main", v.number)}
    assert not used & {s.turn for s in checked_on}


def test_the_backlog_is_looked_through_only_when_a_batch_is_due(recorded, model_path):
    recorded.add_mixed(4)
    engine, store = FakeEngine(recorded.store), recorded.store
    config = replace(held_config(0.3), poll_s=0.001, holdout_after=0)
    count, looks, held = store.ready_samples, [], []

    def look(*arguments: object) -> int:
        looks.append(arguments)
        if len(looks) == 9:
            engine.stop.set()
        return count(*arguments)

    store.ready_samples = look
    store.hold_out = lambda *arguments: held.append(arguments) or 0
    train(recorded, model_path, engine, config)
    assert (len(looks), held) == (9, [])


def test_the_first_versions_train_on_every_session_and_those_are_never_held_out(
    recorded, model_path
):
    chosen = [name for i in range(99) if is_held_out("main", name := f"s{i}", 0.3)]
    config = replace(held_config(0.3), holdout_after=1)
    for i in range(16):
        recorded.add(GOOD if i % 2 else BAD, 1 if i % 2 else -1, session=chosen[0])
    train(recorded, model_path, FakeEngine(recorded.store), config)
    assert recorded.states() == {"trained": 16}
    for i in range(16):  # the same session goes on, and another of the chosen ones begins
        recorded.add(GOOD if i % 2 else BAD, 1 if i % 2 else -1, session=chosen[0])
        recorded.add(GOOD, 1, session=chosen[1])
    train(recorded, model_path, FakeEngine(recorded.store), config)
    assert recorded.states() == {"trained": 32, "held": 16}


def test_feedback_on_a_held_out_turn_counts_and_the_turn_stays_held_out(recorded, model_path):
    name = next(f"s{i}" for i in range(99) if is_held_out("main", f"s{i}", 0.1))
    turn = recorded.add(GOOD, 1, session=name)
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    recorded.store.give_feedback(Feedback(turn, -1))
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    assert recorded.states() == {"trained": 32, "held": 1}
    assert [s.score for s in recorded.store.held_samples("main", 9, 4)] == [-1]


def test_a_version_that_makes_things_worse_is_rolled_back_by_itself(recorded, model_path):
    recorded.add_mixed(16 * 2)
    engine = FakeEngine(recorded.store, 2)

    def complain(version: PolicyVersion) -> None:
        for _ in range(40):
            score = 1 if version.number == 1 else -1
            recorded.add(GOOD, score, version=version.number, trainable=False)

    engine.after = complain
    train(recorded, model_path, engine)
    assert engine.published == [1, 2]

    again = FakeEngine(recorded.store, 1)
    recorded.add_mixed(16)
    train(recorded, model_path, again)
    assert (again.withdrawn, again.published) == ([2], [3])
    first, second, third = recorded.store.versions("main")
    assert second.state is VersionState.REJECTED
    assert second.reason.startswith("rolled back: its turns score -1.00 on average (40 verdicts)")
    assert (third.parent, third.state) == (first.number, VersionState.SERVING)


@pytest.mark.parametrize("chosen", [1, 2])
def test_what_a_person_put_into_service_is_left_alone(recorded, model_path, chosen):
    """An older version with worse verdicts than before it, or the one that was rolled back."""
    recorded.add_mixed(16 * 2)
    train(recorded, model_path, FakeEngine(recorded.store, 2), replace(CONFIG, watch_level=0.0))
    _, second = recorded.store.versions("main")
    if chosen == 2:
        recorded.store.replace_serving(replace(second, reason="rolled back: …"), 1)
    recorded.store.set_serving("main", chosen)
    for version in range(3):
        for _ in range(40):
            bad = version == chosen
            recorded.add(GOOD, -1 if bad else 1, version=version, trainable=False)
    engine = FakeEngine(recorded.store)
    looks = []
    counts = recorded.store.ready_samples

    def stop_after_3_looks(*arguments: object) -> int:
        looks.append(arguments)
        if len(looks) == 3:
            engine.stop.set()
        return counts(*arguments)

    recorded.store.ready_samples = stop_after_3_looks
    train(recorded, model_path, engine)
    assert engine.withdrawn == []
    assert recorded.store.serving("main").number == chosen


def test_a_full_disk_registers_nothing_and_is_tried_again(
    recorded, model_path, monkeypatch, caplog
):
    """`save_file` fails as safetensors does; the real thing is in test_learner_adapters.py."""
    monkeypatch.setattr(stage, "_FULL_DISK_WAIT_S", 0.001)
    recorded.add_mixed(16)
    saved, states = [], []

    def full_at_first(*arguments: object, **options: object) -> None:
        saved.append(recorded.states())
        if len(saved) == 1:
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        save_file(*arguments, **options)

    monkeypatch.setattr("learner.adapters.save_file", full_at_first)
    released = recorded.store.release_samples

    def release(lineage: str) -> int:
        count = released(lineage)
        states.append((recorded.states(), recorded.store.versions("main")))
        return count

    recorded.store.release_samples = release
    engine = FakeEngine(recorded.store)
    train(recorded, model_path, engine)
    assert states[-1] == ({"ready": 16}, [])
    assert engine.published == [1]
    assert recorded.states() == {"trained": 16}
    assert any("make room" in r.getMessage() for r in caplog.records)


def test_a_checkpoint_that_cannot_be_written_takes_its_adapter_with_it(
    recorded, model_path, monkeypatch
):
    monkeypatch.setattr(stage, "_FULL_DISK_WAIT_S", 0.001)
    recorded.add_mixed(16)
    real, found = torch.save, []

    def full_at_first(*arguments: object, **options: object) -> None:
        found.append(sorted(p.name for p in (recorded.store.dir / "versions/main").iterdir()))
        if len(found) == 1:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        real(*arguments, **options)

    monkeypatch.setattr(torch, "save", full_at_first)
    engine = FakeEngine(recorded.store)
    forgotten = []
    undo = stage._Learner._undo

    def look_then_undo(learner: stage._Learner, before: object) -> None:
        forgotten.extend((recorded.store.dir / "versions/main").iterdir())
        undo(learner, before)

    monkeypatch.setattr(stage._Learner, "_undo", look_then_undo)
    train(recorded, model_path, engine)
    assert found == [["v000001"], ["v000001"]]
    assert forgotten == []
    assert recorded.states() == {"trained": 16}
