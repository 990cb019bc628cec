"""SIGKILL to the proxy or its writer under load: a turn whose end a client saw is stored once.

No turn is stored in part, and no writer outlives its proxy. Half of the kills come at the worst
moment: just when a client sees the end of a reply. The others come at any moment. A seed decides
when; the scheduler still adds chance.

The proxy waits for the store as long as it does by default. On a busy machine a turn may take
longer, and is lost if the proxy is killed then. The proxy logs such a turn as late before the
client sees the end, and only late turns may be missing.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
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
import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.config import StoreConfig
from nextstate.engine.process import free_port
from nextstate.records import Turn
from nextstate.store import Store
from tests.postgresql_server import url_of
from tests.scripted_engine import MODEL, Script, ScriptedEngine, compact, plain_reply, stream_chunks
from tests.store.rows import select

DATABASES = True
"""Each test runs on both."""
CLIENTS = 8
REPLIES_BETWEEN_KILLS = 30
TIMEOUT = aiohttp.ClientTimeout(total=60)
JSON = {"Content-Type": "application/json"}
CONFIG = """
[store]
dir = "{state}"
url = "{database}"
[engine]
mode = "external"
url = "{engine}"
model = "{model}"
[proxy]
port = {port}
"""
LOG = "proxy.log"
LATE = re.compile(r"turn=(\S+) is late")


def pieces_of(text: str) -> list[str]:
    """The words of the engine's reply to `text`."""
    rng = Random(text)
    return [f"{text} ", *(f"{rng.randrange(1000)} " for _ in range(rng.randrange(1, 9)))]


def ids_of(text: str) -> tuple[int, ...]:
    first = zlib.crc32(text.encode()) % 10_000
    return tuple(first + number for number in range(len(pieces_of(text))))


def logprobs_of(text: str) -> tuple[float, ...]:
    return tuple(-0.25 * (number + 1) for number in range(len(pieces_of(text))))


class Answering(ScriptedEngine):
    """Answers each user text with its own words and token ids, one event after the other."""

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
    """The address of a running engine."""
    server = TestServer(Answering().app(), handler_cancellation=True)
    await server.start_server()
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        await server.close()


class Victim:
    """A proxy process: either it or its writer is killed and started again."""

    def __init__(
        self,
        folder: Path,
        engine: str,
        *,
        writer_only: bool = False,
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.up = asyncio.Event()
        self.kill_at_next_end = False
        self.writers: list[psutil.Process] = []
        """All that were seen, the present one last."""
        self.writer_only = writer_only
        self._config = folder / "nextstate.toml"
        self._log = folder / LOG
        state = folder / "state"
        values = {"state": state, "database": url_of(state), "engine": engine, "port": port}
        config = CONFIG.format(model=MODEL, **values)
        self._config.write_text(config)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    async def start(self) -> None:
        """Returns when it serves requests."""
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
        await self._wait_for_writer()
        self.up.set()

    async def restart(self) -> None:
        """Waits for what was killed to be back; starts it if it is the proxy."""
        if self._process is None or self._process.poll() is not None:
            await self.start()
        else:
            await self._wait_for_writer()

    async def _wait_for_writer(self) -> None:
        """Returns when there is a new writer."""
        async with asyncio.timeout(60):
            while True:
                for child in psutil.Process(self.process.pid).children():
                    if child not in self.writers and child.status() != psutil.STATUS_ZOMBIE:
                        self.writers.append(child)
                        return
                await asyncio.sleep(0.01)

    async def metrics(self) -> list[str]:
        """The lines of /metrics."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as answer:
            return (await answer.text()).splitlines()

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "nextstate", "proxy", "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
        return self._process

    def strike(self) -> None:
        """Kills the proxy, or its writer if `writer_only`."""
        self.kill_at_next_end = False
        if self.writer_only:
            self.writers[-1].kill()
        else:
            self.kill()

    async def no_writer_is_left(self) -> None:
        """Returns when all writers have ended by themselves."""
        _, alive = await asyncio.to_thread(psutil.wait_procs, self.writers, timeout=30)
        assert not alive, "a writer outlives its proxy"

    def kill(self) -> None:
        """Sends SIGKILL to the proxy."""
        self.up.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)


class Seen:
    """What the clients saw."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}
        """The user's text of each turn whose end a client saw."""
        self.cuts = 0
        self._goal = 0
        self._reached = asyncio.Event()

    def end(self, turn: str, text: str) -> None:
        """Takes in that a client saw the end of a turn."""
        self.ends[turn] = text
        if len(self.ends) >= self._goal:
            self._reached.set()

    async def wait_for(self, more: int, clients: Sequence[asyncio.Task[None]]) -> None:
        """Returns when clients saw `more` further ends; raises the error of a client."""
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
    """An agent: it repeats requests that broke, and leaves some replies in the middle."""

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
        """The reply's text; None if the end did not come."""
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
            self._victim.strike()
        self._seen.end(turn, messages[-1]["content"])


async def kill_again_and_again(folder: Path, kills: int, seed: int, *, writer_only: bool) -> Seen:
    """Kills the proxy, or only its writer, under load; returns what the clients saw."""
    rng = Random(seed)
    seen = Seen()
    async with answering() as engine:
        victim = Victim(folder, engine, writer_only=writer_only)
        clients = [
            asyncio.create_task(Client(f"c{number}", victim, seen, Random(rng.random())).run())
            for number in range(CLIENTS)
        ]
        try:
            for number in range(kills):
                await victim.restart()
                await seen.wait_for(rng.randrange(1, REPLIES_BETWEEN_KILLS), clients)
                if number % 2:
                    await asyncio.sleep(rng.random() * 0.01)
                    victim.strike()
                else:
                    victim.kill_at_next_end = True
                    await seen.wait_for(1, clients)
                if (number + 1) % max(1, kills // 10) == 0:
                    print(f"{number + 1} kills, {len(seen.ends)} ends seen, {seen.cuts} cut")
            if writer_only:
                await victim.restart()
                await seen.wait_for(1, clients)
                assert "nextstate_turns_lost_total 0" in await victim.metrics()
        finally:
            victim.kill()
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        await victim.no_writer_is_left()
    return seen


def check_content(turn: Turn) -> None:
    """Checks that the turn holds what the engine sent, up to a cut if there was one."""
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


def check(folder: Path, seen: Seen) -> None:
    """Checks that no turn is missing unless it was late, and that none is stored in part."""
    state = folder / "state"
    store = Store(StoreConfig(dir=str(state)))
    assert store.database.damage() == []
    ids = [row[0] for row in select(store, "SELECT id FROM turns")]
    query = "SELECT count(DISTINCT session || '/' || idx) FROM turns"
    assert select(store, query)[0][0] == len(ids), "two turns of one session at the same index"
    turns = {turn: store.turns.get(turn) for turn in ids}
    late = set(LATE.findall((folder / LOG).read_text()))
    missing = seen.ends.keys() - turns.keys()
    print(f"{len(seen.ends)} ends seen, {len(late)} turns late, {len(missing & late)} of them lost")
    assert not missing - late, f"{len(missing - late)} of {len(seen.ends)} turns are lost"
    answered: dict[str, list[str]] = {turn: [] for turn in ids}
    for name, turn in turns.items():
        assert turn is not None
        check_content(turn)
        if turn.parent is not None:
            answered[turn.parent].append(turn.request["messages"][-1]["content"])
        if name in seen.ends:
            assert turn.request["messages"][-1]["content"] == seen.ends[name]
            assert turn.finish_reason == "stop"
    for name, texts in answered.items():
        states = [state.text for state in store.turns.next_states(name)]
        assert states == sorted(set(texts)), "a turn without its next state, or with two"
    store.close()


@pytest.mark.parametrize(
    "kills", [4, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
@pytest.mark.parametrize("writer_only", [False, True], ids=["proxy", "writer"])
def test_a_kill_under_load_loses_no_turn_that_a_client_saw_end(
    tmp_path: Path, writer_only: bool, kills: int
) -> None:
    seen = asyncio.run(kill_again_and_again(tmp_path, kills, seed=kills, writer_only=writer_only))
    assert seen.cuts > 0, "no reply was cut"
    check(tmp_path, seen)


def test_the_first_turn_after_a_start_survives_the_proxy(tmp_path: Path) -> None:
    async def scene() -> Seen:
        seen = Seen()
        async with answering() as engine, aiohttp.ClientSession(timeout=TIMEOUT) as http:
            victim = Victim(tmp_path, engine)
            try:
                for number in range(3):
                    await victim.start()
                    text = f"first {number}"
                    body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
                    url = f"{victim.url}/v1/chat/completions"
                    async with http.post(url, data=orjson.dumps(body), headers=JSON) as answer:
                        turn = answer.headers["x-nextstate-turn"]
                        await answer.read()
                    victim.kill()
                    seen.end(turn, text)
                await victim.no_writer_is_left()
            finally:
                victim.kill()
        return seen

    check(tmp_path, asyncio.run(scene()))


@pytest.mark.parametrize(
    ("database", "number"),
    [("sqlite", signal.SIGTERM), ("postgresql", signal.SIGINT)],
    indirect=["database"],
)
def test_a_proxy_that_gets_a_signal_stores_late_turns_before_it_ends(
    tmp_path: Path, number: signal.Signals
) -> None:
    async def scene() -> str:
        async with answering() as engine:
            victim = Victim(tmp_path, engine)
            try:
                await victim.start()
                with blocking.recording():  # another process holds the database
                    body = {"model": MODEL, "messages": [{"role": "user", "content": "late"}]}
                    url = f"{victim.url}/v1/chat/completions"
                    async with (
                        aiohttp.ClientSession(timeout=TIMEOUT) as http,
                        http.post(url, data=orjson.dumps(body), headers=JSON) as answer,
                    ):
                        assert answer.status == 200
                        turn = answer.headers["x-nextstate-turn"]
                        await answer.read()
                    os.killpg(victim.process.pid, number)
                    victim.writers[-1].send_signal(number)
                assert await asyncio.to_thread(victim.process.wait, 30) == 0
                await victim.no_writer_is_left()
            finally:
                victim.kill()
            return turn

    blocking = Store(StoreConfig(dir=str(tmp_path / "state")))
    turn = asyncio.run(scene())
    assert blocking.turns.ids() == [turn]
    blocking.close()
