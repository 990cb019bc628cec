"""An episode's own key: not kept, the same each time, and gone with the key that opened it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from nextstate.keys import Key, Scope, hashed, new_key
from nextstate.store import Store
from tests.proxy.running_proxy import Running, both, request, running
from tests.proxy.test_scopes import add_key, bearer
from tests.scripted_engine import ScriptedEngine, scripted_engine

ASKED = {"environment": "e", "task": "t", "episode": "e-1"}


async def opened(p: Running, key: str | None, **asked: Any) -> dict[str, Any]:
    headers = None if key is None else bearer(key)
    answer = await p.http.post(f"{p.url}/v1/episodes", json=ASKED | asked, headers=headers)
    assert answer.status == 200, await answer.text()
    return await answer.json()


async def asks(p: Running, key: str) -> int:
    return (await p.chat(request(), bearer(key)))[0]


def files_of(folder: Path) -> bytes:
    """All that the files of a folder hold."""
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_no_file_has_an_episodes_key_and_none_tells_it(store: Store, tmp_path: Path) -> None:
    runs, more = (add_key(store, name, Scope.EPISODES) for name in ("runs", "more"))

    async def test(engine: ScriptedEngine, p: Running) -> None:
        key = (await opened(p, runs))["api_key"]
        assert await asks(p, key) == 200
        found = files_of(store.dir)
        for secret in (key, key.removeprefix("ep-"), runs):
            assert secret.encode() not in found
        assert b"key_hash" in found
        # The folder's own secret does not give it, without the key that opened the episode.
        assert (await opened(p, more))["api_key"] != key

    both(test, store, tmp_path)


def test_an_episodes_key_ends_with_the_key_that_opened_it(store: Store, tmp_path: Path) -> None:
    runs, chat = add_key(store, "runs", Scope.EPISODES), add_key(store, "chat", Scope.CHAT)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        key = (await opened(p, runs))["api_key"]
        assert [await asks(p, one) for one in (key, chat)] == [200, 200]
        store.keys.revoke("runs")
        p.proxy.keys.refresh()
        assert [await asks(p, one) for one in (key, chat)] == [401, 200]
        store.keys.remove("runs")
        again = new_key()
        store.keys.add(Key("runs", hashed(again), frozenset((Scope.EPISODES,)), None, 2.0))
        p.proxy.keys.refresh()
        assert await asks(p, key) == 401  # another key took the name
        assert await asks(p, (await opened(p, again))["api_key"]) == 200
        engine.requests.clear()
        assert await asks(p, key) == 401
        assert engine.requests == []

    both(test, store, tmp_path)


def test_opened_again_with_another_key_the_episodes_old_key_ends(
    store: Store, tmp_path: Path
) -> None:
    runs, other = (add_key(store, name, Scope.EPISODES) for name in ("runs", "other"))

    async def test(engine: ScriptedEngine, p: Running) -> None:
        old = (await opened(p, runs))["api_key"]
        assert await asks(p, old) == 200
        new = (await opened(p, other))["api_key"]
        assert [await asks(p, one) for one in (old, new)] == [401, 200]

    both(test, store, tmp_path)


def test_an_episodes_key_that_was_made_without_a_key_ends_when_one_is_needed(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        key = (await opened(p, None))["api_key"]
        assert await asks(p, key) == 200
        mine = add_key(store, "mine", Scope.EPISODES)
        p.proxy.keys.refresh()
        assert await asks(p, key) == 401
        assert await asks(p, (await opened(p, mine))["api_key"]) == 200

    both(test, store, tmp_path)


def test_opened_again_an_episode_has_the_same_key_also_after_a_restart(
    store: Store, tmp_path: Path
) -> None:
    runs, other = (add_key(store, name, Scope.EPISODES) for name in ("runs", "other"))

    async def test() -> None:
        async with scripted_engine() as engine:
            made: list[str] = []
            for _ in range(2):
                async with running(engine.url, store, tmp_path) as p:
                    await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
                    made += [(await opened(p, runs))["api_key"] for _ in range(2)]
                    assert await asks(p, made[0]) == 200
            assert len({*made}) == 1
            async with running(engine.url, store, tmp_path) as p:
                await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
                theirs = (await opened(p, other))["api_key"]
                assert theirs not in made
                assert [await asks(p, key) for key in (theirs, made[0])] == [200, 401]

    asyncio.run(test())


def test_the_key_of_a_closed_episode_reaches_nothing(store: Store, tmp_path: Path) -> None:
    runs = add_key(store, "runs", Scope.EPISODES)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        key = (await opened(p, runs))["api_key"]
        body = {"model": "base", "messages": [{"role": "user", "content": "x"}]}

        async def statuses() -> list[int]:
            models = await p.http.get(f"{p.url}/v1/models", headers=bearer(key))
            tokens = await p.http.post(f"{p.url}/tokenize", json=body, headers=bearer(key))
            return [await asks(p, key), models.status, tokens.status]

        assert await statuses() == [200] * 3
        close = f"{p.url}/v1/episodes/e-1/close"
        answer = await p.http.post(close, json={"status": "aborted"}, headers=bearer(runs))
        assert answer.status == 200
        engine.requests.clear()
        assert await statuses() == [409] * 3
        assert engine.requests == []

    both(test, store, tmp_path)


def test_with_several_workers_the_key_before_ends_at_all_of_them(
    store: Store, tmp_path: Path
) -> None:
    """The one that did not open the episode again remembers its first key."""
    runs, more = (add_key(store, name, Scope.EPISODES) for name in ("runs", "more"))

    async def test() -> None:
        async with (
            scripted_engine() as engine,
            running(engine.url, store, tmp_path, worker="0") as first,
            running(engine.url, store, tmp_path, worker="1") as second,
        ):
            for p in (first, second):
                await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            key = (await opened(first, runs))["api_key"]
            assert [await asks(p, key) for p in (first, second)] == [200, 200]
            again = (await opened(second, more))["api_key"]
            assert [await asks(p, key) for p in (first, second)] == [401, 401]
            assert [await asks(p, again) for p in (first, second)] == [200, 200]

    asyncio.run(test())
