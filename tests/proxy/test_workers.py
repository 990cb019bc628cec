"""Several proxy workers on one port behave like one proxy."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
import pytest

from nextstate.engine.process import free_port, port_is_free
from nextstate.errors import EXIT_USAGE
from nextstate.store import Store
from tests.proxy.running_proxy import request
from tests.scripted_engine import MODEL, Script, ScriptedEngine, scripted_engine

WORKERS = 2
JSON = {"Content-Type": "application/json"}
CONFIG = """
[store]
dir = "{folder}/state"
[engine]
mode = "external"
url = "{engine}"
model = "{model}"
[proxy]
port = {port}
workers = {workers}
"""


def write_config(folder: Path, engine: str, port: int, workers: int = WORKERS) -> Path:
    file = folder / "nextstate.toml"
    values = {"folder": folder, "engine": engine, "model": MODEL, "port": port, "workers": workers}
    file.write_text(CONFIG.format(**values))
    return file


def command(config: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "nextstate", "proxy", "--config", str(config)]


async def within(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    """Returns when the condition holds; another process makes it hold."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.1)


@dataclass
class Connection:
    """A connection, and the worker at its other end."""

    http: aiohttp.ClientSession
    pid: int

    async def chat(self, messages: list[dict[str, Any]]) -> tuple[int, str]:
        """Asks for a reply; returns its status and the id of its turn."""
        data = orjson.dumps({"model": MODEL, "messages": messages})
        async with self.http.post("/v1/chat/completions", data=data, headers=JSON) as answer:
            await answer.read()
            return answer.status, answer.headers.get("x-nextstate-turn", "")


class Workers:
    """A running `nextstate proxy` with several workers."""

    def __init__(self, config: Path, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = config.parent / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command(config), cwd=config.parent, stdout=log, stderr=log
            )
        self._parent = psutil.Process(self.process.pid)

    def listening(self) -> set[int]:
        """Process ids of the workers that accept connections."""
        found: set[int] = set()
        for child in self._parent.children():
            with suppress(psutil.Error):  # it has just ended
                if any(
                    c.status == psutil.CONN_LISTEN and c.laddr.port == self.port
                    for c in child.net_connections("tcp")
                ):
                    found.add(child.pid)
        return found

    def all_listen(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return len(self.listening()) == WORKERS

    def at(self, client_port: int) -> int:
        """Process id of the worker that serves a client's port."""
        for pid in self.listening():
            for c in psutil.Process(pid).net_connections("tcp"):
                if c.raddr and c.raddr.port == client_port:
                    return pid
        raise AssertionError("no worker has the connection")

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[Connection]:
        """A new connection, open until the block ends."""
        port = free_port()
        timeout = aiohttp.ClientTimeout(total=30)
        connector = aiohttp.TCPConnector(
            limit=1, local_addr=("127.0.0.1", port), keepalive_timeout=60
        )
        async with aiohttp.ClientSession(self.url, connector=connector, timeout=timeout) as http:
            async with http.get("/healthz") as answer:
                assert await answer.json()
            yield Connection(http, self.at(port))

    async def connections(
        self, stack: AsyncExitStack, each: int = 1
    ) -> dict[int, list[Connection]]:
        """At least `each` connections to every worker, by its process id.

        The kernel chooses the worker, so it may take many connections.
        """
        found: defaultdict[int, list[Connection]] = defaultdict(list)
        for _ in range(200):
            made = await stack.enter_async_context(self.connected())
            found[made.pid].append(made)
            if len(found) == WORKERS and all(len(those) >= each for those in found.values()):
                break
        assert set(found) == self.listening()
        return dict(found)


@asynccontextmanager
async def workers(engine: ScriptedEngine, folder: Path) -> AsyncGenerator[Workers]:
    """Runs `nextstate proxy`; all its workers listen."""
    port = free_port()
    proxy = Workers(write_config(folder, engine.url, port), port)
    children: list[psutil.Process] = []
    try:
        await within(proxy.all_listen)
        children = psutil.Process(proxy.process.pid).children(recursive=True)
        yield proxy
    finally:
        proxy.process.terminate()
        await asyncio.to_thread(proxy.process.wait, 60)
        _, alive = psutil.wait_procs(children, timeout=30)
        for child in alive:
            child.kill()


def both_workers(tmp_path: Path, test: Callable[[ScriptedEngine, Workers], Any]) -> None:
    async def run() -> None:
        async with scripted_engine() as engine, workers(engine, tmp_path) as proxy:
            await test(engine, proxy)

    asyncio.run(run())


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


REPLY = {"role": "assistant", "content": "Hello"}


def test_a_conversation_across_the_workers_is_one_session(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, proxy: Workers) -> None:
        async with AsyncExitStack() as stack:
            found = await proxy.connections(stack, each=3)
            every = [c for those in found.values() for c in those]
            answers = await asyncio.gather(
                *(c.chat([said(f"hi {n}")]) for n, c in enumerate(every))
            )
            assert {status for status, _ in answers} == {200}
            await within(lambda: set(store.turns.ids()) == {turn for _, turn in answers})
            messages, ids = [said("one")], list[str]()
            alternating = zip(*found.values(), strict=False)
            for connection in (c for pair in alternating for c in pair):
                status, turn_id = await connection.chat(messages)
                assert status == 200
                await within(partial(store.turns.get, turn_id))  # the next one may follow it
                ids.append(turn_id)
                messages += [REPLY, said(f"and then, {len(ids)}?")]
        turns = [turn for turn in map(store.turns.get, ids) if turn is not None]
        assert len(turns) >= 6
        assert [turn.index for turn in turns] == list(range(len(ids)))
        assert [turn.parent for turn in turns] == [None, *ids[:-1]]
        assert len({turn.session for turn in turns}) == 1
        assert all(len(store.turns.next_states(turn)) == 1 for turn in ids[:-1])

    both_workers(tmp_path, test)


def test_a_killed_worker_is_restarted_and_the_others_serve_meanwhile(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, proxy: Workers) -> None:
        async with AsyncExitStack() as stack:
            (victim, _), (_, theirs) = (await proxy.connections(stack)).items()
            gate = asyncio.Event()
            engine.queue = [Script(gate=gate)]
            data = orjson.dumps(request(stream=True))
            held = await theirs[0].http.post("/v1/chat/completions", data=data, headers=JSON)
            proxy.process.send_signal(signal.SIGSTOP)  # it starts no other one yet
            os.kill(victim, signal.SIGKILL)
            await within(lambda: proxy.listening() == {theirs[0].pid})
            async with proxy.connected() as connection:
                assert connection.pid == theirs[0].pid
                assert (await connection.chat([said("still there?")]))[0] == 200
            proxy.process.send_signal(signal.SIGCONT)
            async with asyncio.timeout(60):
                while not proxy.all_listen():  # whoever listens answers
                    async with proxy.connected() as connection:
                        assert (await connection.chat([said("and now?")]))[0] == 200
            gate.set()
            assert (await held.read()).endswith(b"data: [DONE]\n\n")
            assert victim not in proxy.listening()
            after = await proxy.connections(stack)
            assert {(await those[0].chat([said("hi")]))[0] for those in after.values()} == {200}
            lost = re.search(r"nextstate_turns_lost_total (\d+)", await metrics(theirs[0].http))
            assert lost is not None
            assert lost[1] == "0"

    both_workers(tmp_path, test)


async def metrics(http: aiohttp.ClientSession, url: str = "") -> str:
    async with http.get(f"{url}/metrics") as answer:
        return await answer.text()


def test_after_sigterm_every_worker_finishes_its_replies_and_ends(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, proxy: Workers) -> None:
        pids = proxy.listening()
        async with AsyncExitStack() as stack:
            found = await proxy.connections(stack)
            engine.script.gate = asyncio.Event()
            data = orjson.dumps(request(stream=True))
            held = [
                await those[0].http.post("/v1/chat/completions", data=data, headers=JSON)
                for those in found.values()
            ]
            proxy.process.terminate()
            await within(lambda: proxy.listening() < pids)
            engine.script.gate.set()
            for answer in held:
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.to_thread(proxy.process.wait, 30) == 0
        assert not any(map(psutil.pid_exists, pids))
        assert port_is_free("127.0.0.1", proxy.port)
        assert len(store.turns.ids()) == len(held)

    both_workers(tmp_path, test)


def test_headers_pass_up_to_the_length_that_the_engine_takes(tmp_path: Path) -> None:
    async def test() -> None:
        async with scripted_engine() as engine:
            port = free_port()
            proxy = Workers(write_config(tmp_path, engine.url, port, workers=1), port)
            try:
                await within(lambda: not port_is_free("127.0.0.1", port))
                async with aiohttp.ClientSession(proxy.url, headers=JSON) as http:
                    long = {"tracestate": "a" * 60_000}
                    body = orjson.dumps(request())
                    async with http.post(f"/v1/echo?{'a' * 60_000}", data=b"{}") as answer:
                        assert answer.status != 400
                    async with http.post("/v1/chat/completions", data=body, headers=long) as answer:
                        assert answer.status == 200
                    assert engine.headers[-1]["tracestate"] == long["tracestate"]
            finally:
                proxy.process.terminate()
                await asyncio.to_thread(proxy.process.wait, 20)

    asyncio.run(test())


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, proxy: Workers) -> None:
        children = list(map(psutil.Process, proxy.listening()))
        proxy.process.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=30)
        assert alive == []
        assert port_is_free("127.0.0.1", proxy.port)

    both_workers(tmp_path, test)


@pytest.mark.parametrize(("count", "shared"), [(1, False), (WORKERS, True)])
def test_a_port_in_use_gives_one_message_with_the_key(
    tmp_path: Path, count: int, shared: bool
) -> None:
    with socket.socket() as other:
        if shared:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = write_config(tmp_path, "http://127.0.0.1:1", port, count)
        done = subprocess.run(
            command(config), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == EXIT_USAGE
    (line,) = done.stderr.splitlines()
    assert line.startswith("nextstate: [proxy] ")
    assert f"port = {port}" in line
    assert "another program listens there" in line


# Two workers in one process, which see each other through the store.
