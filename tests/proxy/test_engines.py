"""Several engines behind one proxy: who answers, what a flip waits for, what a dead one costs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nextstate.engine import client
from nextstate.engine.client import publish
from nextstate.errors import EngineError
from nextstate.store import Store
from proxy.intervals import Intervals
from proxy.lineages import Access
from tests.proxy.environment import Environment
from tests.proxy.running_proxy import V1, V2, Running, add_version, request, running, serve, until
from tests.scripted_engine import MODEL, Script, ScriptedEngine, scripted_engine

QUICK = Intervals(health_poll_s=0.05, down_poll_s=0.05, flip_s=0.5, slowest_poll_s=0.1)
STREAMS = 16
Test = Callable[[list[ScriptedEngine], Running], Awaitable[None]]


@asynccontextmanager
async def engines(count: int) -> AsyncGenerator[list[ScriptedEngine]]:
    async with AsyncExitStack() as opened:
        yield [await opened.enter_async_context(scripted_engine()) for _ in range(count)]


def urls(made: list[ScriptedEngine]) -> list[str]:
    return [engine.url for engine in made]


def several(test: Test, store: Store, tmp_path: Path, count: int = 2, **config: Any) -> None:
    """Runs a test with a proxy before scripted engines that are all up."""

    async def run() -> None:
        given = {"intervals": QUICK, **config}
        async with engines(count) as made, running(urls(made), store, tmp_path, **given) as p:
            await all_up(p)
            await asyncio.wait_for(test(made, p), 60)

    asyncio.run(run())


async def all_up(p: Running) -> None:
    await until(lambda: all(replica.up for replica in p.proxy.versions.replicas))


def answered(made: list[ScriptedEngine]) -> list[int]:
    return [len(engine.served) for engine in made]


async def talk(p: Running, name: str, turns: int) -> None:
    """One conversation, whose requests name no session."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"I am {name}."}]
    for number in range(turns):
        status, _, _ = await p.chat({"model": MODEL, "messages": messages})
        assert status == 200
        messages += [{"role": "assistant", "content": "Hello"}]
        messages += [{"role": "user", "content": f"turn {number}"}]


async def streams(p: Running, made: list[ScriptedEngine], gate: asyncio.Event) -> list[Any]:
    """Streams that run until `gate` is set."""
    before = sum(answered(made))
    for engine in made:
        engine.script = Script(gate=gate)
    asked = [
        asyncio.create_task(p.chat(request(f"stream {n}", stream=True))) for n in range(STREAMS)
    ]
    await until(lambda: sum(answered(made)) == before + STREAMS)
    for engine in made:
        engine.script = Script()
    return asked


def test_the_turns_of_a_conversation_stay_on_one_engine_and_conversations_are_spread(
    store: Store, tmp_path: Path
) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        for name in "abcdef":
            await talk(p, name, 20)
        said = [{m["messages"][0]["content"] for m in engine.requests} for engine in made]
        assert not said[0] & said[1] | said[1] & said[2] | said[0] & said[2]
        assert answered(made) == [40, 40, 40]
        turns = [store.turns.get(turn) for turn in store.turns.ids()]
        assert Counter(turn.engine for turn in turns if turn) == {
            replica.name: 40 for replica in p.proxy.versions.replicas
        }

    several(test, store, tmp_path, 3)


def test_a_version_flips_under_streams_without_a_failed_request(
    store: Store, tmp_path: Path
) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        await serve(store, p, tmp_path, 1)
        gate = asyncio.Event()
        old = await streams(p, made, gate)
        publishing = asyncio.create_task(serve(store, p, tmp_path, 2))
        statuses = []
        while not publishing.done():
            statuses.append((await p.chat(request("meanwhile")))[0])
        await publishing
        assert [set(engine.adapters) for engine in made] == [{V1, V2}] * 2
        statuses += [(await p.chat(request(f"new {n}")))[0] for n in range(8)]
        gate.set()
        ended = [await one for one in old]
        assert {*statuses, *(status for status, _, _ in ended)} == {200}
        assert all(data.endswith(b"data: [DONE]\n\n") for _, data, _ in ended)
        assert {headers["x-nextstate-version"] for _, _, headers in ended} == {"1"}
        assert [engine.served[-1] for engine in made] == [V2, V2]
        await until(lambda: [engine.unloaded for engine in made] == [[V1], [V1]])

    several(test, store, tmp_path)


def test_an_engine_that_dies_costs_only_the_streams_that_had_begun_on_it(
    store: Store, tmp_path: Path
) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        gate = asyncio.Event()
        begun = await streams(p, made, gate)
        body_gate = asyncio.Event()
        for engine in made:
            engine.script = Script(body_gate=body_gate)
        waiting = [asyncio.create_task(p.chat(request(f"whole {n}"))) for n in range(8)]
        await until(lambda: sum(answered(made)) == STREAMS + 8)
        on_first = answered(made)[0] - 4
        await made[0].kill()
        await until(lambda: sum(answered(made)) == STREAMS + 8 + 4)  # sent again, to the other one
        gate.set()
        body_gate.set()
        assert [(await one)[0] for one in waiting] == [200] * 8
        cut = sum(
            isinstance(one, Exception)
            for one in await asyncio.gather(*begun, return_exceptions=True)
        )
        assert cut == on_first == STREAMS // 2
        assert (await p.chat(request("after")))[0] == 200
        assert p.proxy.versions.moved >= 4

    several(test, store, tmp_path)


def test_an_engine_that_dies_in_a_flip_holds_nothing_up_and_comes_back_with_the_version(
    store: Store, tmp_path: Path
) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        await serve(store, p, tmp_path, 1)
        first, second = made
        first.loading = asyncio.Event()
        publishing = asyncio.create_task(serve(store, p, tmp_path, 2))
        await until(lambda: V2 in second.adapters and first.loads == 2)
        await first.kill()
        await publishing
        found = [await p.chat(request(str(n))) for n in range(8)]
        assert [status for status, _, _ in found] == [200] * 8
        assert {headers["x-nextstate-version"] for _, _, headers in found} == {"2"}
        first.loading = None
        served = len(first.served)
        await first.start_again()
        await all_up(p)
        assert V2 in first.adapters
        assert [(await p.chat(request(f"again {n}")))[0] for n in range(4)] == [200] * 4
        assert len(first.served) > served
        assert set(first.served[served:]) == {V2}

    several(test, store, tmp_path)


def test_a_slow_engine_is_left_out_of_a_version_until_it_has_loaded_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SLOW_S", 0.1)

    async def test(made: list[ScriptedEngine], p: Running) -> None:
        slow, quick = made
        slow.loading = asyncio.Event()
        await serve(store, p, tmp_path, 1)
        assert [(await p.chat(request(str(n))))[0] for n in range(6)] == [200] * 6
        assert (slow.served, len(quick.served)) == ([], 6)
        found = await (await p.http.get(f"{p.url}/healthz")).json()
        assert found["engine"] == "up"
        slow.loading.set()
        [replica] = [one for one in p.proxy.versions.replicas if one.client.url == slow.url]
        await until(lambda: V1 in replica.loaded)
        assert [(await p.chat(request(f"new {n}")))[0] for n in range(4)] == [200] * 4
        assert len(slow.served) > 0

    several(test, store, tmp_path)


def test_a_lineage_does_not_wait_for_an_engine_that_is_slow_with_the_version_of_another(
    store: Store, tmp_path: Path
) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        of_alice = replace(add_version(store, tmp_path, 1), lineage="alice")
        store.versions.add(of_alice, None)
        await publish(store, p.proxy.engines, of_alice)
        serving = p.proxy.versions.serving
        await until(lambda: serving["alice"].number == 1)
        made[0].loading = asyncio.Event()
        store.versions.set_serving("alice", 0)
        store.versions.set_serving("main", 1)
        await until(lambda: serving["alice"].number == 0)
        assert serving["main"].number == 0
        made[0].loading.set()
        await until(lambda: serving["main"].number == 1)

    several(
        *(test, store, tmp_path),
        access={"alice": Access("alice", None)},
        intervals=replace(QUICK, flip_s=30.0, store_poll_s=0.2),
    )


def test_an_engine_that_takes_no_adapters_gets_no_request_of_a_version(
    store: Store, tmp_path: Path
) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        made[0].refuses_adapters = True
        await serve(store, p, tmp_path, 1)
        assert [(await p.chat(request(str(n))))[0] for n in range(6)] == [200] * 6
        assert answered(made) == [0, 6]

    several(test, store, tmp_path)


def test_episodes_that_name_a_version_are_spread_over_engines_that_load_it_when_asked(
    store: Store, tmp_path: Path
) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        add_version(store, tmp_path, 1)
        for number in range(4):
            found = await Environment(p).open(f"e{number}", version=1)
            headers = {"Authorization": f"Bearer {found['api_key']}"}
            for _ in range(3):
                assert (await p.chat(request("Go."), headers))[0] == 200
        assert [engine.served for engine in made] == [[V1] * 6, [V1] * 6]

    several(test, store, tmp_path)


def test_a_version_that_no_engine_loads_does_not_serve(store: Store, tmp_path: Path) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        for engine in made:
            engine.refuses_adapters = True
        with pytest.raises(EngineError, match="LoRA is not enabled"):
            await publish(store, p.proxy.engines, add_version(store, tmp_path, 1))
        assert store.versions.serving("main").number == 0

    several(test, store, tmp_path)


def test_what_waits_on_an_engine_that_froze_goes_to_another_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = client.EngineClient.healthy
    monkeypatch.setattr(client.EngineClient, "healthy", lambda self: healthy(self, 0.1))

    async def test(made: list[ScriptedEngine], p: Running) -> None:
        made[0].frozen = asyncio.Event()
        asked = [asyncio.create_task(p.chat(request(str(n)))) for n in range(6)]
        assert [(await one)[0] for one in asked] == [200] * 6
        assert answered(made) == [0, 6]
        made[0].frozen.set()
        await all_up(p)
        assert (await p.chat(request("new")))[0] == 200

    several(test, store, tmp_path)


def test_what_waits_on_an_engine_that_was_slow_once_to_tell_its_health_stays_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy, missed = client.EngineClient.healthy, asyncio.Event()

    async def look(self: client.EngineClient) -> bool:
        found = await healthy(self, 0.2)
        if not found:
            missed.set()
        return found

    async def test(made: list[ScriptedEngine], p: Running) -> None:
        monkeypatch.setattr(client.EngineClient, "healthy", look)
        made[0].frozen = missed
        asked = [asyncio.create_task(p.chat(request(str(n)))) for n in range(6)]
        assert [(await one)[0] for one in asked] == [200] * 6
        assert missed.is_set()
        assert (answered(made), p.proxy.versions.moved) == ([3, 3], 0)

    several(test, store, tmp_path)


def test_a_request_that_ends_two_engines_is_not_sent_to_a_third(
    store: Store, tmp_path: Path
) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        ended: list[ScriptedEngine] = []

        async def dies(engine: ScriptedEngine) -> None:
            await until(lambda: bool(engine.served))
            ended.append(engine)
            await engine.kill()

        for engine in made:
            engine.script = Script(body_gate=asyncio.Event())
        dying = [asyncio.create_task(dies(engine)) for engine in made]
        status, data, headers = await p.chat(request("this one kills"))
        assert (status, headers["Retry-After"], len(ended)) == (503, "10", 2)
        assert b"Two inference engines ended while they had this request" in data
        for task in dying:
            task.cancel()

    several(test, store, tmp_path, 3)


def test_a_request_that_two_engines_hang_with_is_not_sent_to_a_third(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = client.EngineClient.healthy
    monkeypatch.setattr(client.EngineClient, "healthy", lambda self: healthy(self, 0.1))

    async def test(made: list[ScriptedEngine], p: Running) -> None:
        async def hangs(engine: ScriptedEngine) -> None:
            await until(lambda: bool(engine.served))
            engine.frozen = asyncio.Event()

        for engine in made:
            engine.script = Script(body_gate=asyncio.Event())
        hanging = [asyncio.create_task(hangs(engine)) for engine in made]
        status, data, _ = await p.chat(request("this one hangs"))
        assert (status, sorted(answered(made))) == (503, [0, 1, 1])
        assert b"Two inference engines ended while they had this request" in data
        for engine, task in zip(made, hanging, strict=True):
            task.cancel()
            if engine.frozen is not None:
                engine.frozen.set()

    several(test, store, tmp_path, 3)


def test_requests_wait_while_all_engines_are_down_and_the_first_one_back_answers(
    store: Store, tmp_path: Path
) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        for engine in made:
            await engine.kill()
        await until(lambda: not p.proxy.versions.up)
        asked = [asyncio.create_task(p.chat(request(str(n), stream=True))) for n in range(4)]
        await until(lambda: sum(one.running for one in p.proxy.versions.replicas) == 4)
        await made[1].start_again()
        assert [(await one)[0] for one in asked] == [200] * 4
        assert answered(made) == [0, 4]
        assert sum(one.running for one in p.proxy.versions.replicas) == 0

    several(test, store, tmp_path)


def test_two_workers_send_a_conversation_to_the_same_engine(store: Store, tmp_path: Path) -> None:
    async def test(made: list[ScriptedEngine], p: Running) -> None:
        other = running(urls(made), store, tmp_path, worker="1", intervals=QUICK)
        async with other as second:
            await all_up(second)
            for name in "abcdefgh":
                await p.chat(request(f"Only one worker knows {name}."))
                at = [len(engine.served) for engine in made]
                for worker in (p, second, p, second):
                    assert (await worker.chat(request(f"I am {name}.")))[0] == 200
                more = [now - was for now, was in zip(answered(made), at, strict=True)]
                assert sorted(more) == [0, 4]

    several(test, store, tmp_path, worker="0")
