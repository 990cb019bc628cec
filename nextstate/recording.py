"""Adding turns to the store: how a request finds the turn that it continues, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa

from nextstate import schema as t
from nextstate.records import Json, NextState, Turn, TurnKind
from nextstate.rows import (
    Row,
    compress,
    content_hash,
    dump,
    hashes,
    pack_floats,
    pack_ids,
)


@dataclass(frozen=True, slots=True)
class Link:
    """How a request is recognised as the continuation of a turn; all keys are 16-byte digests."""

    chain_key: bytes
    """Of all assistant messages in the request's history."""
    reply_key: bytes
    """Of the last assistant message alone."""
    message_hashes: tuple[bytes, ...]
    """Of every message in the request, to choose among turns with identical replies."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The turn that a request continues."""

    id: str
    session: str
    index: int
    kind: TurnKind
    continued: bool
    """True when another request has already given it a next state."""


# Built once: SQLAlchemy takes longer to build a statement than SQLite to run it.
_C = t.turns.c
_PARENT_COLUMNS = (_C.id, _C.session, _C.idx, _C.kind, _C.continued)
_NEXT_INDEX = sa.select(sa.func.max(_C.idx)).where(_C.session == sa.bindparam("name"))
_ABOVE = sa.select(_C.parent).where(_C.id == sa.bindparam("turn")).scalar_subquery()
_ANCESTOR = sa.select(*_PARENT_COLUMNS).where(_C.id == _ABOVE)
_CUT_HERE = (
    _C.place == sa.bindparam("here"),
    _C.finish_reason.is_(None),
    _C.replaced_by.is_(None),
    _C.continued.is_(False),
)
_CUT_SESSION = sa.select(_C.session).where(*_CUT_HERE).limit(1)
_REPLACE_CUT = (
    sa.update(t.turns)
    .where(*_CUT_HERE, _C.id != sa.bindparam("turn"))
    .values(replaced_by=sa.bindparam("turn"))
)
_ADD_TURN, _ADD_STATE = sa.insert(t.turns), sa.insert(t.next_states)
_ADD_MESSAGE, _ADD_JUDGEMENT = sa.insert(t.messages), sa.insert(t.judgements)
_KNOWN_MESSAGE = sa.select(t.messages.c.hash).where(t.messages.c.hash == sa.bindparam("key"))
_CONTINUED = sa.update(t.turns).where(_C.id == sa.bindparam("turn")).values(continued=True)


def _candidates(key: sa.Column[bytes], *, named: bool) -> sa.Select[*tuple[Any, ...]]:
    """The newest turns with a link key, of one client's session if `named`."""
    query = (
        sa.select(*_PARENT_COLUMNS, _C.messages, _C.seq)
        .where(key == sa.bindparam("key"), _C.lineage == sa.bindparam("lineage"))
        .order_by(_C.seq.desc())
        .limit(16)
    )
    return query.where(_C.client_session == sa.bindparam("client_session")) if named else query


_CANDIDATES = {
    named: (_candidates(_C.chain_key, named=named), _candidates(_C.reply_key, named=named))
    for named in (True, False)
}


def _parent(row: Row) -> Parent:
    return Parent(row.id, row.session, row.idx, TurnKind(row.kind), row.continued)


class Recording:
    """An open recording transaction: see `Store.recording`."""

    def __init__(
        self, connection: sa.Connection, known: set[bytes], fresh: set[bytes], now: float
    ) -> None:
        self._connection = connection
        self._known = known
        self._fresh = fresh
        self._now = now

    def parent(self, lineage: str, link: Link, client_session: str | None) -> Parent | None:
        """The turn that a request with this link continues, within the client's session if named.

        Turns whose whole chain of replies agrees come first; without one, the newest with the same
        last reply (the agent may have cut its history). Among equals, one that nothing has
        continued yet wins, then the one that shares most messages, then the newest.
        """
        where: dict[str, object] = {"lineage": lineage}
        if client_session is not None:
            where["client_session"] = client_session
        queries = _CANDIDATES[client_session is not None]
        for query, key in zip(queries, (link.chain_key, link.reply_key), strict=True):
            rows = self._connection.execute(query, {**where, "key": key}).all()
            if rows:
                ours = set(link.message_hashes)

                def rank(row: Row, ours: set[bytes] = ours) -> tuple[bool, int, int]:
                    return not row.continued, len(ours.intersection(hashes(row.messages))), row.seq

                return _parent(max(rows, key=rank))
        return None

    def main_ancestor(self, turn: Parent) -> Parent | None:
        """The newest main turn that a side turn goes back to."""
        found: Parent | None = turn
        while found is not None and found.kind is not TurnKind.MAIN:
            row = self._connection.execute(_ANCESTOR, {"turn": found.id}).first()
            found = None if row is None else _parent(row)
        return found

    def session(self, client_session: str, *, fresh: bool) -> str:
        """The session of a turn that continues none: the client's own name for it, where free.

        A client may use one name for many conversations (`user`, or a chat that was reset): each
        further one that starts `fresh`, with nothing from the assistant in it, is named `name~2`,
        `name~3`, … One that does not is taken for the newest of them, its history rewritten.
        """
        c = t.turns.c
        ours = sa.select(c.session).where(c.client_session == client_session)
        newest = self._connection.execute(ours.order_by(c.seq.desc()).limit(1)).scalar()
        if newest is None:
            return client_session
        if not fresh:
            return newest
        count = sa.select(sa.func.count(sa.distinct(c.session)))
        known = count.where(c.client_session == client_session)
        return f"{client_session}~{self._connection.execute(known).scalar_one() + 1}"

    def cut_session(self, place: bytes) -> str | None:
        """The session of a turn at this place whose reply never came to an end, if there is one."""
        return self._connection.execute(_CUT_SESSION, {"here": place}).scalar()

    def replace_cut(self, place: bytes, turn: str) -> None:
        """Lets `turn` stand for the turns at the same place whose replies never came to an end."""
        self._connection.execute(_REPLACE_CUT, {"here": place, "turn": turn})

    def next_index(self, session: str) -> int:
        """The position of the next turn in a session."""
        last = self._connection.execute(_NEXT_INDEX, {"name": session}).scalar()
        return 0 if last is None else last + 1

    def add_turn(
        self,
        turn: Turn,
        chain_key: bytes,
        reply_key: bytes,
        *,
        client_session: str | None = None,
        place: bytes | None = None,
    ) -> None:
        """Adds a turn; `chain_key` and `reply_key` are those of its own reply."""
        rest = {key: value for key, value in turn.request.items() if key != "messages"}
        if "tools" in rest:
            rest["tools"] = self._keep(rest["tools"]).hex()
        messages: list[Json] = turn.request.get("messages") or []
        self._connection.execute(
            _ADD_TURN,
            {
                "id": turn.id,
                "session": turn.session,
                "idx": turn.index,
                "kind": turn.kind,
                "lineage": turn.lineage,
                "policy_version": turn.policy_version,
                "client_model": turn.client_model,
                "messages": b"".join(self._keep(message) for message in messages),
                "rest": compress(orjson.dumps(rest)),
                "reply": self._keep(turn.reply),
                "finish_reason": turn.finish_reason,
                "prompt_ids": pack_ids(turn.prompt_ids),
                "completion_ids": pack_ids(turn.completion_ids),
                "behaviour_logprobs": pack_floats(turn.behaviour_logprobs),
                "sampling": dump(turn.sampling),
                "started_at": turn.timings.started_at,
                "first_token_s": turn.timings.first_token_s,
                "total_s": turn.timings.total_s,
                "untrainable": turn.untrainable,
                "parent": turn.parent,
                "chain_key": chain_key,
                "reply_key": reply_key,
                "client_session": client_session,
                "place": place,
            },
        )

    def add_next_states(self, turn: str, judge: bool, states: Sequence[NextState]) -> None:
        """Adds what followed `turn` and, if `judge`, the judge's work for it."""
        if not states:
            return
        self._connection.execute(
            _ADD_STATE,
            [
                {
                    "turn": turn,
                    "seq": seq,
                    "source": state.source,
                    "text": compress(state.text.encode()),
                    "trust": state.trust,
                }
                for seq, state in enumerate(states)
            ],
        )
        self._connection.execute(_CONTINUED, {"turn": turn})
        if judge:
            self._connection.execute(_ADD_JUDGEMENT, {"turn": turn, "state": "pending"})

    def _keep(self, value: object) -> bytes:
        """Stores a JSON value once and returns its content hash."""
        body = orjson.dumps(value)
        key = content_hash(body)
        if key not in self._known and key not in self._fresh:
            if self._connection.execute(_KNOWN_MESSAGE, {"key": key}).first() is None:
                self._connection.execute(_ADD_MESSAGE, {"hash": key, "body": compress(body)})
            self._fresh.add(key)
        return key
