"""Policy versions: one serves, a batch is settled with its version, and reasons are kept."""

from __future__ import annotations

from dataclasses import replace

from nextstate.records import (
    Feedback,
    PolicyVersion,
    SampleState,
    ScoreCounts,
    VersionState,
)
from nextstate.store import Store
from tests.store.test_records import add, judge, turn


def test_a_version_settles_its_batch_and_only_one_serves(store: Store) -> None:
    add(store, turn(0))
    judge(store, 0, 1)
    store.training.lease_samples("main", 9, "b1", scored=True, hinted=True)
    for number in (1, 2):
        version = PolicyVersion("main", number, 0, "/a", "ff", 1, VersionState.CANDIDATE)
        store.versions.add(version, "b1" if number == 1 else None)
        store.versions.set_serving("main", number)
    assert store.counts()[f"samples/{SampleState.TRAINED}"] == 1
    assert [v.state for v in store.versions.all("main")] == ["retired", "serving"]
    store.versions.set_serving("main", 0)
    assert store.versions.serving("main").number == 0
    assert store.versions.serving("main").adapter_name is None


def test_a_rejected_version_drops_its_batch_with_the_reason(store: Store) -> None:
    add(store, turn(0), turn(1))
    for number in range(2):
        judge(store, number, 1)
    store.training.lease_samples("main", 1, "b1", scored=True, hinted=True)
    rejected = PolicyVersion(
        "main", 1, 0, None, None, 1, VersionState.REJECTED, {"gate/rank": -1.0}, "too far"
    )
    store.versions.add(rejected, "b1")
    assert store.counts()["samples/dropped"] == 1
    assert store.versions.all("main") == [rejected]
    assert store.versions.serving("main").number == 0
    (used,) = store.versions.used_turns("main", 1)
    assert (used[0], used[1].score) == ("turn_0", 1)
    assert store.versions.used_turns("main", 2) == []


def add_versions(store: Store, count: int) -> None:
    """A chain of which the last serves."""
    for number in range(1, count + 1):
        candidate = VersionState.CANDIDATE
        store.versions.add(
            PolicyVersion("main", number, number - 1, "/a", "ff", 1, candidate), None
        )
        store.versions.set_serving("main", number)


def test_a_withdrawn_version_keeps_its_reason_and_only_while_it_serves(store: Store) -> None:
    add_versions(store, 3)
    rejected = replace(store.versions.serving("main"), reason="worse")
    assert [v.number for v in store.versions.ancestors(rejected)] == [2, 1, 0]
    assert store.versions.replace_serving(rejected, 2)
    states = [(v.state.value, v.reason) for v in store.versions.all("main")]
    assert states == [("retired", None), ("serving", None), ("rejected", "worse")]
    store.versions.set_serving("main", 1)  # a person
    assert not store.versions.replace_serving(replace(rejected, number=2), 0)
    assert store.versions.serving("main").number == 1
    store.versions.set_serving("main", 3)
    assert (
        store.versions.serving("main").reason == "worse"
    )  # so that one sees that it was rejected once


def test_a_version_can_be_withdrawn_for_the_base(store: Store) -> None:
    add_versions(store, 1)
    assert store.versions.replace_serving(
        replace(store.versions.serving("main"), reason="worse"), 0
    )
    assert store.versions.serving("main").number == 0
    assert store.versions.ancestors(store.versions.serving("main")) == []


def test_verdicts_are_counted_by_the_version_that_served_the_turn(store: Store) -> None:
    served = {0: (1, 1, -1), 1: (0, -1), 2: (1,)}
    number = 0
    for version, scores in served.items():
        for score in scores:
            add(store, turn(number, policy_version=version))
            judge(store, number, score)
            number += 1
    assert store.versions.score_counts("main", [0, 1, 9]) == {
        0: ScoreCounts(2, 0, 1),
        1: ScoreCounts(0, 1, 1),
        9: ScoreCounts(),
    }
    store.judging.give_feedback(Feedback("turn_0", -1))
    assert store.versions.score_counts("main", [0]) == {0: ScoreCounts(1, 0, 2)}
    assert store.versions.score_counts("other", [0]) == {0: ScoreCounts()}
