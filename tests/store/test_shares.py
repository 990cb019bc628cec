"""No session and no key decides a version alone while others have something to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.records import Feedback
from nextstate.store import Store
from nextstate.store.shares import fair_share
from proxy.feedback import AT_ONCE, Allowance
from proxy.lineages import Access
from tests.proxy.running_proxy import Running, both
from tests.proxy.test_feedback import give
from tests.scripted_engine import ScriptedEngine
from tests.store.test_records import KEY, add, judge, turn


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


def test_an_allowance_fills_again_and_each_caller_has_its_own() -> None:
    now = [0.0]
    allowance = Allowance(lambda: now[0])
    assert [allowance.wait_s("main") for _ in range(AT_ONCE)] == [0] * AT_ONCE
    assert allowance.wait_s("main") == 1
    assert allowance.wait_s("alice") == 0
    now[0] = 0.75
    assert allowance.wait_s("main") == 1
    now[0] = 2.25
    assert [allowance.wait_s("main") for _ in range(3)] == [0, 0, 1]
    now[0] = 1e9
    assert [allowance.wait_s("main") for _ in range(AT_ONCE + 1)] == [0] * AT_ONCE + [1]


def test_a_flood_of_feedback_is_refused_with_when_to_come_back(
    store: Store, tmp_path: Path
) -> None:
    with store.recording() as recording:
        for number in range(AT_ONCE + 5):
            recording.add_turn(turn(number, session=f"s{number}"), KEY, KEY)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        now = [0.0]
        p.proxy.feedback.allowance = Allowance(lambda: now[0])
        for number in range(AT_ONCE):
            await give(p, {"turn_id": f"turn_{number}", "score": -1}, key="main-key")
        body = {"turn_id": f"turn_{AT_ONCE}", "score": -1}
        headers = {"Authorization": "Bearer main-key"}
        async with p.http.post(f"{p.url}/v1/feedback", json=body, headers=headers) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
            error = (await answer.json())["error"]
        assert error == {
            "message": error["message"], "type": "RateLimitError", "param": None, "code": 429,
        }  # fmt: skip
        assert "60 times in a minute" in error["message"]
        assert store.judging.feedback(f"turn_{AT_ONCE}") is None
        await give(p, {"score": 1}, 400, key="main-key")  # a mistake is told, not counted
        await give(p, {"turn_id": "turn_0", "score": 1}, 404, key="alice-key")
        now[0] = 1.0
        await give(p, body, key="main-key")
        assert store.judging.feedback(f"turn_{AT_ONCE}") is not None

    both(test, store, tmp_path, key="main-key", access={"alice": Access(None, "alice-key")})


def test_the_same_feedback_again_counts_once_for_a_version(store: Store, tmp_path: Path) -> None:
    add(store, turn(0))

    async def test(engine: ScriptedEngine, p: Running) -> None:
        for _ in range(20):
            await give(p, {"turn_id": "turn_0", "score": 1})
        assert len(leased(store, 16)) == 1

    both(test, store, tmp_path)
