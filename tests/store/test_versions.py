"""Policy versions: one serves, a batch is settled with its version, and reasons are kept."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from nextstate.config import StoreConfig
from nextstate.errors import StoreError, WaitError
from nextstate.records import (
    Decisions,
    Feedback,
    JudgedTurn,
    Pause,
    PolicyVersion,
    SampleState,
    VersionState,
)
from nextstate.store import Store
from nextstate.store.shares import OWNER
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


def lose_the_next_answer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next write transaction is committed, and nobody hears of it."""
    write = store.database.write

    @contextmanager
    def once() -> Generator[sa.Connection]:
        monkeypatch.setattr(store.database, "write", write)
        with write() as connection:
            yield connection
        raise WaitError("the link was cut")

    monkeypatch.setattr(store.database, "write", once)


def test_a_lease_whose_answer_was_lost_leases_the_same_samples_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, *map(turn, range(3)))
    for number in range(3):
        judge(store, number, 1)
    lose_the_next_answer(store, monkeypatch)
    leased = store.training.lease_samples("main", 1, "b", scored=True, hinted=True)
    assert len(leased) == 1
    version = PolicyVersion("main", 1, 0, "/a", "ff", 1, VersionState.CANDIDATE)
    store.versions.add(version, "b")
    assert [used for used, _ in store.versions.used_turns("main", 1)] == [leased[0].turn]
    assert store.counts()["samples/ready"] == 2


def test_a_version_whose_registration_was_not_answered_is_registered_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = PolicyVersion("main", 1, 0, "/a", "ff", 1, VersionState.CANDIDATE, {"loss": 0.5})
    lose_the_next_answer(store, monkeypatch)
    assert store.versions.add(version, None) is VersionState.CANDIDATE
    assert store.versions.all("main") == [version]
    with pytest.raises(StoreError):  # another one of the same number
        store.versions.add(replace(version, metrics={"loss": 0.25}), None)


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


def test_the_watch_reads_the_newest_judged_turns_oldest_first(store: Store) -> None:
    for number, (version, score) in enumerate(((0, 1), (1, -1), (None, 1), (2, 0), (2, 1))):
        add(store, turn(number, policy_version=version, session=f"s{number % 2}"))
        if number != 4:
            judge(store, number, score)
    assert store.versions.judged_turns("main", 2) == [
        JudgedTurn("s1", 1, -1, "rules"),
        JudgedTurn("s1", 2, 0, "rules"),
    ]
    assert len(store.versions.judged_turns("main", 9)) == 3
    store.reviewing.give(Feedback("turn_0", -1), OWNER)
    assert store.versions.judged_turns("main", 9)[0] == JudgedTurn("s0", 0, -1, "feedback")
    assert store.versions.judged_turns("other", 9) == []


def test_a_chain_leads_through_the_parents_and_is_read_only_as_far_as_asked(store: Store) -> None:
    for number, parent in ((1, 0), (2, 1), (3, 1), (4, 3)):
        made = PolicyVersion("main", number, parent, "/a", "ff", 1, VersionState.CANDIDATE)
        store.versions.add(made, None)
        store.versions.add(replace(made, lineage="other", parent=0), None)
    assert store.versions.chain("main", 4, 9) == [0, 1, 3, 4]
    assert store.versions.chain("main", 4, 2) == [3, 4]
    assert store.versions.chain("main", 0, 9) == store.versions.chain("new", 0, 9) == [0]


def test_decisions_say_what_a_person_chose_and_how_far_they_reach(store: Store) -> None:
    assert store.versions.decisions("main") == Decisions()
    add_versions(store, 2)
    store.versions.set_serving("main", 1)
    before = store.versions.decisions("main")
    assert (before.after, before.pinned) == (2, {1, 2})
    rejected = PolicyVersion("main", 3, 1, None, None, 1, VersionState.REJECTED, {}, "too far")
    store.versions.add(rejected, None)
    store.versions.resume("main")
    assert store.versions.decisions("main") == Decisions(before.choices, 3, frozenset({1, 2}))


def test_a_candidate_that_was_begun_before_a_person_chose_never_serves(store: Store) -> None:
    """Also when they chose the version that served already, from which it was made."""
    add_versions(store, 1)
    begun = store.versions.decisions("main").choices
    store.versions.set_serving("main", 0)
    store.versions.set_serving("main", 1)
    candidate = PolicyVersion("main", 2, 1, "/a", "ff", 1, VersionState.CANDIDATE)
    assert store.versions.add(candidate, None, begun) is VersionState.RETIRED
    assert "version 1 was put into service" in (store.versions.all("main")[-1].reason or "")
    assert not store.versions.serve_candidate(candidate)
    assert store.versions.serving("main").number == 1


def test_to_resume_is_no_choice_of_a_version(store: Store) -> None:
    begun = store.versions.decisions("main").choices
    store.versions.resume("main")
    candidate = PolicyVersion("main", 1, 0, "/a", "ff", 1, VersionState.CANDIDATE)
    assert store.versions.add(candidate, None, begun) is VersionState.CANDIDATE
    assert store.versions.serve_candidate(candidate)


def test_samples_of_rejected_versions_can_be_given_back(store: Store) -> None:
    for number in range(4):
        add(store, turn(number))
        judge(store, number, 1)
    for number, give_back in ((1, ()), (2, ()), (3, (2,))):
        store.training.lease_samples("main", 1, f"b{number}", scored=True, hinted=True)
        rejected = PolicyVersion("main", number, 0, None, None, 1, VersionState.REJECTED, {}, "no")
        store.versions.add(rejected, f"b{number}", give_back=give_back)
    counts = store.counts()
    assert (counts["samples/dropped"], counts["samples/ready"]) == (1, 3)
    assert len(store.training.lease_samples("main", 9, "b", scored=True, hinted=True)) == 3


def test_an_adapter_that_is_needed_cannot_be_forgotten_and_a_forgotten_one_cannot_serve(
    store: Store,
) -> None:
    add_versions(store, 1)  # a person chose it
    for number in (2, 3, 4):
        made = PolicyVersion("main", number, number - 1, "/a", "ff", 1, VersionState.CANDIDATE)
        store.versions.add(made, None)
        if number < 4:
            assert store.versions.serve_candidate(made)
    forgotten = [store.versions.forget_adapter("main", number) for number in (1, 2, 3, 4)]
    assert forgotten == [False, True, False, False]
    assert not store.versions.set_serving("main", 2)
    assert store.versions.serving("main").number == 3
    second = store.versions.all("main")[1]
    assert (second.path, second.sha256, second.can_serve) == (None, "ff", False)


def test_a_pause_lasts_until_a_person_resumes_and_accepts_nothing(tmp_path: Path) -> None:
    now = [5.0]
    store = Store(StoreConfig(dir=str(tmp_path)), clock=lambda: now[0])
    store.versions.pause("main", "ada")
    assert store.versions.decisions("main") == Decisions(pause=Pause("ada", 5.0))
    assert store.versions.decisions("bob") == Decisions()
    now[0] = 7.0
    store.versions.pause("main", "b" * 200)
    store.versions.set_serving("main", 0)
    found = store.versions.decisions("main")
    assert found == Decisions(1, 0, frozenset({0}), Pause("b" * 80, 7.0))
    store.versions.resume("main")
    assert store.versions.decisions("main") == Decisions(1, 0, frozenset({0}))
    store.close()
