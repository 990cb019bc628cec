"""No log line of proxy, writer and judge has a word of a conversation, whatever goes wrong."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nextstate.config import StoreConfig
from nextstate.engine.process import free_port
from nextstate.store import Store
from tests.scripted_engine import MODEL, Script, ScriptedEngine, scripted_engine

CONFIG = """
[store]
dir = "{folder}/state"
[engine]
mode = "external"
url = "{engine}"
model = "{model}"
[proxy]
port = {port}
[judge]
kind = "{judge}"
votes = 1
[privacy]
"""
LEAKY = """
class Leaky:
    name, deterministic = "leaky", True

    async def vote(self, evidence, seed):
        raise KeyError(f"cannot judge {evidence}")

    async def close(self):
        pass


def create(settings):
    return Leaky()
"""
SAID = ("xylophant", "quibberish", "flumboxed", "zorptastic", "glimwhistle", "snorkwad")
"""Words that stand nowhere else."""
PERSON, REPLY, TOOL, SYSTEM, NEXT, OPINION = SAID


@pytest.mark.parametrize("judge", ["engine", "leaky:create"])
@pytest.mark.timeout(120)
def test_no_log_line_quotes_a_conversation(tmp_path: Path, judge: str) -> None:
    (tmp_path / "leaky.py").write_text(LEAKY)

    async def test() -> None:
        async with scripted_engine() as engine:
            engine.script = Script(("Your ", REPLY))
            port, file = free_port(), tmp_path / "nextstate.toml"
            values = {"folder": tmp_path, "engine": engine.url, "model": MODEL}
            file.write_text(CONFIG.format(**values, port=port, judge=judge))
            url = f"http://127.0.0.1:{port}"
            async with (
                stage("proxy", tmp_path),
                stage("judge", tmp_path),
                aiohttp.ClientSession() as http,
            ):
                await up(http, url)
                await tried(tmp_path, await talk(http, url, engine))

    asyncio.run(test())
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert [line for line in logs.splitlines() if any(word in line for word in SAID)] == []
    assert f"turn={turn_in(logs)}" in logs
    with closing(Store(StoreConfig(dir=f"{tmp_path}/state"))) as store:
        turns = [store.turns.get(turn) for turn in store.turns.ids()]
        said = " ".join(str(turn) for turn in turns)
        assert all(word in said for word in (PERSON, REPLY, TOOL, SYSTEM, NEXT))
        reasons = [turn.untrainable or "" for turn in turns if turn is not None]
        assert [reason for reason in reasons if any(word in reason for word in SAID)] == []


def turn_in(logs: str) -> str:
    found = re.search(r"turn=(turn_\w+)", logs)
    assert found is not None, logs
    return found[1]


async def talk(http: aiohttp.ClientSession, url: str, engine: ScriptedEngine) -> str:
    """A conversation with every mishap; returns the turn that can be judged."""
    call = {"id": "c", "type": "function", "function": {"name": TOOL, "arguments": f'"{TOOL}"'}}
    system = {"role": "system", "content": f"Be a {SYSTEM}."}
    asked = [system, {"role": "user", "content": f"A {PERSON}, please."}]
    answered = [*asked, {"role": "assistant", "content": f"Your {REPLY}"}]

    async def post(path: str, body: Any, **more: Any) -> aiohttp.ClientResponse:
        sent = {"data": body} if isinstance(body, bytes) else {"json": body}
        return await http.post(f"{url}{path}", **sent, **more)

    async def chat(messages: Any, **more: Any) -> aiohttp.ClientResponse:
        return await post("/v1/chat/completions", {"model": MODEL, "messages": messages, **more})

    first = await chat(asked)
    assert first.status == 200
    turn = first.headers["x-nextstate-turn"]
    assert (await chat([*answered, {"role": "user", "content": f"No, {NEXT}!"}])).status == 200
    mishaps = [
        Script(("Your ", REPLY), cut_after=1),
        Script(status=500),
        Script(status=400),
        Script(("Your ", REPLY), miscount=3),
        Script(("Your ", REPLY), unknown_logprob=True),
        Script((REPLY,), answers_as=REPLY),
    ]
    for script in mishaps:
        for stream in (True, False):
            engine.queue = [script]
            try:
                await (await chat(asked, stream=stream)).read()
            except aiohttp.ClientError:
                assert script.cut_after is not None
    engine.queue = [Script((), tool_calls=[call])]
    await chat(asked, tools=[{"type": "function", "function": {"name": TOOL}}])
    results = [
        *asked,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": TOOL},
    ]
    await chat(results)
    await chat(asked, bad_words=[PERSON])
    await chat(asked, response_format={"type": "json_schema", "json_schema": {"name": PERSON}})
    await chat(asked, prompt_logprobs=1)
    await chat(asked, temperature=PERSON)
    await chat({"role": PERSON})
    await chat([{"role": PERSON, "content": [{"type": PERSON, PERSON: PERSON}]}])
    await chat([{"role": "user", "content": f"\ud800{PERSON}"}])
    await post("/v1/messages", {"model": MODEL, "max_tokens": 9, "messages": asked[1:]})
    await post("/v1/responses", {"model": MODEL, "input": f"A {PERSON}"})
    json_type = {"Content-Type": "application/json"}
    broken = f'{{"model": "{MODEL}", "messages": [{{"content": "{PERSON}"'.encode()
    await post("/v1/chat/completions", broken, headers=json_type)
    await post("/v1/chat/completions", b"[" * 900 + PERSON.encode(), headers=json_type)
    feedback = {"score": -1, "hint": f"Say {OPINION}.", "comment": OPINION}
    await post("/v1/feedback", {"turn_id": turn_id(first), **feedback, "score": OPINION})
    await post("/v1/feedback", {"turn_id": OPINION, **feedback})
    return turn


def turn_id(answer: aiohttp.ClientResponse) -> str:
    return answer.headers["x-nextstate-turn"]


async def up(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                async with http.get(f"{url}/healthz") as answer:
                    if (await answer.json())["engine"] == "up":
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


async def tried(folder: Path, turn: str) -> None:
    """Returns when the judge has judged the turn, or could not."""
    with closing(Store(StoreConfig(dir=f"{folder}/state"))) as store:
        async with asyncio.timeout(60):
            while True:
                standing = store.lookup.standing(turn)
                judged = store.judging.verdict(turn) is not None
                if judged or (standing is not None and standing.work_reason is not None):
                    return
                await asyncio.sleep(0.05)


@asynccontextmanager
async def stage(name: str, folder: Path) -> AsyncGenerator[None]:
    """A process of ours; its log is NAME.log."""
    argv = [sys.executable, "-P", "-m", "nextstate", name]
    argv += ["--config", str(folder / "nextstate.toml")]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()
