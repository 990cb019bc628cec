"""Keys of the store at a running proxy: how fast a revoked one stops, tries, limits, last use."""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.keys import Scope, hashed, key_of_nodes
from nextstate.store import Store
from nextstate.store.keys import Keys as StoredKeys
from proxy.allowance import Allowance
from proxy.intervals import INTERVALS
from proxy.keys import Keys
from proxy.lineages import Access, Lineages
from proxy.tries import Tries
from tests.proxy.running_proxy import Running, both, request, running
from tests.proxy.test_scopes import add_key, bearer
from tests.scripted_engine import MODEL, ScriptedEngine, scripted_engine


def test_a_revoked_key_stops_within_two_seconds_in_every_worker(tmp_path: Path) -> None:
    stores = [Store(StoreConfig(dir=str(tmp_path / "state"))) for _ in range(2)]
    key = add_key(stores[0], "laptop", Scope.CHAT)

    async def test() -> None:
        async with (
            scripted_engine() as engine,
            running(engine.url, stores[0], tmp_path, worker="0") as first,
            running(engine.url, stores[1], tmp_path, worker="1") as second,
        ):
            for p in (first, second):
                await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
                assert (await p.chat(request(), bearer(key)))[0] == 200
            stores[0].keys.revoke("laptop")
            until = time.monotonic() + 2
            answers = [200]
            while 200 in answers and time.monotonic() < until:
                answers = [(await p.chat(request(), bearer(key)))[0] for p in (first, second)]
                await asyncio.sleep(0.05)
            assert answers == [401, 401]
            # Without any key in force the proxy stays closed.
            assert [(await p.chat(request()))[0] for p in (first, second)] == [401, 401]
            stores[0].keys.remove("laptop")
            async with asyncio.timeout(10):
                while (await second.chat(request()))[0] != 200:
                    await asyncio.sleep(0.05)

    asyncio.run(test())
    for store in stores:
        store.close()


def test_no_request_asks_the_store_for_its_key(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = add_key(store, "laptop", Scope.CHAT)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        asked: list[str] = []
        known = StoredKeys.all

        def all_(self: StoredKeys) -> object:
            asked.append("all")
            return known(self)

        monkeypatch.setattr(StoredKeys, "all", all_)
        for _ in range(20):
            assert (await p.chat(request(), bearer(key)))[0] == 200
        assert asked == []

    both(test, store, tmp_path, intervals=replace(INTERVALS, keys_s=3600.0))  # no look beside them


def test_the_last_use_is_written_at_most_once_a_minute(store: Store) -> None:
    key, now = hashed(add_key(store, "laptop", Scope.CHAT)), [1000.0]
    keys = Keys(Lineages(MODEL, None), store.keys, clock=lambda: now[0])

    def used() -> float | None:
        return store.keys.all()[0].used_at

    assert used() is None
    for at, noted in ((1000.0, 1000.0), (1030.0, 1000.0), (1061.0, 1061.0)):
        now[0] = at
        assert keys.find(key) is not None
        keys.refresh()
        assert used() == noted
    keys.find(hashed("another"))
    keys.refresh()
    assert used() == 1061.0


def test_a_bound_key_reaches_its_lineage_only(store: Store, tmp_path: Path) -> None:
    key = add_key(store, "bob", Scope.CHAT, lineage="bob")
    gone = add_key(store, "gone", Scope.CHAT, lineage="nobody")

    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert (await p.chat(request() | {"model": "alice"}, bearer(key)))[0] != 200
        status, _, headers = await p.chat(request(), bearer(key))
        assert status == 200
        turn = store.turns.get(headers["x-nextstate-turn"])
        assert turn is not None
        assert turn.lineage == "bob"
        assert (await p.chat(request(), bearer(gone)))[0] == 401

    access = {"alice": Access("alice", None), "bob": Access("bob", None)}
    both(test, store, tmp_path, access=access)


def test_wrong_keys_are_slowed_down_and_nobody_else(store: Store, tmp_path: Path) -> None:
    key, fresh = add_key(store, "a", Scope.CHAT), add_key(store, "b", Scope.CHAT)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert (await p.chat(request(), bearer(key)))[0] == 200
        statuses = [(await p.chat(request(), bearer(f"guess {n}")))[0] for n in range(8)]
        assert statuses == [401] * Tries.AT_ONCE + [429] * 3
        status, _, headers = await p.chat(request(), bearer("guess 9"))
        assert (status, 1 <= int(headers["Retry-After"]) <= Tries.REFILL_S) == (429, True)
        assert (await p.chat(request(), bearer(fresh)))[0] == 200  # nobody guesses a random key
        assert (await p.chat(request(), bearer("guess 0")))[0] == 401
        assert (await p.chat(request(), bearer(key)))[0] == 200
        assert (await p.chat(request()))[0] == 401  # without a key nothing is guessed
        assert (await p.chat(request(), bearer("ep-" + "0" * 32)))[0] == 401

    both(test, store, tmp_path)


def test_a_key_that_was_removed_is_not_everybodys(store: Store, tmp_path: Path) -> None:
    key = add_key(store, "alice", Scope.CHAT)
    store.keys.remove("alice")

    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert (await p.chat(request()))[0] == 200
        assert (await p.chat(request(), bearer("anything")))[0] == 200
        assert (await p.chat(request(), bearer(key)))[0] == 401

    both(test, store, tmp_path)


def test_a_lineages_key_does_not_see_the_metrics_of_all(store: Store, tmp_path: Path) -> None:
    key = add_key(store, "all", Scope.READ)
    bound = add_key(store, "hers", Scope.READ, lineage="alice")

    async def test(engine: ScriptedEngine, p: Running) -> None:
        found = [await p.http.get(f"{p.url}/metrics", headers=bearer(k)) for k in (key, bound)]
        assert [answer.status for answer in found] == [200, 403]

    both(test, store, tmp_path, access={"alice": Access("alice", None)})


def test_a_refused_try_does_not_hold_the_loop(store: Store, tmp_path: Path) -> None:
    key = add_key(store, "a", Scope.CHAT)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert (await p.chat(request(), bearer(key)))[0] == 200
        flood = [p.chat(request(), bearer(f"guess {n}")) for n in range(200)]
        answers = await asyncio.gather(p.chat(request(), bearer(key)), *flood)
        assert answers[0][0] == 200
        assert {answer[0] for answer in answers[1:]} == {401, 429}

    both(test, store, tmp_path)


def test_a_key_sends_so_many_requests_and_is_told_when_to_come_back(
    store: Store, tmp_path: Path
) -> None:
    key, other = add_key(store, "a", Scope.CHAT), add_key(store, "b", Scope.CHAT)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        now = [0.0]
        p.proxy.requests = Allowance(3, 60.0, lambda: now[0])
        statuses = [(await p.chat(request(), bearer(key)))[0] for _ in range(4)]
        assert statuses == [200] * 3 + [429]
        _, told, headers = await p.chat(request(), bearer(key))
        assert (headers["Retry-After"], b"requests a minute" in told) == ("1", True)
        assert (await p.chat(request(), bearer(other)))[0] == 200
        now[0] = 1.0
        assert (await p.chat(request(), bearer(key)))[0] == 200

    both(test, store, tmp_path)


def test_addresses_of_one_network_share_their_tries() -> None:
    tries = Tries(lambda: 0.0)
    for n in range(Tries.AT_ONCE):
        tries.failed(f"2001:db8::{n:x}")
    assert tries.wait_s("2001:db8::ffff") > 0
    assert tries.wait_s("2001:db8:0:1::1") == 0


def test_a_key_is_compared_with_all_keys_whichever_it_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = [hashed(add_key(store, f"k{n}", Scope.CHAT)) for n in range(5)]
    keys = Keys(Lineages(MODEL, "main-key"), store.keys)
    compared: list[bytes] = []
    known = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return known(a, b)

    monkeypatch.setattr("proxy.keys.hmac.compare_digest", counting)
    for one in (*sent, hashed("main-key"), hashed("wrong")):
        compared.clear()
        keys.find(one)
        assert len(compared) == 7  # the main key's nodes have one


def test_the_rollouts_nodes_may_play_episodes_and_nothing_else(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        nodes = bearer(key_of_nodes("main-key"))
        asked = {"environment": "e", "task": "t"}
        for method, path, body, status in (
            ("POST", "/v1/chat/completions", request(), 200),
            ("GET", "/v1/models", None, 200),
            ("POST", "/v1/episodes", asked, 200),
            ("GET", "/metrics", None, 403),
            ("POST", "/v1/feedback", {"turn_id": "turn_1", "score": 1}, 403),
        ):
            answer = await p.http.request(method, p.url + path, json=body, headers=nodes)
            assert answer.status == status, path
        assert (await p.chat(request(), bearer(key_of_nodes("other"))))[0] == 401

    both(test, store, tmp_path, key="main-key")


def test_the_configured_key_goes_on_beside_those_of_the_store(store: Store, tmp_path: Path) -> None:
    key = add_key(store, "a", Scope.CHAT)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        for one in (key, "main-key"):
            assert (await p.chat(request(), bearer(one)))[0] == 200
        metrics = f"{p.url}/metrics"
        statuses = [
            (await p.http.get(metrics, headers=bearer(k))).status for k in ("main-key", key)
        ]
        assert statuses == [200, 403]

    both(test, store, tmp_path, key="main-key")
