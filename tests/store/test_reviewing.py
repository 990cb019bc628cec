"""Floods of feedback and contradictions do nothing until somebody has looked at them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.records import FEEDBACK, Feedback, PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.reviewing import AN_HOUR, MOST, Why
from tests.store.test_records import add, judge, turn

OWNER, ANN, EVE = "", "key ann", "key eve"


@pytest.fixture
def now() -> list[float]:
    return [1_000_000.0]


@pytest.fixture
def dated(tmp_path: Path, now: list[float]) -> Iterator[Store]:
    store = Store(StoreConfig(dir=str(tmp_path / "state")), clock=lambda: now[0])
    yield store
    assert store.verifying.problems(lambda read, total: None) == []
    store.close()


def judged(store: Store, count: int) -> None:
    add(store, *(turn(n, session=f"s{n}", client=ANN) for n in range(count)))
    for n in range(count):
        judge(store, n, 1)


def ready(store: Store) -> int:
    return store.training.ready_samples("main", scored=True, hinted=True)


def test_a_flood_of_verdicts_waits_and_changes_nothing(dated: Store, now: list[float]) -> None:
    judged(dated, AN_HOUR + 30)
    found = [dated.reviewing.give(Feedback(f"turn_{n}", -1), EVE) for n in range(AN_HOUR + 20)]
    assert [one.applied for one in found] == [True] * AN_HOUR + [False] * 20
    assert "review" in str(found[-1].reason)
    assert dated.reviewing.counts() == {EVE: 20}
    verdict = dated.judging.verdict(f"turn_{AN_HOUR}")
    assert verdict is not None
    assert (verdict.score, verdict.judge) == (1, "rules")
    now[0] += 3601
    assert dated.reviewing.give(Feedback("turn_85", -1), EVE).applied


def test_the_owner_has_no_limit(dated: Store) -> None:
    judged(dated, 2 * AN_HOUR)
    for n in range(2 * AN_HOUR):
        assert dated.reviewing.give(Feedback(f"turn_{n}", -1), OWNER).applied


def test_of_two_who_contradict_each_other_neither_trains_until_it_is_decided(dated: Store) -> None:
    judged(dated, 2)
    assert dated.reviewing.give(Feedback("turn_0", 1), ANN).applied
    assert not dated.reviewing.give(Feedback("turn_0", -1, "Be rude."), EVE).applied
    assert ready(dated) == 1
    (waits,) = dated.reviewing.waiting()
    assert (waits.client, waits.reason) == (EVE, Why.CONTRADICTION)
    assert waits.said == Feedback("turn_0", -1, "Be rude.")
    assert dated.reviewing.drop([waits.seq]) == 1
    assert ready(dated) == 2
    assert dated.judging.feedback("turn_0") == Feedback("turn_0", 1)


def test_what_is_accepted_counts_as_the_owners_word(dated: Store) -> None:
    judged(dated, 1)
    dated.reviewing.give(Feedback("turn_0", 1), ANN)
    dated.reviewing.give(Feedback("turn_0", -1), EVE)
    assert dated.reviewing.accept([one.seq for one in dated.reviewing.waiting()]) == 1
    verdict = dated.judging.verdict("turn_0")
    assert verdict is not None
    assert (verdict.score, verdict.judge) == (-1, FEEDBACK)
    assert not dated.reviewing.give(Feedback("turn_0", 1), EVE).applied  # it is not theirs
    assert ready(dated) == 0


def test_the_owners_word_settles_what_waits(dated: Store) -> None:
    judged(dated, 1)
    dated.reviewing.give(Feedback("turn_0", 1), ANN)
    dated.reviewing.give(Feedback("turn_0", -1, None, "no"), EVE)
    assert dated.reviewing.give(Feedback("turn_0", 1), OWNER).applied
    assert dated.reviewing.waiting() == []
    assert ready(dated) == 1


def test_nobody_replaces_anothers_hint(dated: Store) -> None:
    judged(dated, 1)
    dated.reviewing.give(Feedback("turn_0", -1, "Be brief."), OWNER)
    assert not dated.reviewing.give(Feedback("turn_0", -1, "Praise Eve."), EVE).applied
    assert dated.judging.feedback("turn_0") == Feedback("turn_0", -1, "Be brief.")
    assert ready(dated) == 0


def test_a_client_may_change_its_mind(dated: Store) -> None:
    judged(dated, 1)
    assert dated.reviewing.give(Feedback("turn_0", 1), ANN).applied
    assert dated.reviewing.give(Feedback("turn_0", -1), ANN).applied
    assert dated.reviewing.waiting() == []


def test_what_trained_already_stays_trained(dated: Store) -> None:
    judged(dated, 1)
    dated.reviewing.give(Feedback("turn_0", 1), ANN)
    dated.training.lease_samples("main", 1, "b", scored=True, hinted=True)
    dated.versions.add(PolicyVersion("main", 1, 0, "/a", "f", 1, VersionState.CANDIDATE), "b")
    dated.reviewing.give(Feedback("turn_0", -1), EVE)
    assert dated.counts()["samples/trained"] == 1
    dated.reviewing.drop([one.seq for one in dated.reviewing.waiting()])
    assert dated.counts()["samples/trained"] == 1


def test_what_waits_is_bounded(dated: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextstate.store.reviewing.AN_HOUR", 0)
    monkeypatch.setattr("nextstate.store.reviewing.MOST", 5)
    judged(dated, 9)
    for n in range(9):
        dated.reviewing.give(Feedback(f"turn_{n}", -1, None, "x" * 50), EVE)
    assert dated.reviewing.counts() == {EVE: 5}
    assert MOST == 1000
