"""Made-up agent conversations, a store full of them, and the fast way to fill one.

The first two conversations are recorded as the proxy records; their rows are then copied under the
names, link keys and messages of all others. Each copy is found by a request that continues it, and
`benchmarks.growth` checks that it is.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import orjson

from benchmarks.exchanges import exchange
from nextstate.config import StoreConfig
from nextstate.hooks import load_plugin
from nextstate.records import Json
from nextstate.store import Store
from nextstate.store.texts import HASH_BYTES, compress, content_hash, hashes
from proxy.exchange import Exchange, record_exchange
from proxy.linking.history import Scope, keys_of, read_history
from proxy.linking.meaning import meaning_of

FILE = "nextstate.sqlite3"
TURNS = 4
"""Stored turns of a conversation; the request that continues the last one has ten messages."""
PROFILE = load_plugin("agents", "generic", None)
_SYSTEM = {"role": "system", "content": "You are a careful agent with a shell. " * 100}
_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("exec", "read", "write", "search")
]
_PROMPT_IDS, _COMPLETION_IDS = list(range(300)), list(range(64))
_LOGPROBS = [-0.01 * number for number in range(64)]
_COPIED = ("turns", "texts", "next_states", "judgements")
_PER_TRANSACTION = 5000
_FIRST_MS = 1_700_000_000_000
"""When the first turn was recorded, in milliseconds; the others follow a second apart."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation; no two numbers share more than the system prompt. Odd ones are named."""

    number: int

    @property
    def name(self) -> str | None:
        """The client's name for the session."""
        return f"agent-{self.number}" if self.number % 2 else None

    def turn_id(self, index: int) -> str:
        """The id of a turn, as `nextstate.records.new_id` makes them one after another."""
        return self._id("turn", index)

    @property
    def session(self) -> str:
        """The session's name in the store."""
        return self.name or self._id("session", 0)

    def reply(self, index: int) -> Json:
        """What the model says in a turn: by turns a tool call and a text."""
        text = f"Step {index} of task {self.number}: " + "I look at what was found. " * 6
        message: Json = {"role": "assistant", "content": text}
        if index % 2 == 0:
            arguments = orjson.dumps({"command": f"ls /srv/{self.number}/{index}"}).decode()
            function = {"name": "exec", "arguments": arguments}
            call = {"id": f"call_{index}", "type": "function", "function": function}
            message["tool_calls"] = [call]
        return message

    def messages(self, index: int) -> list[Json]:
        """The request of a turn: 2 + 2 × index messages."""
        task = f"Task {self.number}: " + "find out why the build is slow. " * 4
        found = [_SYSTEM, {"role": "user", "content": task}]
        for step in range(index):
            found.append(self.reply(step))
            text = f"{self.number}.{step}: " + "total 48 drwxr-xr-x 2 build build " * 12
            if step % 2 == 0:
                found.append({"role": "tool", "tool_call_id": f"call_{step}", "content": text})
            else:
                found.append({"role": "user", "content": text})
        return found

    def _id(self, what: str, index: int) -> str:
        when = _FIRST_MS + 1000 * (self.number * TURNS + index)
        return f"{what}_{when:012x}{_digest(f'{self.number}.{index}'.encode()).hex()[:8]}"

    def exchange(self, index: int, turn_id: str | None = None, *, cut: bool = False) -> Exchange:
        """One turn as the relay hands it over."""
        request = {"model": "base", "messages": self.messages(index), "tools": _TOOLS}
        return exchange(
            turn_id or self.turn_id(index),
            {**request, "stream": True, "max_tokens": 1024},
            self.reply(index),
            session=self.name,
            prompt_ids=_PROMPT_IDS,
            completion_ids=_COMPLETION_IDS,
            logprobs=_LOGPROBS,
            cut=cut,
        )


class Filler:
    """Fills the store in a folder, conversation after conversation."""

    def __init__(self, folder: Path) -> None:
        self.conversations = 2
        store = Store(StoreConfig(dir=str(folder)))
        for number, index in ((n, i) for n in range(2) for i in range(TURNS)):
            with store.recording() as recording:
                record_exchange(recording, Conversation(number).exchange(index), PROFILE)
        store.close()
        self._db = sqlite3.connect(folder / FILE, isolation_level=None)
        # What a crash leaves of it is not needed; a million turns take minutes all the same.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-1048576"):
            self._db.execute(f"PRAGMA {pragma}")
        self._refuse_unknown_tables()
        self._templates = [_Template(self._db, Conversation(number)) for number in range(2)]

    def fill(self, turns: int, tell: Callable[[int], object]) -> None:
        """Adds conversations until the store holds `turns`; `tell` gets the number so far."""
        numbers = iter(range(self.conversations, turns // TURNS))
        while batch := list(islice(numbers, _PER_TRANSACTION)):
            self._db.execute("BEGIN IMMEDIATE")
            for number in batch:
                self._templates[number % 2].copy(Conversation(number))
            self._db.execute("COMMIT")
            self.conversations = batch[-1] + 1
            tell(self.conversations * TURNS)

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def _refuse_unknown_tables(self) -> None:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        for (name,) in self._db.execute(query).fetchall():
            known = name in (*_COPIED, "schema_version", "counts")  # triggers keep the counts
            if not known and self._db.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone():
                sys.exit(f"recording now fills {name}: let benchmarks/conversations.py copy it too")


class _Template:
    """The rows of one recorded conversation, to be copied under other names."""

    def __init__(self, db: sqlite3.Connection, conversation: Conversation) -> None:
        self._db = db
        ids = [conversation.turn_id(index) for index in range(TURNS)]
        marks = ", ".join("?" * TURNS)
        cursor = db.execute(f"SELECT * FROM turns WHERE id IN ({marks}) ORDER BY seq", ids)
        self._columns = [column[0] for column in cursor.description]
        self._turns = cursor.fetchall()
        self._others = [
            (table, db.execute(f"SELECT * FROM {table} WHERE turn IN ({marks})", ids).fetchall())
            for table in ("next_states", "judgements")
        ]
        session = self._columns.index("session")
        self._names = [*_names(conversation), self._turns[0][session]]

    def copy(self, conversation: Conversation) -> None:
        """Adds the conversation's rows."""
        names = [*_names(conversation), conversation.session]
        new = dict(zip(self._names, names, strict=True))
        add = "INSERT OR IGNORE INTO texts (hash, uses, stored) VALUES (?, 1, ?)"
        self._db.executemany(add, _bodies(conversation))
        seq, messages = self._columns.index("seq"), self._columns.index("messages")
        rows: list[list[object]] = []
        for row in self._turns:
            copied = [new.get(value, value) for value in row]
            copied[seq] = None
            copied[messages] = b"".join(new.get(key, key) for key in hashes(row[messages]))
            rows.append(copied)
        self._insert("turns", rows)
        for table, found in self._others:
            self._insert(table, [[new.get(value, value) for value in row] for row in found])

    def _insert(self, table: str, rows: list[list[object]]) -> None:
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)


def _stored(conversation: Conversation) -> list[Json]:
    """Every message and reply of the stored turns that is the conversation's own, in order."""
    last = TURNS - 1
    return [*conversation.messages(last)[1:], conversation.reply(last)]


def _bodies(conversation: Conversation) -> Iterator[tuple[bytes, bytes]]:
    for message in _stored(conversation):
        body = orjson.dumps(message)
        yield content_hash(body), compress(body)


def _names(conversation: Conversation) -> list[object]:
    """What tells the rows of one conversation from those of another, in one order for all."""
    names: list[object] = [content_hash(orjson.dumps(m)) for m in _stored(conversation)]
    for index in range(TURNS):
        messages = conversation.messages(index)
        history, scope = read_history(messages, PROFILE), Scope("main", conversation.name)
        keys = keys_of(history, meaning_of(conversation.reply(index)), scope)
        assert keys.context is not None
        names += [conversation.turn_id(index), *keys]
    return [*names, conversation.name]


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=HASH_BYTES).digest()
