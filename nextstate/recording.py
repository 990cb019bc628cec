"""Adding turns to the store: how a request finds the turn that it continues, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def _parent(row: Row) -> Parent:
    return Parent(row.id, row.session, row.idx, TurnKind(row.kind), row.continued)


def _cut_at(place: bytes) -> tuple[sa.ColumnElement[bool], ...]:
    c = t.turns.c
    unfinished = (c.finish_reason.is_(None), c.replaced_by.is_(None), c.continued.is_(False))
    return c.place == place, *unfinished


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
        c = t.turns.c
        columns = (c.id, c.session, c.idx, c.kind, c.continued, c.messages, c.seq)
        for column, key in ((c.chain_key, link.chain_key), (c.reply_key, link.reply_key)):
            query = (
                sa.select(*columns)
                .where(column == key, c.lineage == lineage)
                .order_by(c.seq.desc())
                .limit(16)
            )
            if client_session is not None:
                query = query.where(c.client_session == client_session)
            rows = self._connection.execute(query).all()
            if rows:
                ours = set(link.message_hashes)

                def rank(row: Row, ours: set[bytes] = ours) -> tuple[bool, int, int]:
                    return not row.continued, len(ours.intersection(hashes(row.messages))), row.seq

                return _parent(max(rows, key=rank))
        return None

    def main_ancestor(self, turn: Parent) -> Parent | None:
        """The newest main turn that a side turn goes back to."""
        c = t.turns.c
        found: Parent | None = turn
        while found is not None and found.kind is not TurnKind.MAIN:
            above = sa.select(c.parent).where(c.id == found.id).scalar_subquery()
            columns = (c.id, c.session, c.idx, c.kind, c.continued)
            row = self._connection.execute(sa.select(*columns).where(c.id == above)).first()
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
        query = sa.select(t.turns.c.session).where(*_cut_at(place)).limit(1)
        return self._connection.execute(query).scalar()

    def replace_cut(self, place: bytes, turn: str) -> None:
        """Lets `turn` stand for the turns at the same place whose replies never came to an end."""
        others = (*_cut_at(place), t.turns.c.id != turn)
        self._connection.execute(sa.update(t.turns).where(*others).values(replaced_by=turn))

    def next_index(self, session: str) -> int:
        """The position of the next turn in a session."""
        c = t.turns.c
        query = sa.select(sa.func.max(c.idx)).where(c.session == session)
        last = self._connection.execute(query).scalar()
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
            sa.insert(t.turns).values(
                id=turn.id,
                session=turn.session,
                idx=turn.index,
                kind=turn.kind,
                lineage=turn.lineage,
                policy_version=turn.policy_version,
                client_model=turn.client_model,
                messages=b"".join(self._keep(message) for message in messages),
                rest=compress(orjson.dumps(rest)),
                reply=self._keep(turn.reply),
                finish_reason=turn.finish_reason,
                prompt_ids=pack_ids(turn.prompt_ids),
                completion_ids=pack_ids(turn.completion_ids),
                behaviour_logprobs=pack_floats(turn.behaviour_logprobs),
                sampling=dump(turn.sampling),
                started_at=turn.timings.started_at,
                first_token_s=turn.timings.first_token_s,
                total_s=turn.timings.total_s,
                untrainable=turn.untrainable,
                parent=turn.parent,
                chain_key=chain_key,
                reply_key=reply_key,
                client_session=client_session,
                place=place,
            )
        )

    def add_next_states(self, turn: str, judge: bool, states: Sequence[NextState]) -> None:
        """Adds what followed `turn` and, if `judge`, the judge's work for it."""
        if not states:
            return
        self._connection.execute(
            sa.insert(t.next_states),
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
        self._connection.execute(
            sa.update(t.turns).where(t.turns.c.id == turn).values(continued=True)
        )
        if judge:
            self._connection.execute(sa.insert(t.judgements).values(turn=turn, state="pending"))

    def _keep(self, value: object) -> bytes:
        """Stores a JSON value once and returns its content hash."""
        body = orjson.dumps(value)
        key = content_hash(body)
        if key not in self._known and key not in self._fresh:
            m = t.messages
            if self._connection.execute(sa.select(m.c.hash).where(m.c.hash == key)).first() is None:
                self._connection.execute(sa.insert(m).values(hash=key, body=compress(body)))
            self._fresh.add(key)
        return key
