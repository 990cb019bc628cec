"""No session decides a version alone while others have something to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.records import Feedback
from nextstate.store import Store
from nextstate.store.shares import fair_share
from nextstate.store.waiting import Patience
from tests.store.test_records import add, judge, turn


def ready(store: Store, *sessions: tuple[str, int, int]) -> dict[str, str]:
    """Puts ready samples of (session, how many, policy version) there; sessions by turn."""
    found: dict[str, str] = {}
    for session, count, version in sessions:
        for _ in range(count):
            number = len(found)
            add(store, turn(number, session=session, policy_version=version))
            judge(store, number, 1)
            found[f"turn_{number}"] = session
    return found


def leased(store: Store, limit: int, batch: str = "b") -> list[str]:
    found = store.training.lease_samples("main", limit, batch, scored=True, hinted=True)
    return [sample.session for sample in found]


def test_a_session_gives_at_most_half_of_a_batch_while_others_wait(store: Store) -> None:
    ready(store, ("flood", 30, 0), ("b", 1, 0), ("c", 2, 0), ("d", 1, 0))
    assert Counter(leased(store, 4, "b1")) == {"flood": 2, "b": 1, "c": 1}
    assert Counter(leased(store, 4, "b2")) == {"flood": 2, "c": 1, "d": 1}
    assert leased(store, 4, "b3") == ["flood"] * 4  # nobody else waits


def test_newer_versions_do_not_make_a_flood_more_than_half(store: Store) -> None:
    ready(store, ("b", 9, 1), ("flood", 30, 3))
    assert leased(store, 16) == ["flood"] * 8 + ["b"] * 8


def test_one_session_alone_trains_with_all_that_it_has(store: Store) -> None:
    turns = ready(store, ("mine", 20, 0))
    found = store.training.lease_samples("main", 16, "b", scored=True, hinted=True)
    assert [sample.turn for sample in found] == list(turns)[:16]
    assert store.counts()["samples/leased"] == 16


def test_few_samples_of_others_make_a_smaller_batch_once(store: Store) -> None:
    ready(store, ("mine", 30, 0), ("yesterday", 1, 0))
    assert Counter(leased(store, 16, "b1")) == {"mine": 8, "yesterday": 1}
    assert Counter(leased(store, 16, "b2")) == {"mine": 16}


def test_three_of_one_session_and_one_of_another_make_no_batch_of_four(store: Store) -> None:
    ready(store, ("loud", 3, 0), ("quiet", 1, 0))
    assert Counter(leased(store, 4)) == {"loud": 2, "quiet": 1}


def test_what_changes_while_it_is_looked_at_is_not_leased(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(store, ("a", 2, 0), ("b", 2, 0))

    def then_changed(waiting: Iterable[tuple[str, str]], limit: int) -> list[str]:
        chosen = fair_share(waiting, limit)
        store.training.drop_samples(["turn_1"], "gone")
        store.judging.give_feedback(Feedback("turn_2", 0))
        return chosen

    monkeypatch.setattr("nextstate.store.training.fair_share", then_changed)
    assert leased(store, 4) == ["a", "b"]


def test_a_write_of_another_process_while_a_batch_is_chosen_makes_no_lease_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StoreConfig(dir=str(tmp_path / "state"))
    ours, other = (Store(config, patience=Patience(limit_s=0.0)) for _ in range(2))
    ready(ours, ("a", 30, 0), ("b", 30, 0))  # more than are read

    def meanwhile(waiting: Iterable[tuple[str, str]], limit: int) -> list[str]:
        chosen = fair_share(waiting, limit)
        other.training.drop_samples(["turn_9"], "gone")
        return chosen

    monkeypatch.setattr("nextstate.store.training.fair_share", meanwhile)
    assert leased(ours, 4) == ["a", "a", "b", "b"]
    ours.close()
    other.close()


@given(st.lists(st.sampled_from("aaaaaaabcd"), max_size=60), st.integers(1, 20))
def test_a_batch_is_fair_as_full_as_may_be_and_of_the_best(sessions: list[str], limit: int) -> None:
    waiting = [(f"{number}", session) for number, session in enumerate(sessions)]
    chosen = fair_share(waiting, limit)
    by_turn = dict(waiting)
    given, wait = Counter(by_turn[turn] for turn in chosen), Counter(sessions)
    most = limit if len(wait) == 1 else max(1, limit // 2)
    assert len(chosen) == min(limit, sum(min(count, most) for count in wait.values()))
    for session, count in given.items():
        assert count <= most
        own = [turn for turn, its in waiting if its == session]
        assert own[:count] == [turn for turn in chosen if by_turn[turn] == session]
