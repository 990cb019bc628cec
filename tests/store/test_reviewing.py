"""Floods of feedback and contradictions do nothing until somebody has looked at them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.records import FEEDBACK, Feedback
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
    found = [dated.reviewing.give(Feedback(f"turn_{n}", -1), ANN) for n in range(AN_HOUR + 20)]
    assert [one.applied for one in found] == [True] * AN_HOUR + [False] * 20
    assert "review" in str(found[-1].reason)
    assert dated.reviewing.counts() == {ANN: 20}
    verdict = dated.judging.verdict(f"turn_{AN_HOUR}")
    assert verdict is not None
    assert (verdict.score, verdict.judge) == (1, "rules")
    now[0] += 3601
    assert dated.reviewing.give(Feedback("turn_85", -1), ANN).applied


def test_the_owner_has_no_limit(dated: Store) -> None:
    judged(dated, AN_HOUR + 10)
    for n in range(AN_HOUR + 10):
        assert dated.reviewing.give(Feedback(f"turn_{n}", -1), OWNER).applied


def test_what_a_client_says_of_anothers_turn_waits(dated: Store) -> None:
    """Also before anything followed it, or it would speak first about every turn."""
    judged(dated, 1)
    add(dated, turn(1, client=ANN), turn(2), next_state=None)
    dated.reviewing.give(Feedback("turn_0", 1), ANN)
    for name, score in (("turn_0", -1), ("turn_0", 1), ("turn_1", 1), ("turn_2", -1)):
        assert not dated.reviewing.give(Feedback(name, score, "Praise Eve."), EVE).applied
    found = {one.said.turn: one.reason for one in dated.reviewing.waiting()}
    assert found == {"turn_0": Why.FOREIGN, "turn_1": Why.FOREIGN, "turn_2": Why.FOREIGN}
    assert dated.judging.feedback("turn_0") == Feedback("turn_0", 1)
    assert ready(dated) == 1


def test_a_contradiction_says_that_it_is_one_and_can_be_accepted_or_dropped(dated: Store) -> None:
    judged(dated, 2)
    for n in range(2):
        assert not dated.reviewing.give(Feedback(f"turn_{n}", -1, "Be brief."), EVE).applied
    one, other = dated.reviewing.waiting()
    assert (one.client, one.reason) == (EVE, Why.CONTRADICTION)
    assert one.said == Feedback("turn_0", -1, "Be brief.")
    assert dated.reviewing.drop([other.seq]) == 1
    assert dated.reviewing.accept([one.seq]) == 1
    assert dated.reviewing.waiting() == []
    verdict = dated.judging.verdict("turn_0")
    assert verdict is not None
    assert (verdict.score, verdict.judge) == (-1, FEEDBACK)
    assert dated.judging.feedback("turn_1") is None


def test_the_owners_word_settles_what_waits_and_stays(dated: Store) -> None:
    judged(dated, 1)
    dated.reviewing.give(Feedback("turn_0", -1, None, "no"), EVE)
    assert dated.reviewing.give(Feedback("turn_0", -1, "Be brief."), OWNER).applied
    assert dated.reviewing.waiting() == []
    for score in (1, -1):
        assert not dated.reviewing.give(Feedback("turn_0", score, "Be rude."), ANN).applied
    assert dated.judging.feedback("turn_0") == Feedback("turn_0", -1, "Be brief.")


def test_a_client_may_change_its_mind(dated: Store) -> None:
    judged(dated, 1)
    assert dated.reviewing.give(Feedback("turn_0", 1), ANN).applied
    assert dated.reviewing.give(Feedback("turn_0", -1), ANN).applied
    assert dated.reviewing.waiting() == []


def test_what_waits_is_bounded(dated: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextstate.store.reviewing.MOST", 5)
    judged(dated, 9)
    for n in range(9):
        dated.reviewing.give(Feedback(f"turn_{n}", -1, None, "x" * 50), EVE)
    assert dated.reviewing.counts() == {EVE: 5}
    assert MOST == 1000
