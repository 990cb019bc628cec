"""The proxy killed with SIGKILL under load: what a client saw end is kept, whole or not at all.

Half of the kills come at the worst moment, on the spot when a client sees the end of a reply; the
others anywhere. The seed decides, the scheduler has the last word.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.config import StoreConfig
from nextstate.records import Turn
from nextstate.store import Store
from nextstate.vllm import free_port
from tests.scripted_engine import MODEL, Script, ScriptedEngine, compact, plain_reply, stream_chunks

CLIENTS = 8
REPLIES_BETWEEN_KILLS = 30
TIMEOUT = aiohttp.ClientTimeout(total=60)
JSON = {"Content-Type": "application/json"}
CONFIG = """
[store]
dir = "{state}"
[engine]
mode = "external"
url = "{engine}"
model = "{model}"
[proxy]
port = {port}
record_timeout_s = 60.0
"""


def pieces_of(text: str) -> list[str]:
    """The words that the engine answers `text` with, and nothing else."""
    rng = Random(text)
    return [f"{text} ", *(f"{rng.randrange(1000)} " for _ in range(rng.randrange(1, 9)))]


def ids_of(text: str) -> tuple[int, ...]:
    first = zlib.crc32(text.encode()) % 10_000
    return tuple(first + number for number in range(len(pieces_of(text))))


def logprobs_of(text: str) -> tuple[float, ...]:
    return tuple(-0.25 * (number + 1) for number in range(len(pieces_of(text))))


class Answering(ScriptedEngine):
    """Answers each user text with words and token ids of its own, a few events at a time."""

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text = body["messages"][-1]["content"]
        script = Script(pieces=pieces_of(text))
        if not body.get("stream"):
            reply = plain_reply(body, script)
            reply["choices"][0]["token_ids"] = ids_of(text)
            return web.json_response(reply)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        ids = iter(ids_of(text))
        for chunk in stream_chunks(body, script):
            for choice in chunk["choices"]:
                if choice.get("token_ids"):
                    choice["token_ids"] = [next(ids)]
            await response.write(b"data: " + compact(chunk) + b"\n\n")
            await asyncio.sleep(0.001)
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def answering() -> AsyncGenerator[str]:
    """A running engine's address."""
    server = TestServer(Answering().app(), handler_cancellation=True)
    await server.start_server()
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        await server.close()


class Victim:
    """The proxy as a process that is killed and started again."""

    def __init__(self, folder: Path, engine: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.up = asyncio.Event()
        self.kill_at_next_end = False
        self._config = folder / "nextstate.toml"
        self._log = folder / "proxy.log"
        self._config.write_text(
            CONFIG.format(state=folder / "state", engine=engine, model=MODEL, port=port)
        )
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Returns when it lets requests through."""
        process = self._spawn()
        async with asyncio.timeout(60), aiohttp.ClientSession() as http:
            while True:
                assert process.poll() is None, self._log.read_text()[-2000:]
                try:
                    async with http.get(f"{self.url}/healthz") as answer:
                        if (await answer.json())["engine"] == "up":
                            break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.01)
        self.up.set()

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "nextstate", "proxy", "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        return self._process

    def kill(self) -> None:
        """SIGKILL, now."""
        self.up.clear()
        self.kill_at_next_end = False
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)


class Seen:
    """What the clients know."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}
        """User text of each turn whose end a client saw."""
        self.cuts = 0
        self._goal = 0
        self._reached = asyncio.Event()

    def end(self, turn: str, text: str) -> None:
        """A client has seen the end of a turn."""
        self.ends[turn] = text
        if len(self.ends) >= self._goal:
            self._reached.set()

    async def wait_for(self, more: int, clients: Sequence[asyncio.Task[None]]) -> None:
        """Returns when `more` further ends have been seen; raises what ends a client."""
        self._goal = len(self.ends) + more
        self._reached.clear()
        reached = asyncio.create_task(self._reached.wait())
        done, _ = await asyncio.wait(
            {reached, *clients}, timeout=60, return_when=asyncio.FIRST_COMPLETED
        )
        reached.cancel()
        for task in done:
            task.result()
        assert reached in done, f"not {more} replies in a minute"


class Client:
    """An agent that talks on, sends again what broke, and leaves a few replies in the middle."""

    def __init__(self, name: str, victim: Victim, seen: Seen, rng: Random) -> None:
        self._name = name
        self._victim = victim
        self._seen = seen
        self._rng = rng

    async def run(self) -> None:
        """Talks until cancelled."""
        messages: list[dict[str, Any]] = []
        number = 0
        async with aiohttp.ClientSession(timeout=TIMEOUT) as http:
            while True:
                if self._rng.random() < 0.1:
                    messages = []
                number += 1
                text = f"{self._name}-{number}"
                messages = [*messages, {"role": "user", "content": text}]
                stream = self._rng.random() < 0.7
                while (reply := await self._ask(http, messages, stream)) is None:
                    self._seen.cuts += 1
                messages = [*messages, {"role": "assistant", "content": reply}]

    async def _ask(
        self, http: aiohttp.ClientSession, messages: list[dict[str, Any]], stream: bool
    ) -> str | None:
        """The reply's text; None if its end never came."""
        stays = self._rng.randrange(20)
        await self._victim.up.wait()
        url = f"{self._victim.url}/v1/chat/completions"
        body = orjson.dumps({"model": MODEL, "messages": messages, "stream": stream})
        try:
            async with http.post(url, data=body, headers=JSON) as answer:
                assert answer.status == 200
                turn = answer.headers["x-nextstate-turn"]
                if not stream:
                    data = await answer.read()
                    self._ended(turn, messages)
                    return json.loads(data)["choices"][0]["message"]["content"]
                words: list[str] = []
                async for line in answer.content:
                    if line == b"data: [DONE]\n":
                        self._ended(turn, messages)
                        return "".join(words)
                    if line.startswith(b"data: "):
                        delta = json.loads(line[6:])["choices"][0]["delta"]
                        words.append(delta.get("content") or "")
                    if len(words) > stays:
                        return None
        except aiohttp.ClientError:
            return None
        raise AssertionError("a stream ended without [DONE] and without an error")

    def _ended(self, turn: str, messages: list[dict[str, Any]]) -> None:
        if self._victim.kill_at_next_end:
            self._victim.kill()
        self._seen.end(turn, messages[-1]["content"])


async def kill_again_and_again(folder: Path, kills: int, seed: int) -> Seen:
    """Load and kills; returns what the clients saw."""
    rng = Random(seed)
    seen = Seen()
    async with answering() as engine:
        victim = Victim(folder, engine)
        clients = [
            asyncio.create_task(Client(f"c{number}", victim, seen, Random(rng.random())).run())
            for number in range(CLIENTS)
        ]
        try:
            for number in range(kills):
                await victim.start()
                await seen.wait_for(rng.randrange(1, REPLIES_BETWEEN_KILLS), clients)
                if number % 2:
                    await asyncio.sleep(rng.random() * 0.01)
                    victim.kill()
                else:
                    victim.kill_at_next_end = True
                    await seen.wait_for(1, clients)
                if (number + 1) % max(1, kills // 10) == 0:
                    print(f"{number + 1} kills, {len(seen.ends)} ends seen, {seen.cuts} cut")
        finally:
            victim.kill()
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    return seen


def check_whole(turn: Turn) -> None:
    """The turn says exactly what the engine sent, or where it was cut."""
    text = turn.request["messages"][-1]["content"]
    if turn.finish_reason is None or turn.untrainable == "the client left before the end":
        assert turn.untrainable is not None
        assert "".join(pieces_of(text)).startswith(turn.reply["content"])
        assert (turn.completion_ids or ()) == ids_of(text)[: len(turn.completion_ids or ())]
        return
    assert turn.reply == {"role": "assistant", "content": "".join(pieces_of(text))}
    assert turn.completion_ids == ids_of(text)
    assert turn.behaviour_logprobs == logprobs_of(text)
    assert turn.prompt_ids == (1, 2, 3)
    assert turn.trainable, turn.untrainable


def check(state: Path, seen: Seen) -> None:
    """Nothing that a client saw end is missing, and nothing is there in part."""
    file = sqlite3.connect(state / "nextstate.sqlite3")
    assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert file.execute("PRAGMA foreign_key_check").fetchall() == []
    ids = [row[0] for row in file.execute("SELECT id FROM turns")]
    places = file.execute("SELECT count(DISTINCT session || '/' || idx) FROM turns").fetchone()[0]
    file.close()
    assert places == len(ids), "two turns of one session at the same index"
    store = Store(StoreConfig(dir=str(state)))
    turns = {turn: store.turn(turn) for turn in ids}
    missing = seen.ends.keys() - turns.keys()
    assert not missing, f"{len(missing)} of {len(seen.ends)} turns are lost"
    answered: dict[str, list[str]] = {turn: [] for turn in ids}
    for name, turn in turns.items():
        assert turn is not None
        check_whole(turn)
        if turn.parent is not None:
            answered[turn.parent].append(turn.request["messages"][-1]["content"])
        if name in seen.ends:
            assert turn.request["messages"][-1]["content"] == seen.ends[name]
            assert turn.finish_reason == "stop"
    for name, texts in answered.items():
        states = [state.text for state in store.next_states(name)]
        assert states == sorted(set(texts)), "a turn without its next state, or with two"
    store.close()


@pytest.mark.parametrize(
    "kills", [4, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_a_proxy_killed_under_load_loses_no_turn_that_a_client_saw_end(
    tmp_path: Path, kills: int
) -> None:
    seen = asyncio.run(kill_again_and_again(tmp_path, kills, seed=kills))
    assert seen.cuts > 0, "no kill met a reply under way"
    check(tmp_path / "state", seen)
