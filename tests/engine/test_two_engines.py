"""Two real vLLM servers under one supervisor: prefixes stay, a flip costs nothing, one may die."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from demo.course import MODEL
from nextstate.app.engine_access import change_version, zero_adapter
from nextstate.app.settings import Settings
from nextstate.engine.adapter_files import folder_sha256
from nextstate.engine.client import publish
from nextstate.engine.process import free_port
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.running_loop import Loop, wait_for, write_config

pytestmark = [pytest.mark.engine, pytest.mark.soak, pytest.mark.timeout(900)]
TURNS, STREAMS = 20, 16


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    port = free_port()
    file = write_config(tmp_path_factory.mktemp("two"), port=port)
    text = file.read_text().replace("[engine]", "[engine]\nreplicas = 2")
    file.write_text(text)
    loop = Loop(file, port)
    try:
        loop.wait_ready()
        wait_for(lambda: engines(loop) == ["up", "up"], 300)
        yield loop
    finally:
        loop.close()


def engines(loop: Loop) -> list[str]:
    return list(json.loads(loop.command("status", "--json"))["engines"].values())


async def ask(
    http: aiohttp.ClientSession, url: str, messages: list[dict[str, str]], **more: Any
) -> tuple[dict[str, Any], str]:
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, **more}
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json(), answer.headers.get("x-nextstate-turn", "")


async def talk(http: aiohttp.ClientSession, url: str, name: str) -> tuple[float, list[str]]:
    """(the share of the prompt tokens that were cached, the turns) of one conversation."""
    messages = [{"role": "user", "content": f"{name} has 3 apples and gets 4 more. How many?"}]
    cached = asked = 0
    turns: list[str] = []
    for number in range(TURNS):
        reply, turn = await ask(http, url, messages)
        turns.append(turn)
        usage = reply["usage"]
        asked += usage["prompt_tokens"]
        cached += (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
        messages.append({"role": "user", "content": f"And {number} more?"})
    return cached / asked, turns


def test_a_session_hits_the_cache_as_on_one_engine_and_every_turn_tells_its_engine(
    two: Loop,
) -> None:
    state = json.loads((two.state / "engine.json").read_text())

    async def run() -> tuple[float, float, list[list[str]]]:
        headers = {"Authorization": f"Bearer {state['key']}"}
        async with aiohttp.ClientSession() as http, aiohttp.ClientSession(headers=headers) as own:
            found = [await talk(http, two.url, name) for name in ("Ann", "Bob")]
            alone, _ = await talk(own, state["url"][0], "Cyd")
        return sum(share for share, _ in found) / 2, alone, [turns for _, turns in found]

    through, alone, sessions = asyncio.run(run())
    print(f"cached: {through:.3f} of two engines, {alone:.3f} of one")
    assert through >= 0.95 * alone > 0
    told = {row["turn"]: row["engine"] for row in two.turns()}
    assert [len({told[turn] for turn in turns}) for turns in sessions] == [1, 1]
    assert {told[turns[0]] for turns in sessions} == {"engine-0", "engine-1"}


def test_a_version_flips_under_16_streams_and_an_engine_that_is_killed_comes_back(
    two: Loop, tmp_path: Path
) -> None:
    settings = Settings.read(two.config)
    wait_for(lambda: zero_adapter(settings).exists(), 120)  # the learner makes it
    folder = tmp_path / "v1"
    shutil.copytree(zero_adapter(settings), folder)
    sha256 = folder_sha256(folder)
    store = Store(settings.store)
    version = PolicyVersion("main", 1, 0, str(folder), sha256, 16, VersionState.CANDIDATE)
    store.versions.add(version, None)

    async def after() -> set[int]:
        """The versions of eight conversations, which are spread over both engines."""
        async with aiohttp.ClientSession() as http:
            texts = [f"After {number}, {time.monotonic()}?" for number in range(8)]
            asked = [[{"role": "user", "content": text}] for text in texts]
            turns = [(await ask(http, two.url, messages))[1] for messages in asked]
        told = {row["turn"]: row["version"] for row in two.turns()}
        return {told[turn] for turn in turns}

    async def streams(http: aiohttp.ClientSession, until: asyncio.Event) -> list[int]:
        async def one(number: int) -> list[int]:
            found: list[int] = []
            while not until.is_set():
                text = f"Stream {number}, {len(found)}: how many?"
                body = {"model": MODEL, "stream": True, "max_tokens": 24}
                body["messages"] = [{"role": "user", "content": text}]
                async with http.post(f"{two.url}/v1/chat/completions", json=body) as answer:
                    data = await answer.read()
                    whole = data.endswith(b"data: [DONE]\n\n")
                    found.append(answer.status if whole else 0)
            return found

        all_found = await asyncio.gather(*(one(number) for number in range(STREAMS)))
        return [status for found in all_found for status in found]

    async def flip() -> list[int]:
        until = asyncio.Event()
        async with aiohttp.ClientSession() as http:
            running = asyncio.create_task(streams(http, until))
            await asyncio.sleep(2)
            await change_version(settings, publish, store, version)
            await asyncio.sleep(2)
            until.set()
            return await running

    statuses = asyncio.run(flip())
    print(f"{len(statuses)} streams while the version changed")
    assert {*statuses} == {200}
    wait_for(lambda: asyncio.run(after()) == {1}, 30)  # until the proxy has seen it
    assert asyncio.run(after()) == {1}

    servers = [
        child
        for child in psutil.Process(two.process.pid).children()
        if "vllm.entrypoints.openai.api_server" in child.cmdline()
    ]
    servers[0].kill()
    began = time.monotonic()

    assert asyncio.run(after()) == {1}
    print(f"8 replies after {time.monotonic() - began:.1f} s")
    wait_for(lambda: engines(two) != ["up", "up"], 30)
    wait_for(lambda: engines(two) == ["up", "up"], 300)
    assert asyncio.run(after()) == {1}
    store.close()
