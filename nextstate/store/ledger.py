"""The ledger: what happened to versions, and what was forgotten, in entries that nobody changes.

An entry's hash covers the hash of the entry before it, its number, time, kind and content, so an
entry that is changed, removed, added or moved later breaks the chain from there on. Who can write
the database can also cut the chain, or compute a whole new one: that shows to those who noted the
last hash before, the ledger's head. A file of the state folder notes it after each entry (`Head`);
who can write that too is found by a person who noted it elsewhere. Entries hold ids,
scores and names, and never a word of a conversation.

Each entry is appended in the transaction of what it tells, so neither is there without the other.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa

from nextstate import sealed_files
from nextstate.errors import SealError, StoreError
from nextstate.records import SampleState, VersionState
from nextstate.store import schema as t
from nextstate.store.database import APPENDED, Database, queries
from nextstate.store.packing import dump
from nextstate.store.vault import vault_of
from nextstate.wire import write_json

log = logging.getLogger(__name__)

_L, _S, _V = t.ledger.c, t.samples.c, t.versions.c
HEAD_FILE = "ledger.head"
SOMEBODY = "a person"
"""Who did something, where no name is known."""
_HEAD = re.compile(r"[0-9]{1,18}:[0-9a-f]{64}")
_NO_HASH = bytes(32)
"""What stands before the first entry."""
_USED = (_S.turn, _S.score, _S.hinted, _S.advantage)
"""What an entry tells of each turn that a version trained on; nothing changes these any more."""
_Used = tuple[Any, ...]
_AT_ONCE = 1000
_LISTED = 5


class Kind(StrEnum):
    """What an entry tells."""

    VERSION = "version"
    """A version was registered: what it was made of, with the gate's results."""
    JUDGE = "judge"
    """A judge was trained: what its files are."""
    EXAM = "exam"
    """A candidate's results in its exam."""
    STATE = "state"
    """A version came into service or left it, or was rejected, and why."""
    DELETED = "deleted"
    """The adapter of a version was deleted to make room."""
    CHOICE = "choice"
    """A person put a version into service."""
    PAUSE = "pause"
    RESUME = "resume"
    FORGOTTEN = "forgotten"
    """Turns and episodes were forgotten."""
    ENCRYPTION = "encryption"
    """The store was encrypted, got another key, or is not encrypted any more."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry."""

    seq: int
    """1 for the first one."""
    at: float
    """Unix time in seconds."""
    kind: str
    content: Mapping[str, Any]
    hash: str
    """Hexadecimal."""

    @property
    def head(self) -> str:
        """What to note of the newest entry, to check the ledger against it later."""
        return f"{self.seq}:{self.hash}"


def append(connection: sa.Connection, now: float, kind: Kind, content: Mapping[str, Any]) -> None:
    """Adds an entry in the caller's write transaction."""
    newest = sa.select(_L.seq, _L.hash).order_by(_L.seq.desc()).limit(1)
    row = connection.execute(newest).first()
    seq, before = (row.seq + 1, row.hash) if row else (1, _NO_HASH)
    text = dump(dict(content))
    values = {"seq": seq, "at": now, "kind": kind, "content": text}
    hashed = _hash(before, seq, now, kind, text)
    connection.execute(sa.insert(t.ledger).values(**values, hash=hashed))
    connection.info[APPENDED] = f"{seq}:{hashed.hex()}"


def append_version(connection: sa.Connection, now: float, lineage: str, number: int) -> None:
    """Adds the entry of a version whose row and samples are written already."""
    ours = _V.lineage == lineage, _V.number == number
    version = connection.execute(sa.select(t.versions).where(*ours)).one()
    used = _S.lineage == lineage, _S.trained_in == number
    turns = connection.execute(sa.select(*_USED).where(*used).order_by(_S.seq))
    content = {
        "lineage": lineage,
        "number": number,
        "parent": version.parent,
        "sha256": version.sha256,
        "state": version.state,
        "reason": version.reason,
        "metrics": orjson.loads(version.metrics),
        "turns": [list(row) for row in turns],
    }
    append(connection, now, Kind.VERSION, content)


def append_states(
    connection: sa.Connection,
    now: float,
    lineage: str,
    numbers: Sequence[int],
    state: VersionState,
    reason: str | None,
) -> None:
    """Adds an entry for each version whose state changed."""
    for number in numbers:
        content = {"lineage": lineage, "number": number, "state": state, "reason": reason}
        append(connection, now, Kind.STATE, content)


class Head:
    """The note of the ledger's head in a state folder: a ledger that is shorter was cut.

    It is sealed if the folder is encrypted. Of two processes that note at the same time, the later
    entry's may be lost until the next one.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / HEAD_FILE

    def read(self) -> str | None:
        """What is noted, if anything is. Raises OSError and SealError."""
        try:
            return sealed_files.read(self.file).decode(errors="replace")
        except FileNotFoundError:
            return None

    def note(self, database: Database, head: str, connection: sa.Connection | None = None) -> None:
        """Notes a head that is committed, once it is on the disk; reads by `connection` if given.

        Not if the ledger does not go on from what is noted: that stays for `nextstate verify`. What
        fails is logged, because the entry is there.
        """
        if not sealed_files.may_write(self.file):
            return
        draft = self.file.with_name(f".{HEAD_FILE}-{secrets.token_hex(4)}")
        opened = database.read() if connection is None else nullcontext(connection)
        try:
            noted = self.read()
            with database.errors(), opened as reading:
                is_whole = noted is None or _goes_on(reading, noted)
            if noted is not None and not is_whole:
                log.error("%s", self.says(noted))
            elif noted is None or _number(noted) < _number(head):
                database.sync()
                draft.touch(0o600)
                sealed_files.write(draft, head.encode(), HEAD_FILE)
                draft.replace(self.file)
        except (OSError, StoreError) as error:
            log.warning("the ledger's head cannot be noted in %s: %s", self.file, error)
            with suppress(OSError):  # its folder may be read-only by now
                draft.unlink(missing_ok=True)

    def says(self, noted: str) -> str:
        """What is wrong with a ledger that does not go on from what is noted."""
        return (
            f"the ledger does not go on from {noted[:80]}, which {self.file} notes: it was cut, or "
            "written anew; delete that file if you have put an older database back yourself, "
            "or the server lost its last commits"
        )


@queries
class Ledger:
    """Queries for the ledger, most of which read it."""

    def __init__(self, database: Database, head: Head) -> None:
        self._database = database
        self._head = head

    def tell_judge(self, number: int, parent: int | None, sha256: str) -> None:
        """Adds the entry of a trained judge; `sha256` is its folder's, with the card."""
        content = {"number": number, "parent": parent, "sha256": sha256}
        with self._database.write() as connection:
            append(connection, self._database.now(), Kind.JUDGE, content)

    def judges(self) -> set[tuple[int, str]]:
        """The number and SHA-256 of every trained judge that the ledger tells of."""
        query = sa.select(_L.content).where(_L.kind == Kind.JUDGE)
        with self._database.read() as connection:
            told = [orjson.loads(text) for text in connection.execute(query).scalars()]
        return {(one["number"], one["sha256"]) for one in told}

    def newest(self, count: int | None, before: int | None = None) -> list[Entry]:
        """The newest `count` entries or all, of those before entry `before` if given.

        Oldest first.
        """
        query = sa.select(t.ledger).order_by(_L.seq.desc()).limit(count)
        if before is not None:
            query = query.where(_L.seq < before)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [_entry_of(row) for row in reversed(rows)]

    def problems(self, head: str | None = None) -> list[str]:
        """What is wrong, a line each: in the chain itself, and where the versions differ from it.

        `head` is one that was noted earlier: the ledger must go on from it, as from the one that
        the state folder notes.
        """
        heads = {} if head is None else {head: _not_from(head)}
        try:  # before the ledger, which goes on meanwhile
            noted = self._head.read()
        except (OSError, SealError) as error:
            return [str(error)]
        if noted is not None:
            heads[noted] = self._head.says(noted)
        with self._database.read() as connection:
            told = _Told()
            found = list(_broken(connection, told, heads))
            if noted is None and vault_of(connection.dialect) is not None:
                found.append(f"{self._head.file} is not there, which notes the ledger's head")
            if not found:  # what a broken chain tells is no measure
                found += _different(connection, told)
        return found


class _Told:
    """What the entries tell of versions."""

    def __init__(self) -> None:
        self.versions: dict[tuple[str, int], tuple[int | None, str | None, str]] = {}
        """Parent, SHA-256 and state by lineage and number."""
        self.turns: dict[tuple[str, int], dict[str, _Used]] = {}
        """The turns that each version trained on and that are not forgotten."""
        self.rejected: set[tuple[str, int]] = set()
        """The versions that were rejected at some time: their samples may be ready again."""
        self._versions_of: dict[str, tuple[str, int]] = {}

    def read(self, kind: str, content: Mapping[str, Any]) -> None:
        if kind == Kind.FORGOTTEN:
            for turn in content["turns"]:
                if turn in self._versions_of:
                    self.turns[self._versions_of[turn]].pop(turn, None)
            return
        if kind not in (Kind.VERSION, Kind.STATE):
            return
        key = content["lineage"], content["number"]
        if content["state"] == VersionState.REJECTED:
            self.rejected.add(key)
        if kind == Kind.VERSION:
            self.versions[key] = content["parent"], content["sha256"], content["state"]
            self.turns[key] = {turn: tuple(used) for turn, *used in content["turns"]}
            self._versions_of |= dict.fromkeys(self.turns[key], key)
        else:
            self.versions[key] = (*self.versions[key][:2], content["state"])


def _broken(connection: sa.Connection, told: _Told, heads: dict[str, str]) -> Iterator[str]:
    """The first fault of the chain, if there is one; `told` reads the entries before it.

    `heads` has what to say if the chain does not go on from one. It loses those that it does.
    """
    before = _NO_HASH
    query = sa.select(t.ledger).order_by(_L.seq).execution_options(yield_per=_AT_ONCE)
    for number, row in enumerate(connection.execute(query), 1):
        if row.seq != number:
            yield f"the ledger's entry {number} is missing: the next one is {row.seq}"
            return
        if row.hash != _hash(before, number, row.at, row.kind, row.content):
            yield f"the ledger's entry {number} was changed: its hash is not that of its content"
            return
        before = row.hash
        heads.pop(f"{number}:{row.hash.hex()}", None)
        try:
            told.read(row.kind, orjson.loads(row.content))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            yield f"the ledger's entry {number} does not tell what its kind, {row.kind}, tells"
            return
    yield from heads.values()


def _not_from(head: str) -> str:
    return f"the ledger does not go on from {head[:80]}: it was cut, or written anew"


def _number(head: str) -> int:
    """An entry's number; 0 of what is no head."""
    return int(head.partition(":")[0]) if _HEAD.fullmatch(head) else 0


def _goes_on(connection: sa.Connection, head: str) -> bool:
    found = connection.execute(sa.select(_L.hash).where(_L.seq == _number(head))).scalar()
    return found is not None and head == f"{_number(head)}:{found.hex()}"


def _different(connection: sa.Connection, told: _Told) -> Iterator[str]:
    """Where the versions and what they trained on are not what the ledger tells."""
    columns = _V.lineage, _V.number, _V.parent, _V.sha256, _V.state
    stored = {
        (row.lineage, row.number): (row.parent, row.sha256, row.state)
        for row in connection.execute(sa.select(*columns))
    }
    for lineage, number in sorted(stored.keys() | told.versions.keys()):
        key = lineage, number
        if stored.get(key) != told.versions.get(key):
            yield (
                f"version {number} of {lineage} is {stored.get(key, 'not there')}, and the ledger "
                f"tells {told.versions.get(key, 'nothing of it')} (parent, sha256, state)"
            )
    trained: dict[tuple[str, int], dict[str, _Used]] = {}
    query = sa.select(_S.lineage, _S.trained_in, *_USED).where(
        _S.state == SampleState.TRAINED, _S.trained_in.is_not(None)
    )
    for lineage, number, turn, *used in connection.execute(
        query.execution_options(yield_per=_AT_ONCE)
    ):
        trained.setdefault((lineage, number), {})[turn] = tuple(used)
    for key in sorted(told.versions.keys() - told.rejected):
        there = trained.get(key, {})
        if wrong := {turn for turn, _ in told.turns.get(key, {}).items() ^ there.items()}:
            yield (
                f"version {key[1]} of {key[0]} trained on other turns than the ledger tells, or on "
                f"other scores: {', '.join(sorted(wrong)[:_LISTED])}"
            )


def _hash(before: bytes, seq: int, at: float, kind: str, content: str) -> bytes:
    return hashlib.sha256(before + write_json([seq, at, kind, content])).digest()


def _entry_of(row: Any) -> Entry:
    return Entry(row.seq, row.at, row.kind, orjson.loads(row.content), row.hash.hex())
