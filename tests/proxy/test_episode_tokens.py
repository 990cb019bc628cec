"""proxy/spending.py: no spelling and no number of calls passes an episode's tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nextstate.store import Store
from nextstate.store.episodes import Left
from proxy import spending
from proxy.answers import Refused
from proxy.spending import Budgets, within
from tests.proxy.environment import Environment, call, refusal, user
from tests.proxy.running_proxy import Running, both, until
from tests.scripted_engine import MODEL, Script, ScriptedEngine

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TASK = user("find the file with the word")


def chat(**more: object) -> dict[str, Any]:
    return {"messages": [], **more}


@pytest.mark.parametrize(
    ("path", "body", "sent", "held"),
    [
        (CHAT, chat(), {"max_tokens": 12}, 12),
        (CHAT, chat(max_tokens="100000"), {"max_tokens": 12}, 12),
        (CHAT, chat(max_tokens=100000.0), {"max_tokens": 12}, 12),
        (CHAT, chat(max_tokens="5"), {"max_tokens": "5"}, 5),
        (CHAT, chat(max_tokens="many"), {"max_tokens": "many"}, 0),  # the engine refuses it
        (CHAT, chat(max_tokens=-1), {"max_tokens": -1}, 0),
        (CHAT, chat(max_tokens=1, max_completion_tokens=" 1e9 "), {"max_tokens": 1}, 0),
        (CHAT, chat(max_tokens=1, max_completion_tokens="99"), {"max_completion_tokens": 12}, 12),
        (CHAT, chat(n=4), {"max_tokens": 3}, 12),
        (CHAT, chat(n="5", max_tokens="9"), {"max_tokens": 2}, 10),
        (CHAT, chat(n=3, max_tokens=2), {"max_tokens": 2}, 6),
        (COMPLETIONS, {"prompt": "a"}, {"max_tokens": 12}, 12),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 3}, {"max_tokens": 2}, 12),
        (COMPLETIONS, {"prompt": [[1], [2]], "max_tokens": 9.0}, {"max_tokens": 6}, 12),
        (COMPLETIONS, {"prompt": [1, 2]}, {"max_tokens": 12}, 12),
        (COMPLETIONS, {"prompt": "a", "prompt_embeds": ["a", "b", "c"]}, {"max_tokens": 4}, 12),
        (RESPONSES, {"input": "go", "max_output_tokens": "99"}, {"max_output_tokens": 12}, 12),
    ],
)
def test_every_spelling_of_a_number_of_tokens_is_cut(
    path: str, body: dict[str, Any], sent: dict[str, Any], held: int
) -> None:
    found, most = within(path, body, 12)
    assert {name: found[name] for name in sent} == sent
    assert most == held


def test_a_completion_without_a_length_has_the_engines_own() -> None:
    assert within(COMPLETIONS, {"prompt": "a"}, 3) == ({"prompt": "a", "max_tokens": 3}, 3)
    assert within(COMPLETIONS, {"prompt": "a"}, 99) == ({"prompt": "a"}, 16)


def test_replies_share_what_is_left_and_more_than_that_are_refused(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1", max_tokens=7))["base_url"]
        await call(p, url, TASK, n=3, max_tokens="50")
        assert engine.requests[0]["max_tokens"] == 2
        _, found = await call(p, url, TASK, status=400, n=64)
        assert "the request asks for 64 replies: ask for fewer" in refusal(found)
        assert found["error"]["type"] == "EpisodeBudgetError"
        assert (await environment.get("e-1"))["calls"] == 1

    both(test, store, tmp_path)


def test_calls_at_once_share_what_is_left(store: Store, tmp_path: Path) -> None:
    """One that names no number holds all: the next waits until its real tokens are known."""

    async def test(engine: ScriptedEngine, p: Running) -> None:
        gate = asyncio.Event()
        url = (await Environment(p).open("e-1", max_tokens=10))["base_url"]
        engine.queue += [Script(body_gate=gate), Script(body_gate=gate)]
        calls = [
            asyncio.create_task(call(p, url, TASK, max_tokens=most)) for most in (4, None, None, 3)
        ]
        await until(lambda: len(engine.requests) == 2)
        assert sorted(one["max_tokens"] for one in engine.requests) == [4, 6]
        gate.set()
        await asyncio.gather(*calls)
        assert len(engine.requests) == 4
        assert max(one["max_tokens"] for one in engine.requests[2:]) <= 10 - 2 - 2

    both(test, store, tmp_path)


@pytest.mark.parametrize("broken", [Script(status=500), Script(status=400)])
def test_a_call_without_a_turn_holds_nothing_afterwards(
    store: Store, tmp_path: Path, broken: Script
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1", max_tokens=10))["base_url"]
        engine.queue.append(broken)
        await call(p, url, TASK, status=broken.status)
        await call(p, url, TASK)
        assert engine.requests[-1]["max_tokens"] == 10

    both(test, store, tmp_path)


def test_a_turn_that_is_recorded_late_counts_before_the_next_call(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1", max_tokens=10))["base_url"]
        for left in (10, 8, 6, 4):
            await call(p, url, TASK)
            assert engine.requests[-1]["max_tokens"] == left

    both(test, store, tmp_path, record_timeout_s=0.00001)


def test_a_call_that_waits_too_long_is_told_what_to_do() -> None:
    async def test() -> None:
        budgets = Budgets(wait_s=0.01)

        async def begin(held: int) -> Left | None:
            return None if held else Left(5, None)

        _, _, free = await budgets.begin("e-1", begin, CHAT, chat())
        with pytest.raises(Refused, match="name max_tokens in each request") as refused:
            await budgets.begin("e-1", begin, CHAT, chat())
        assert refused.value.status == 429
        free()
        body, _, _ = await budgets.begin("e-1", begin, CHAT, chat())
        assert body["max_tokens"] == 5

    asyncio.run(test())


def test_a_call_that_waits_for_another_worker_looks_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spending, "_LOOK_S", 0.01)
    looks = 0

    async def begin(_: int) -> Left | None:
        nonlocal looks
        looks += 1
        return None

    with pytest.raises(Refused):
        asyncio.run(Budgets(0.3, alone=False).begin("e-1", begin, CHAT, chat()))
    assert looks <= 6  # after 0, 10, 30, 70 and 150 ms


@pytest.mark.parametrize(
    "more", [{"model": f"{MODEL}:unrecorded"}, {"headers": {"x-nextstate-record": "off"}}]
)
def test_a_call_of_an_episode_is_recorded_or_refused(
    store: Store, tmp_path: Path, more: dict[str, Any]
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1", max_tokens=10))["base_url"]
        _, found = await call(p, url, TASK, status=400, **more)
        assert refusal(found).startswith("A call of an episode is one of its steps")
        assert (await environment.get("e-1"))["calls"] == 0
        assert engine.requests == []

    both(test, store, tmp_path)


def test_no_episode_is_opened_where_nothing_is_recorded(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        found = await Environment(p).open("e-1", 409)
        assert refusal(found).startswith("[privacy] record = false: ")

    both(test, store, tmp_path, record=False)
