"""What becomes of a candidate: rejected, held-out turns, rolled back, or a disk that is full."""

from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from learner import lineage
from learner.config import LearnerConfig
from learner.schedule import Schedule
from learner.selection import is_held_out
from learner.trainer import PolicyTrainer
from nextstate.errors import LearnerError
from nextstate.records import Feedback, PolicyVersion, VersionState
from nextstate.store.shares import OWNER
from nextstate.training_status import read_training_status
from tests.learner.running_stage import FakeEngine, train
from tests.learner.test_tiny_model import BAD, CONFIG, GOOD, HOLDS_OUT, Recorded, save_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recorded(tmp_path, model_path) -> Recorded:
    return Recorded(tmp_path / "state", model_path)


def reject_all(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Lets the gate object to the versions with these numbers, or to all."""

    def objection(_found: object, _config: object) -> str | None:
        calls.append(len(calls) + 1)
        return "it was told to" if not numbers or calls[-1] in numbers else None

    calls: list[int] = []
    monkeypatch.setattr(lineage, "objection", objection)


def test_a_rejected_candidate_never_serves_and_its_samples_are_dropped_with_the_reason(
    recorded, model_path, monkeypatch
):
    reject_all(monkeypatch, 2)
    turns = recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 2)
    train(recorded, model_path, engine)
    first, second, third = recorded.store.versions.all("main")
    assert engine.published == [1, 3]
    assert (second.state, second.reason) == (VersionState.REJECTED, "it was told to")
    assert (second.path, second.sha256) == (None, None)
    assert (first.parent, second.parent, third.parent) == (0, 1, 1)
    assert recorded.states() == {"trained": 32, "dropped": 16}
    assert recorded.reason(turns[16]) == "their version 2 was rejected: it was told to"
    assert [t for t, _ in recorded.store.versions.used_turns("main", 2)] == turns[16:32]
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
        train(recorded, model_path, FakeEngine(recorded.store))
        with monkeypatch.context() as patched:
            if rejected:
                # Other samples than those that the second learner takes.
                for _ in range(16):
                    recorded.add(GOOD, -1)
                reject_all(patched, 1)
            for _ in range(16):
                recorded.add(BAD, 1)
            train(recorded, model_path, FakeEngine(recorded.store))
        found.append(recorded.store.versions.all("main")[-1])
    assert [version.number for version in found] == [3, 2]
    assert found[0].sha256 == found[1].sha256
    assert found[0].metrics["loss"] == found[1].metrics["loss"]


def test_a_step_that_the_bounds_forbid_is_rejected_by_the_real_gate(recorded, model_path):
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store)
    config = replace(CONFIG, gate_kl_parent=1e-12, poll_s=0.001)
    released = recorded.store.training.ready_samples

    def stop_when_done(*arguments: object) -> int:
        if recorded.states() == {"dropped": 16}:
            engine.stop.set()
        return released(*arguments)

    recorded.store.training.ready_samples = stop_when_done
    train(recorded, model_path, engine, config)
    (version,) = recorded.store.versions.all("main")
    assert version.state is VersionState.REJECTED
    assert "over the bound of 1e-12" in version.reason
    assert version.metrics["gate/kl_parent"] > 1e-12
    assert engine.published == []


def held_out(session: str, share: float) -> bool:
    return is_held_out("main", session, share, HOLDS_OUT)


def held_config(share: float) -> LearnerConfig:
    return replace(CONFIG, holdout=share)


def test_held_out_sessions_never_train_and_every_candidate_is_checked_on_them(recorded, model_path):
    names = [f"s{i}" for i in range(80)]
    held = {name for name in names if held_out(name, 0.3)}
    for i, name in enumerate(names):
        recorded.add(GOOD if i % 2 else BAD, 1 if i % 2 else -1, session=name)
    train(recorded, model_path, FakeEngine(recorded.store, 3), held_config(0.3))
    assert recorded.states() == {"trained": 48, "held": len(held), "ready": 32 - len(held)}
    checked_on = recorded.store.training.held_samples("main", 100, 4)
    assert {s.session for s in checked_on} == held
    versions = recorded.store.versions.all("main")
    assert [v.metrics["gate/sessions"] for v in versions] == [len(held)] * 3
    assert all(v.metrics["gate/rank"] > 0 for v in versions)
    used = {
        turn for v in versions for turn, _ in recorded.store.versions.used_turns("main", v.number)
    }
    assert not used & {s.turn for s in checked_on}


def test_the_backlog_is_looked_through_only_when_a_batch_is_due(recorded, model_path):
    recorded.add_mixed(4)
    engine, store = FakeEngine(recorded.store), recorded.store
    config = replace(held_config(0.3), poll_s=0.001, holdout_after=0)
    count, looks, held = store.training.ready_samples, [], []

    def look(*arguments: object) -> int:
        looks.append(arguments)
        if len(looks) == 9:
            engine.stop.set()
        return count(*arguments)

    store.training.ready_samples = look
    store.training.hold_out = lambda *arguments: held.append(arguments) or 0
    train(recorded, model_path, engine, config)
    assert (len(looks), held) == (9, [])


def test_the_first_versions_train_on_every_session_and_those_are_never_held_out(
    recorded, model_path
):
    chosen = [name for i in range(99) if held_out(name := f"s{i}", 0.3)]
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
    name = next(f"s{i}" for i in range(99) if held_out(f"s{i}", 0.1))
    turn = recorded.add(GOOD, 1, session=name)
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    recorded.store.reviewing.give(Feedback(turn, -1), OWNER)
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store))
    assert recorded.states() == {"trained": 32, "held": 1}
    assert [s.score for s in recorded.store.training.held_samples("main", 9, 4)] == [-1]


def complain_from(recorded: Recorded, first_bad: int, turns: int = 60):
    """Judges turns of one session as each version comes into service: bad from one version on."""

    def complain(version: PolicyVersion) -> None:
        for _ in range(turns):
            score = 1 if version.number < first_bad else -1
            recorded.add(GOOD, score, version=version.number, trainable=False)

    return complain


def test_what_made_things_worse_is_rolled_back_with_all_that_was_trained_from_it(
    recorded, model_path
):
    recorded.add_mixed(16 * 3)
    engine = FakeEngine(recorded.store, 3)
    engine.after = complain_from(recorded, 2, turns=20)
    train(recorded, model_path, engine, replace(CONFIG, watch=False))
    again = FakeEngine(recorded.store, 1)
    recorded.add_mixed(16)
    train(recorded, model_path, again)
    assert (again.withdrawn, again.published) == ([3], [4])
    first, second, third, fourth = recorded.store.versions.all("main")
    assert [v.state for v in (second, third)] == [VersionState.REJECTED] * 2
    assert second.reason == third.reason
    assert second.reason.startswith("rolled back: since version 2 the mean score fell by ")
    assert (fourth.parent, fourth.state) == (first.number, VersionState.SERVING)


def test_a_watch_that_is_off_rolls_nothing_back(recorded, model_path):
    recorded.add_mixed(16 * 2)
    engine = FakeEngine(recorded.store, 2)
    engine.after = complain_from(recorded, 2)
    train(recorded, model_path, engine, replace(CONFIG, watch=False))
    recorded.add_mixed(16)
    again = FakeEngine(recorded.store, 1)
    train(recorded, model_path, again, replace(CONFIG, watch=False))
    assert (again.withdrawn, again.published) == ([], [3])


def withdraw_only(recorded: Recorded, engine: FakeEngine) -> FakeEngine:
    """An engine whose learner ends with the first withdrawal."""
    replaced = recorded.store.versions.replace_serving

    def ends(*given: object) -> bool:
        engine.stop.set()
        return replaced(*given)

    recorded.store.versions.replace_serving = ends
    return engine


def test_outside_its_window_the_watch_withdraws_and_nothing_trains(
    recorded, model_path, monkeypatch
):
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store, 1)
    engine.after = complain_from(recorded, 1)
    for _ in range(30):
        recorded.add(GOOD, 1, trainable=False)
    train(recorded, model_path, engine)
    recorded.add_mixed(16)
    monkeypatch.setattr(Schedule, "may_update", lambda schedule: False)
    by_day = withdraw_only(recorded, FakeEngine(recorded.store))
    train(recorded, model_path, by_day)
    assert (by_day.withdrawn, by_day.published) == ([1], [])
    assert recorded.store.versions.serving("main").number == 0
    assert recorded.states()["ready"] == 16


def test_a_lineage_that_is_left_alone_after_an_error_is_watched(recorded, model_path, monkeypatch):
    """Its learner goes on for another lineage; when it resumes, it trains from what serves then."""
    recorded.add_mixed(16)
    engine = FakeEngine(recorded.store, 1)
    for _ in range(30):
        recorded.add(GOOD, 1, trainable=False)
    train(recorded, model_path, engine)
    again = withdraw_only(recorded, FakeEngine(recorded.store))

    def drifts(*_: object, **__: object) -> object:
        complain_from(recorded, 1)(recorded.store.versions.serving("main"))
        raise LearnerError("the log-probs have drifted")

    recorded.store.training.lease_samples, lease = drifts, recorded.store.training.lease_samples
    recorded.add_mixed(16)
    monkeypatch.setattr(lineage, "_WATCH_EVERY_S", 0.0)
    train(recorded, model_path, again, lineages=["main", "other"])
    assert again.withdrawn == [1]
    said = read_training_status(recorded.store.dir, ["main"])["main"]
    assert said == "stopped: the log-probs have drifted"
    recorded.store.training.lease_samples = lease
    last = FakeEngine(recorded.store, 1)
    train(recorded, model_path, last)
    assert recorded.store.versions.all("main")[-1].parent == 0


@pytest.mark.parametrize("chosen", [1, 2])
def test_what_a_person_put_into_service_is_left_alone(recorded, model_path, chosen):
    """An older version with worse verdicts than before it, or the one that was rolled back."""
    recorded.add_mixed(16 * 2)
    train(recorded, model_path, FakeEngine(recorded.store, 2), replace(CONFIG, watch=False))
    _, second = recorded.store.versions.all("main")
    if chosen == 2:
        recorded.store.versions.replace_serving(replace(second, reason="rolled back: …"), 1)
    recorded.store.versions.set_serving("main", chosen)
    for version in range(3):
        for _ in range(60):
            bad = version == chosen
            recorded.add(GOOD, -1 if bad else 1, version=version, trainable=False)
    engine = FakeEngine(recorded.store)
    looks = []
    counts = recorded.store.training.ready_samples

    def stop_after_3_looks(*arguments: object) -> int:
        looks.append(arguments)
        if len(looks) == 3:
            engine.stop.set()
        return counts(*arguments)

    recorded.store.training.ready_samples = stop_after_3_looks
    train(recorded, model_path, engine)
    assert engine.withdrawn == []
    assert recorded.store.versions.serving("main").number == chosen


def test_old_adapters_are_deleted_and_what_is_needed_stays(recorded, model_path):
    recorded.add_mixed(16 * 5)
    engine = FakeEngine(recorded.store, 5)
    engine.after = lambda version: (
        version.number == 1 and recorded.store.versions.set_serving("main", 1)
    )
    train(recorded, model_path, engine, replace(CONFIG, keep_versions=2))
    folder = recorded.store.dir / "versions/main"
    # 1 was chosen by a person, 5 serves, and 4 is its parent.
    assert sorted(p.name for p in folder.iterdir()) == ["v000001", "v000004", "v000005"]
    kept = [version.can_serve for version in recorded.store.versions.all("main")]
    assert kept == [True, False, False, True, True]


@pytest.mark.parametrize(("watches", "kept"), [(True, [1, 2, 3, 4, 5]), (False, [4, 5])])
def test_what_the_watch_may_return_to_stays(recorded, model_path, watches, kept):
    recorded.add_mixed(16 * 5)
    engine = FakeEngine(recorded.store, 5)
    engine.after = lambda version: recorded.add(version=version.number, trainable=False)
    train(recorded, model_path, engine, replace(CONFIG, keep_versions=2, watch=watches))
    assert [v.number for v in recorded.store.versions.all("main") if v.can_serve] == kept


def test_what_a_kill_left_of_a_deleted_adapter_goes_with_the_next_version(recorded, model_path):
    recorded.add_mixed(16 * 3)
    train(recorded, model_path, FakeEngine(recorded.store, 3))
    assert recorded.store.versions.forget_adapter("main", 1)
    recorded.add_mixed(16)
    train(recorded, model_path, FakeEngine(recorded.store, 1))
    folder = recorded.store.dir / "versions/main"
    assert sorted(p.name for p in folder.iterdir()) == ["v000002", "v000003", "v000004"]


def test_a_full_disk_registers_nothing_and_is_tried_again(
    recorded, model_path, monkeypatch, caplog
):
    """`save_file` fails as safetensors does; the real thing is in test_learner_adapters.py."""
    recorded.add_mixed(16)
    saved, states = [], []

    def full_at_first(*arguments: object, **options: object) -> None:
        saved.append(recorded.states())
        if len(saved) == 1:
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        save_file(*arguments, **options)

    monkeypatch.setattr("learner.adapters.save_file", full_at_first)
    released = recorded.store.training.release_samples

    def release(lineage: str) -> int:
        count = released(lineage)
        states.append((recorded.states(), recorded.store.versions.all("main")))
        return count

    recorded.store.training.release_samples = release
    engine = FakeEngine(recorded.store)
    train(recorded, model_path, engine)
    assert states[-1] == ({"ready": 16}, [])
    assert engine.published == [1]
    assert recorded.states() == {"trained": 16}
    assert any("make room" in r.getMessage() for r in caplog.records)


def test_a_checkpoint_that_cannot_be_written_takes_its_adapter_with_it(
    recorded, model_path, monkeypatch
):
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
    restore = PolicyTrainer.restore

    def look_then_restore(trainer: PolicyTrainer, before: object) -> None:
        forgotten.extend((recorded.store.dir / "versions/main").iterdir())
        restore(trainer, before)

    monkeypatch.setattr(PolicyTrainer, "restore", look_then_restore)
    train(recorded, model_path, engine)
    assert found == [["v000001"], ["v000001"]]
    assert forgotten == []
    assert recorded.states() == {"trained": 16}
