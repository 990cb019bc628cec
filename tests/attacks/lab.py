"""Where attacks run: two proxies with their pages before one engine, and what must never show.

The *open* door is a proxy without a key, as on a laptop; the *closed* one has keys of every kind.
Each holds a turn with a word that no attacker may read. `Lab.hold` takes a picture of everything
that an attack must leave alone, and `Lab.harm` says what it changed.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from nextstate.app.page.routes import Page
from nextstate.config import StoreConfig
from nextstate.engine.client import publish
from nextstate.keys import Key, Scope, hashed, new_key
from nextstate.redaction import Redactor
from nextstate.store import Store
from proxy.lineages import Access
from tests.page.running_page import settings_of
from tests.proxy.running_proxy import Running, request, running
from tests.proxy.test_requests import Answer, ask
from tests.proxy.writer_thread import WriterThread
from tests.scripted_engine import ScriptedEngine, scripted_engine

WORD = "marmalade-corridor-81"
"""Stands in turns that no attacker may read."""
TAUGHT = "Answer-with-the-stolen-hint"
"""What an attacker would like to be stored."""
ENGINE_KEY = "engine-key-5f0c1e"
_POLLED = frozenset(("/health", "/version", "/v1/models"))
"""What the proxy itself asks the engine again and again."""
_KEPT = (
    *("turns", "texts", "verdicts", "feedback", "samples", "versions", "decisions", "rewards"),
    *("judgements", "ledger", "next_states", "groups"),
)


class Attacker(StrEnum):
    """Who attacks, as SECURITY.md names them."""

    PAGE = "a web page"
    ACCOUNT = "another account"
    SHELL = "the agent's own shell"
    CLIENT = "a client with a key"
    ENGINE = "a malicious engine, model or adapter"
    NETWORK = "somebody on the network"
    DISK = "a stolen disk"
    TEXT = "poisoned text"


@dataclass(frozen=True)
class Attack:
    """One request, and what must be true after it.

    `$chat$`, `$turn$` and the like stand for the lab's keys and ids.
    """

    name: str
    attacker: Attacker
    target: str
    status: int | Sequence[int]
    """What the answer may say; 0: none comes."""
    lines: Sequence[str] = ()
    body: Any = None
    """Bytes, a text, or what becomes JSON with its Content-Type."""
    method: str = ""
    """POST if there is a body, else GET."""
    closed: bool = True
    """At which door."""
    host: str = "localhost"
    raw: str | bytes | None = None
    """The whole request instead."""
    reaches: bool = False
    """Whether the engine may get it. It never may be recorded."""
    says: str = ""
    """What the answer must hold."""


Condition = Callable[["Lab"], Awaitable[None]]
CONDITIONS: list[tuple[str, Attacker, Condition, bool]] = []
"""(name, attacker, what happens and must be true, whether only the long form has it)."""


def condition(attacker: Attacker, *, slow: bool = False) -> Callable[[Condition], Condition]:
    """Puts an attack of several steps, or on something else than a port, into the suite."""

    def put(function: Condition) -> Condition:
        CONDITIONS.append((function.__name__.replace("_", " "), attacker, function, slow))
        return function

    return put


@dataclass
class WatchedEngine(ScriptedEngine):
    """Notes what it was asked, besides what the proxy asks for itself."""

    reached: list[tuple[str, bytes]] = field(default_factory=list)
    answer: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
    """A malicious engine's own answer; None: the usual one."""

    @web.middleware
    async def _reset(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path not in _POLLED:
            self.reached.append((request.path, await request.read()))
        if self.answer is not None and (found := await self.answer(request)) is not None:
            return found
        try:
            return await handler(request)
        except (RecursionError, AttributeError, TypeError):  # vLLM says what it cannot read
            return web.json_response({"error": {"message": "unreadable", "code": 400}}, status=400)


@dataclass
class Lab:
    """What an attack meets."""

    engine: WatchedEngine
    open: Running
    closed: Running
    http: aiohttp.ClientSession
    log: list[str]
    words: dict[str, str] = field(default_factory=dict)
    """What `$name$` stands for."""
    held: dict[str, object] | None = None
    """What was there after the last attack: a late change counts as the next one's."""

    def fill(self, text: str) -> str:
        for name, value in self.words.items():
            text = text.replace(f"${name}$", value)
        return text

    @property
    def keys(self) -> list[str]:
        """What no answer may hold."""
        names = (
            *Scope,
            "alice-chat",
            "alice-read",
            "alice-episodes",
            "bob",
            "revoked",
            "episode-key",
        )
        return [ENGINE_KEY, *(self.words[name] for name in names)]

    def door(self, closed: bool = True) -> Running:
        return self.closed if closed else self.open

    def raw(self, attack: Attack) -> bytes:
        """The request as it goes over the wire."""
        if attack.raw is not None:
            if isinstance(attack.raw, str):
                return self.fill(attack.raw).encode("utf-8", "surrogateescape")
            return attack.raw
        lines, body = [self.fill(line) for line in attack.lines], b""
        if isinstance(attack.body, bytes):
            body = attack.body
        elif isinstance(attack.body, str):
            body = self.fill(attack.body).encode("utf-8", "surrogateescape")
        elif attack.body is not None:
            body = self.fill(json.dumps(attack.body)).encode()
            if not any(line.lower().startswith("content-type:") for line in lines):
                lines.append("Content-Type: application/json")
        if body:
            lines.append(f"Content-Length: {len(body)}")
        method = attack.method or ("POST" if attack.body is not None else "GET")
        target = self.fill(attack.target)
        head = [f"{method} {target} HTTP/1.1", f"Host: {attack.host}", "Connection: close", *lines]
        return ("\r\n".join(head) + "\r\n\r\n").encode("utf-8", "surrogateescape") + body

    async def send(self, attack: Attack) -> Answer:
        """The answer; an empty one if the connection was closed without."""
        try:
            async with asyncio.timeout(15):
                return await ask(self.door(attack.closed).url, self.raw(attack))
        except (asyncio.IncompleteReadError, ConnectionError):
            return Answer(b"")

    async def json(self, method: str, path: str, key: str, body: Any = None) -> tuple[int, Any]:
        """(status, answer) of a request with a key of the lab, or a key itself."""
        bearer = {"Authorization": f"Bearer {self.words.get(key, key)}"}
        url = self.closed.url + self.fill(path)
        answer = await self.http.request(method, url, json=body, headers=bearer)
        data = await answer.read()
        return answer.status, orjson.loads(data) if data[:1] in (b"{", b"[") else data.decode()

    async def chat(self, text: str, key: str = Scope.CHAT, **more: Any) -> tuple[int, str, str]:
        """(status, body, id of the turn) of a chat at the closed door."""
        bearer = {"Authorization": f"Bearer {self.words.get(key, key)}"}
        url = f"{self.closed.url}/v1/chat/completions"
        answer = await self.http.post(url, json=request(text, **more), headers=bearer)
        return answer.status, await answer.text(), answer.headers.get("x-nextstate-turn", "")

    def hold(self) -> dict[str, object]:
        """What must be the same after an attack."""
        found: dict[str, object] = {"engine": len(self.engine.reached)}
        for name, door in (("open", self.open), ("closed", self.closed)):
            for table, rows in _rows(door.proxy.store.dir / "nextstate.sqlite3"):
                found[f"{table} of the {name} door"] = rows
            logins = door.proxy.store.dir / "logins"
            found[f"logins of the {name} door"] = (
                sorted(f.name for f in logins.iterdir()) if logins.is_dir() else []
            )
        return found

    def harm(self, before: dict[str, object], *, reaches: bool = False) -> list[str]:
        """What an attack has changed, with nobody's permission."""
        after = self.held = self.hold()
        return [
            name
            for name in before
            if before[name] != after[name] and not (reaches and name == "engine")
        ]

    def told(self, raw: bytes) -> list[str]:
        """What an answer tells that no attacker may know."""
        secrets = {WORD: "another one's turn", str(self.open.proxy.store.dir): "a path"}
        secrets |= {str(self.closed.proxy.store.dir): "a path", "root:x:0": "a file"}
        secrets |= dict.fromkeys(self.keys, "a key")
        secrets |= {"Traceback (most": "a traceback", "Set-Cookie: x=y": "an injected header"}
        return [what for secret, what in secrets.items() if secret.encode() in raw]

    async def alive(self) -> None:
        """Both doors answer."""
        for door in (self.open, self.closed):
            async with asyncio.timeout(10):
                assert (await self.http.get(f"{door.url}/healthz")).status == 200


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        tables = {
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
        }
        for table in _KEPT:
            if table in tables:
                rows = connection.execute(f"SELECT * FROM {table}").fetchall()
                yield table, hashlib.sha256(repr(rows).encode()).hexdigest()
        columns = "id, key_hash, opener, state, calls, outcome"
        rows = connection.execute(f"SELECT {columns} FROM episodes ORDER BY id").fetchall()
        yield "episodes", repr(rows)
        rows = connection.execute("SELECT name, hash, scopes, revoked_at FROM keys").fetchall()
        yield "keys", hashlib.sha256(repr(rows).encode()).hexdigest()


@contextmanager
def listening() -> Generator[list[str]]:
    """All that is logged meanwhile."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Kept(logging.DEBUG)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield lines
    finally:
        root.removeHandler(handler)


@asynccontextmanager
async def _door(
    engine: ScriptedEngine, folder: Path, access: dict[str, Access]
) -> AsyncGenerator[Running]:
    os.mkdir(folder, 0o755)
    store = Store(StoreConfig(dir=str(folder / "state")))
    try:
        async with running(
            engine.url,
            store,
            folder,
            access=access,
            engine_key=ENGINE_KEY,
            max_body_mb=8,
            writer=WriterThread(redactor=Redactor()),
        ) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            p.proxy.pages = Page(
                settings_of(store, folder),
                store,
                p.proxy.keys,
                functools.partial(publish, store, p.proxy.engines),
                p.proxy.health,
                p.proxy.feedback.allowance,
                p.proxy.tries,
                p.proxy.requests,
            )
            yield p
    finally:
        store.close()


def _add_key(store: Store, name: str, *scopes: Scope, lineage: str | None = None) -> str:
    key = new_key()
    store.keys.add(Key(name, hashed(key), frozenset(scopes), lineage, 1.0))
    return key


async def _furnish(lab: Lab) -> None:
    """Gives both doors something worth stealing."""
    store, words = lab.closed.proxy.store, lab.words
    for scope in Scope:
        words[scope] = _add_key(store, scope, scope)
    for name, scope in (("chat", Scope.CHAT), ("read", Scope.READ), ("episodes", Scope.EPISODES)):
        words[f"alice-{name}"] = _add_key(store, f"alice-{name}", scope, lineage="alice")
    words["player"] = _add_key(store, "player", Scope.CHAT, Scope.EPISODES)
    words["revoked"] = _add_key(store, "revoked", *Scope)
    store.keys.revoke("revoked")
    lab.closed.proxy.keys.refresh()
    asked = {"environment": "e", "task": WORD, "episode": "e-main"}
    _, opened = await lab.json("POST", "/v1/episodes", Scope.EPISODES, asked)
    words["episode-key"] = opened["api_key"]
    _, _, words["turn"] = await lab.chat(f"The word is {WORD}", Scope.ADMIN)
    _, _, words["alice-turn"] = await lab.chat(f"Hers is {WORD}", "alice-chat")
    _, _, words["bob-turn"] = await lab.chat(f"His is {WORD}", "bob")
    turn = store.turns.get(words["turn"])
    assert turn is not None
    words["session"] = turn.session
    asked = request(f"The word is {WORD}")
    answer = await lab.http.post(f"{lab.open.url}/v1/chat/completions", json=asked)
    words["open-turn"] = answer.headers["x-nextstate-turn"]


@asynccontextmanager
async def lab(folder: Path) -> AsyncGenerator[Lab]:
    """Both doors, with something behind them."""
    engine = WatchedEngine()
    access = {"alice": Access("alice", None), "bob": Access("bob", bob := new_key())}
    timeout = aiohttp.ClientTimeout(total=30)
    with listening() as log:
        async with (
            scripted_engine(engine),
            _door(engine, folder / "open", {}) as door,
            _door(engine, folder / "closed", access) as closed,
            aiohttp.ClientSession(timeout=timeout) as http,
        ):
            found = Lab(engine, door, closed, http, log, {"bob": bob})
            await _furnish(found)
            yield found
