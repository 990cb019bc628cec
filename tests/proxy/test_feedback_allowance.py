"""A caller may give feedback only so often, and the same feedback again counts once."""

from __future__ import annotations

from pathlib import Path

from nextstate.store import Store
from proxy.allowance import Allowance
from proxy.feedback import A_MINUTE, AT_ONCE
from proxy.lineages import Access
from tests.proxy.running_proxy import Running, both
from tests.proxy.test_feedback import give
from tests.scripted_engine import ScriptedEngine
from tests.store.test_records import KEY, add, turn
from tests.store.test_shares import leased


def test_an_allowance_fills_again_and_each_caller_has_its_own() -> None:
    now = [0.0]
    allowance = Allowance(AT_ONCE, A_MINUTE, lambda: now[0])
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
        p.proxy.feedback.allowance = Allowance(AT_ONCE, A_MINUTE, lambda: now[0])
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
