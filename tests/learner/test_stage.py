"""The stage on a real store and a tiny model: each sample settles once, and the policy moves."""

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from learner import evaluator, stage
from learner.config import LearnerConfig
from learner.schedule import Schedule
from nextstate.app.views import version_card
from nextstate.engine import adapter_files
from nextstate.engine.adapter_files import verify_adapter
from nextstate.errors import EngineError, LearnerError, StartError
from nextstate.records import PolicyVersion, VersionState
from tests.learner.running_stage import FakeEngine, train, with_hook
from tests.learner.test_tiny_model import (
    BAD,
    CONFIG,
    GOOD,
    PROMPT,
    WITH_CANARIES,
    Recorded,
    backbone_of,
    load_float64,
    logprobs,
    save_tiny_model,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recorded(tmp_path, model_path) -> Recorded:
    return Recorded(tmp_path / "state", model_path)


def adapted_logprobs(model_path: str, version: PolicyVersion, reply: tuple[int, ...]) -> float:
    policy = PeftModel.from_pretrained(load_float64(model_path), version.path).double()
    with torch.no_grad():
        return logprobs(policy, PROMPT, reply).sum().item()


def test_one_update_settles_its_samples_once(recorded, model_path):
    turns = recorded.add_mixed(20)
    engine = FakeEngine(recorded.store)
    train(recorded, model_path, engine)

    assert recorded.states() == {"trained": 16, "ready": 4}
    (version,) = recorded.store.versions.all("main")
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
    first, second = recorded.store.versions.all("main")
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
    (version,) = recorded.store.versions.all("main")
    moved = {r: adapted_logprobs(model_path, version, r) - before[r] for r in (GOOD, BAD)}
    assert moved[liked] > moved[disliked]
    assert recorded.states() == {"trained": 16, "ready": 1}  # a score alone is no use to opd


def test_too_old_and_too_long_samples_are_dropped_and_the_rest_waits(recorded, model_path):
    for number in range(1, 10):
        version = PolicyVersion("main", number, number - 1, None, None, 0, VersionState.RETIRED, {})
        recorded.store.versions.add(version, None)
    recorded.store.versions.set_serving("main", 9)
    old = recorded.add(version=0)
    long = recorded.add(prompt=(7,) * 90, version=9)
    for _ in range(15):
        recorded.add(version=9)
    engine = FakeEngine(recorded.store)
    released = recorded.store.training.release_samples

    def release_then_stop(lineage: str) -> int:
        count = released(lineage)
        if recorded.states().get("dropped") == 2:
            engine.stop.set()
        return count

    recorded.store.training.release_samples = release_then_stop
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
    (version,) = recorded.store.versions.all("main")
    assert json.loads((Path(version.path) / "card.json").read_text())["turns"] == turns


def test_few_samples_train_once_they_have_waited(recorded, model_path):
    recorded.add_mixed(5)
    config = replace(CONFIG, min_batch=4, max_wait_s=0.02)
    train(recorded, model_path, FakeEngine(recorded.store), config)
    assert recorded.states() == {"trained": 5}
    assert recorded.store.versions.all("main")[0].metrics["batch/size"] == 5


def test_too_few_samples_wait_for_ever(recorded, model_path):
    recorded.add_mixed(3)
    engine = FakeEngine(recorded.store)
    looked = iter(range(5))
    ready_samples = recorded.store.training.ready_samples

    def look(lineage: str, scored: bool, hinted: bool) -> int:
        if next(looked, None) is None:
            engine.stop.set()
        return ready_samples(lineage, scored, hinted)

    recorded.store.training.ready_samples = look
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
    (version,) = recorded.store.versions.all("main")
    policy = PeftModel.from_pretrained(load_float64(model_path), version.path).double()
    with torch.no_grad():
        after = [logprobs(policy, PROMPT, GOOD).sum(), logprobs(policy, later, BAD).sum()]
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert version.metrics["drift/mean"] < 1e-5


def test_drifted_log_probs_refuse_to_train_and_lose_nothing(recorded, model_path):
    for _ in range(16):
        recorded.add(shift=0.05)
    engine = FakeEngine(recorded.store)
    with pytest.raises(LearnerError, match=r"0\.0500 nats .*drift_limit = 0\.02"):
        train(recorded, model_path, engine)
    assert recorded.states() == {"ready": 16}
    assert recorded.store.versions.all("main") == []


def test_an_older_versions_samples_may_differ(recorded, model_path):
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    for _ in range(16):
        recorded.add(shift=0.05, version=0)
    train(recorded, model_path, engine := FakeEngine(recorded.store))
    assert engine.published == [2]
    assert "drift/mean" not in recorded.store.versions.all("main")[-1].metrics


def test_a_step_that_blows_up_is_rejected_and_training_goes_on(recorded, model_path, monkeypatch):
    passes = []

    def first_explodes(gradient):
        passes.append(gradient)
        return torch.full_like(gradient, math.nan) if len(passes) == 1 else None

    with_hook(
        monkeypatch,
        lambda trainer: next(
            weight.register_hook(first_explodes)
            for weight in trainer.policy.parameters()
            if weight.requires_grad
        ),
    )
    recorded.add_mixed(16 * 2)
    train(recorded, model_path, engine := FakeEngine(recorded.store))
    first, second = recorded.store.versions.all("main")
    assert engine.published == [2]
    assert (first.state, second.parent) == (VersionState.REJECTED, 0)
    assert first.reason.startswith("the adapter's largest change of a layer, is nan")
    assert recorded.states() == {"dropped": 16, "trained": 16}
    assert "step/kl" not in first.metrics
    assert "step/length" in version_card(first, [], "", "")


def test_a_failing_engine_is_tried_again(recorded, model_path):
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
    assert recorded.store.versions.all("main")[0].state is VersionState.CANDIDATE
    up = FakeEngine(recorded.store)
    train(recorded, model_path, up)
    assert up.published == [1]
    assert recorded.store.versions.serving("main").number == 1


@pytest.mark.parametrize("learning_rate", [1e-2, 0.0])
def test_a_restart_goes_on_with_weights_optimizer_rate_and_loss(
    tmp_path, model_path, learning_rate
):
    config = replace(CONFIG, learning_rate=learning_rate)
    adapters, losses = [], []
    for runs in ([2], [1, 1]):
        recorded = Recorded(tmp_path / str(len(runs)), model_path)
        recorded.add_mixed(32)
        for wanted in runs:
            train(recorded, model_path, FakeEngine(recorded.store, wanted), config)
        newest = recorded.store.versions.all("main")[-1]
        adapters.append(newest.sha256)
        losses.append(newest.metrics["loss"])
    assert adapters[0] == adapters[1]
    assert losses[0] == losses[1]


def test_after_a_rollback_training_goes_on_from_the_serving_version(recorded, model_path):
    recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 3)

    def roll_back(version: PolicyVersion) -> None:
        if version.number == 2:
            recorded.store.versions.set_serving("main", 1)

    engine.after = roll_back
    train(recorded, model_path, engine)
    assert [v.parent for v in recorded.store.versions.all("main")] == [0, 1, 1]


def test_a_return_to_the_newest_version_takes_training_back_to_it(recorded, model_path):
    recorded.add_mixed(32)
    engine = FakeEngine(recorded.store, 3)
    engine.after = lambda version: (
        version.number == 2 and recorded.store.versions.set_serving("main", 1)
    )

    def back_again(_: float) -> bool:  # what a person does while the learner finds nothing to train
        if recorded.store.versions.serving("main").number == 1:
            recorded.store.versions.set_serving("main", 2)
            recorded.add_mixed(16)
        return engine.stop.is_set()

    engine.stop.wait = back_again
    train(recorded, model_path, engine)
    assert [v.parent for v in recorded.store.versions.all("main")] == [0, 1, 2]


def test_a_rollback_to_the_base_starts_from_the_base(recorded, model_path):
    recorded.add_mixed(16 * 2)
    engine = FakeEngine(recorded.store, 2)
    engine.after = lambda _: recorded.store.versions.set_serving("main", 0)
    train(recorded, model_path, engine)
    assert [v.parent for v in recorded.store.versions.all("main")] == [0, 0]


def damage(version: PolicyVersion) -> None:
    with (Path(version.path) / "adapter_model.safetensors").open("ab") as file:
        file.write(b"!")


def test_a_changed_adapter_of_the_serving_version_falls_back_to_its_parent(recorded, model_path):
    recorded.add_mixed(16 * 3)
    train(recorded, model_path, FakeEngine(recorded.store, 2))
    first, second = recorded.store.versions.all("main")
    damage(second)
    engine = FakeEngine(recorded.store)
    train(recorded, model_path, engine)
    assert (engine.withdrawn, engine.published) == ([2], [3])
    _, second, third = recorded.store.versions.all("main")
    assert second.state is VersionState.REJECTED
    assert "changed on disk" in second.reason
    assert (third.parent, third.state) == (first.number, VersionState.SERVING)


def test_a_serving_version_that_cannot_be_read_for_now_is_waited_for(
    recorded, model_path, monkeypatch
):
    recorded.add_mixed(16 * 2)
    train(recorded, model_path, FakeEngine(recorded.store, 1))
    read, failures = adapter_files.file_sha256, 2

    def fails(path: Path) -> str:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(adapter_files, "file_sha256", fails)
    train(recorded, model_path, engine := FakeEngine(recorded.store))
    assert (engine.withdrawn, engine.published) == ([], [2])
    assert recorded.store.versions.all("main")[1].parent == 1


def test_a_chain_of_changed_adapters_falls_back_to_the_base(recorded, model_path):
    recorded.add_mixed(16 * 3)
    train(recorded, model_path, FakeEngine(recorded.store, 2))
    for version in recorded.store.versions.all("main"):
        damage(version)
    engine = FakeEngine(recorded.store)
    train(recorded, model_path, engine)
    assert engine.withdrawn == [2, 1]
    assert [v.parent for v in recorded.store.versions.all("main")] == [0, 1, 0]


def test_a_changed_candidate_is_rejected_and_training_goes_on_without_it(recorded, model_path):
    recorded.add_mixed(16 * 2)
    engine = FakeEngine(recorded.store, 1)
    verified = []

    def publish(version: PolicyVersion, withdraw: object = None) -> None:
        if not verified:
            verified.append(version.number)
            damage(version)
        verify_adapter(Path(version.path), version.sha256)
        engine(version, withdraw)

    stage.run(recorded.store, CONFIG, model_path, ["main"], publish, engine.stop)
    first, second = recorded.store.versions.all("main")
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
    events, decoding = [], []
    replies = evaluator.decode

    def passes(*_):
        if not decoding:
            events.append("pass")

    def decodes(*given, **options):
        events.append("pass")
        decoding.append(True)  # all of its tokens count as one pass
        found = replies(*given, **options)
        decoding.clear()
        return found

    def asked() -> int:
        events.append("ask")
        return 1 if len(events) in (1, 4, 9) else 0

    with_hook(monkeypatch, lambda trainer: backbone_of(trainer).register_forward_pre_hook(passes))
    monkeypatch.setattr(evaluator, "decode", decodes)
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store)
    config = replace(WITH_CANARIES, schedule="idle", micro_batch_tokens=28)
    stage.run(recorded.store, config, model_path, ["main"], engine, engine.stop, asked)
    assert recorded.states() == {"trained": 16}
    runs = [len(run.split()) for run in " ".join(events).split("ask")]
    assert runs[0] == 0
    assert sum(runs) >= 12
    assert max(runs) == 1


def test_a_gpu_that_is_full_is_told_with_what_would_help(recorded, model_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    with_hook(monkeypatch, lambda trainer: backbone_of(trainer).register_forward_pre_hook(full))
    recorded.add_mixed(16)
    with pytest.raises(LearnerError, match=r"CUDA out of memory; lower .*micro_batch_tokens"):
        train(recorded, model_path, FakeEngine(recorded.store))


def test_outside_its_window_the_learner_leases_nothing(recorded, model_path, monkeypatch):
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store)

    def closed_until_the_end(schedule: Schedule) -> bool:
        assert recorded.states() == {"ready": 16}
        engine.stop.set()
        return False

    monkeypatch.setattr(Schedule, "may_update", closed_until_the_end)
    train(recorded, model_path, engine)
    assert recorded.states() == {"ready": 16}


def test_without_an_engine_an_idle_schedule_is_refused(recorded, model_path):
    with pytest.raises(StartError, match=r"schedule = \"idle\" asks the engine"):
        train(recorded, model_path, FakeEngine(recorded.store), replace(CONFIG, schedule="idle"))


def test_weights_go_on_only_with_the_scale_they_were_trained_for(recorded, model_path):
    recorded.add_mixed(32)
    train(recorded, model_path, FakeEngine(recorded.store))
    with pytest.raises(LearnerError, match=r"lora_alpha = 8, .* set it back"):
        train(recorded, model_path, FakeEngine(recorded.store), replace(CONFIG, lora_alpha=16))
    assert recorded.states() == {"trained": 16, "ready": 16}


def test_an_adapter_of_all_linear_layers_learns(recorded, model_path):
    recorded.add_mixed(32)
    config = replace(CONFIG, lora_targets=("all-linear",))
    train(recorded, model_path, FakeEngine(recorded.store, 2), config)
    first, second = recorded.store.versions.all("main")
    saved = json.loads((Path(second.path) / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == sorted(LearnerConfig().lora_targets)
    # The saved folder, read as an engine reads it, is the policy that the learner had.
    assert first.metrics["drift/mean"] < 1e-5
    assert adapted_logprobs(model_path, second, GOOD) > adapted_logprobs(model_path, first, GOOD)
