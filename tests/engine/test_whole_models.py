"""All weights trained beside a real vLLM: a version gets an engine, agrees, serves, goes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import aiohttp
import psutil
import pytest

from demo.course import MODEL
from nextstate.app.engine_access import change_version, engine_clients
from nextstate.app.settings import Settings
from nextstate.engine.client import publish
from nextstate.engine.process import free_port
from nextstate.engine.whole import EXACT_NATS, UP, agree, read_engines
from nextstate.records import VersionState
from nextstate.store import Store
from nextstate.store.versions import base_version
from tests.running_loop import Loop, wait_for, write_config

pytestmark = [pytest.mark.engine, pytest.mark.soak, pytest.mark.timeout(1200)]
STREAMS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    port = free_port()
    file = write_config(tmp_path_factory.mktemp("whole"), port=port)
    full = "[learner]\nlora_rank = 0\nlearning_rate = 0.0"
    file.write_text(file.read_text().replace("[learner]\nlearning_rate = 1e-3", full))
    loop = Loop(file, port)
    try:
        loop.wait_ready()
        yield loop
    finally:
        loop.close()


def engine_processes(loop: Loop, model: str) -> list[psutil.Process]:
    """Those that run a model; one that was killed may still wait for its parent."""
    found: list[psutil.Process] = []
    for child in psutil.Process(loop.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if any(model in word for word in child.cmdline()):
                found.append(child)
    return found


async def stream(
    http: aiohttp.ClientSession, url: str, number: int, until: asyncio.Event
) -> list[int]:
    """The statuses of streams one after the other; 0 for one that was cut."""
    found: list[int] = []
    while not until.is_set():
        text = f"Stream {number}, {len(found)}: how many?"
        body: dict[str, Any] = {"model": MODEL, "stream": True, "max_tokens": 24}
        body["messages"] = [{"role": "user", "content": text}]
        async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
            data = await answer.read()
            found.append(answer.status if data.endswith(b"data: [DONE]\n\n") else 0)
    return found


async def flip(loop: Loop, number: int) -> tuple[list[int], float]:
    """(statuses of streams while version `number` is put into service, seconds it took)."""
    settings = Settings.read(loop.config)
    store = Store(settings.store)
    known = store.versions.get("main", number)
    version = known or base_version("main", VersionState.RETIRED)
    until = asyncio.Event()
    async with aiohttp.ClientSession() as http:
        running = [asyncio.create_task(stream(http, loop.url, n, until)) for n in range(STREAMS)]
        await asyncio.sleep(1)
        started = time.monotonic()
        await change_version(settings, publish, store, version)
        took = time.monotonic() - started
        await asyncio.sleep(2)
        until.set()
        statuses = [status for found in await asyncio.gather(*running) for status in found]
    store.close()
    return statuses, took


async def answered_by(loop: Loop) -> tuple[int, str]:
    """The version of a new turn, and its engine."""
    async with aiohttp.ClientSession() as http:
        messages = [{"role": "user", "content": f"{time.monotonic()}?"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 4}
        async with http.post(f"{loop.url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            turn = answer.headers["x-nextstate-turn"]
    told = {row["turn"]: row for row in loop.turns()}[turn]
    return told["version"], told["engine"]


def test_a_real_step_makes_a_version_that_its_own_engine_serves_and_no_request_fails(
    whole: Loop,
) -> None:
    assert whole.talk_until(1, seed=1, within_s=800) == 0
    whole.command("pause")  # no further version comes between
    settings = Settings.read(whole.config)
    (engine,) = read_engines(settings.store.path).values()
    assert (engine.number, engine.state, engine.exact) == (1, UP, True)

    async def nats() -> float:
        async with engine_clients(settings) as bases:
            async with bases[0].twin(engine.url, engine.name) as own:
                found = await agree(own, engine)
            return found

    found = asyncio.run(nats())
    print(f"engine and learner differ by {found:.2g} nats at most")
    assert found <= EXACT_NATS
    assert asyncio.run(answered_by(whole)) == (1, "engine-v000001")
    assert json.loads(whole.command("status", "--json"))["serving"] == {"main": 1}


def test_a_return_to_the_base_and_back_starts_no_engine_and_no_stream_fails(whole: Loop) -> None:
    running = engine_processes(whole, "main-v000001")
    for number, engine in ((0, "engine"), (1, "engine-v000001")):
        statuses, took = asyncio.run(flip(whole, number))
        print(f"{len(statuses)} streams while version {number} came into service in {took:.2f} s")
        assert {*statuses} == {200}
        assert engine_processes(whole, "main-v000001") == running
        assert asyncio.run(answered_by(whole)) == (number, engine)


def test_the_engine_of_the_version_that_serves_is_started_again(whole: Loop) -> None:
    (before,) = engine_processes(whole, "main-v000001")
    before.kill()
    started = time.monotonic()
    wait_for(lambda: engine_processes(whole, "main-v000001") not in ([], [before]), 60)
    wait_for(lambda: json.loads(whole.command("status", "--json"))["engine"] == "up", 600)
    print(f"up {time.monotonic() - started:.1f} s after its engine was killed")
    assert asyncio.run(answered_by(whole)) == (1, "engine-v000001")
