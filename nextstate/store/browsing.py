"""What people look at: the newest turns in short, turns a day, and when versions were made.

The cost of a query depends on how much is shown, never on how much is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import sqlalchemy as sa

from nextstate.records import Json, NextState, SampleState, Source
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.database import Database, queries
from nextstate.store.texts import HASH_BYTES, hashes
from nextstate.wire import read_json

LOOKED_THROUGH = 1000
"""Turns that one query looks through for those that a filter wants."""
_MS_DIGITS = 12
"""Of the time in a turn's name (`nextstate.records.new_id`)."""
_FIRST_MESSAGES, _LAST_MESSAGES = 2, 6
"""Of a request: the first tell which agent sent it, the last what was said."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which turns a person wants to see."""

    lineages: Sequence[str]
    session: str | None = None
    version: int | None = None
    untrained: bool = False
    """Only those that cannot train or that were dropped."""


@dataclass(frozen=True, slots=True)
class Glimpse:
    """A turn in short."""

    id: str
    session: str
    index: int
    kind: str
    lineage: str
    version: int | None
    started_at: float
    untrainable: str | None
    messages: tuple[Json, ...]
    """The first and the last messages of the request."""
    reply: Json
    next_states: tuple[NextState, ...]
    score: int | None
    judge: str | None
    fate: Fate | None


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a judged turn."""

    state: SampleState
    trained_in: int | None
    reason: str | None
    advantage: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """One page of turns, newest first."""

    turns: tuple[Glimpse, ...]
    older: int | None
    """With this as `before` the search goes on; None at the end."""


@queries
class Browsing:
    """Queries for people who look at what was recorded."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def turns(self, wanted: Wanted, limit: int, before: int | None = None) -> Found:
        """The newest turns that are wanted, without cut turns that a retry replaced.

        At most `limit` of the next LOOKED_THROUGH ones, so fewer may be found although there are
        older ones. `before` is `older` of the page before.
        """
        c, s = t.turns.c, t.samples.c
        # The end of an index is read either way: a session's, or that of all turns.
        place = c.seq if wanted.session is None else c.idx
        query = (
            sa.select(c.id, place.label("place"), c.lineage, c.policy_version, c.replaced_by)
            .add_columns(c.untrainable, s.state)
            .outerjoin(t.samples, s.turn == c.id)
            .order_by(place.desc())
            .limit(LOOKED_THROUGH)
        )
        if wanted.session is not None:
            query = query.where(c.session == wanted.session)
        if before is not None:
            query = query.where(place < before)
        with self._database.read() as connection:
            chosen: list[str] = []
            looked, last = 0, None
            result = connection.execute(query)
            for row in result:
                looked, last = looked + 1, row.place
                if _is_wanted(row, wanted):
                    chosen.append(row.id)
                    if len(chosen) == limit:
                        break
            result.close()
            full = len(chosen) == limit or looked == LOOKED_THROUGH
            return Found(_glimpses(connection, chosen), last if full else None)

    def fate(self, turn_id: str) -> Fate | None:
        """What became of a turn after it was judged; None before."""
        with self._database.read() as connection:
            return _fates(connection, [turn_id]).get(turn_id)

    def recorded(self, boundaries: Sequence[float]) -> list[int]:
        """How many turns were recorded between each two of the Unix times, in ascending order.

        The names of turns tell when their requests came. A retry and what it replaced count twice.
        """
        c = t.turns.c
        first = sa.select(c.seq).where(c.id >= sa.bindparam("name")).order_by(c.id).limit(1)
        found: list[int] = []
        with self._database.read() as connection:
            end = (connection.execute(sa.select(sa.func.max(c.seq))).scalar() or 0) + 1
            for boundary in boundaries:
                name = f"turn_{max(int(boundary * 1000), 0):0{_MS_DIGITS}x}"
                found.append(connection.execute(first, {"name": name}).scalar() or end)
        return [max(after - before, 0) for before, after in pairwise(found)]

    def made_at(self, lineage: str, numbers: Sequence[int]) -> dict[int, float]:
        """When each of the versions was registered, in Unix time."""
        v = t.versions.c
        query = sa.select(v.number, v.created_at).where(v.lineage == lineage, v.number.in_(numbers))
        with self._database.read() as connection:
            return {row.number: row.created_at for row in connection.execute(query)}


def _is_wanted(row: Any, wanted: Wanted) -> bool:
    if row.replaced_by is not None or row.lineage not in wanted.lineages:
        return False
    if wanted.version is not None and row.policy_version != wanted.version:
        return False
    lost = row.untrainable is not None or row.state == SampleState.DROPPED
    return lost or not wanted.untrained


def _glimpses(connection: sa.Connection, ids: Sequence[str]) -> tuple[Glimpse, ...]:
    c, v, n = t.turns.c, t.verdicts.c, t.next_states.c
    query = (
        sa.select(c.id, c.session, c.idx, c.kind, c.lineage, c.policy_version, c.started_at)
        .add_columns(c.untrainable, c.messages, c.reply, v.score, v.judge)
        .outerjoin(t.verdicts, v.turn == c.id)
        .where(c.id.in_(ids))
    )
    rows = {row.id: row for row in connection.execute(query)}
    followed = sa.select(t.next_states).where(n.turn.in_(ids)).order_by(n.turn, n.seq)
    states = connection.execute(followed).all()
    ends = {row.id: [*hashes(_ends(row.messages))] for row in rows.values()}
    keys = [key for found in ends.values() for key in found]
    keys += [row.reply for row in rows.values()] + [row.text for row in states]
    found = texts.get(connection, keys)
    next_states: dict[str, list[NextState]] = {}
    for row in states:
        state = NextState(row.turn, Source(row.source), found[row.text].decode(), row.trust)
        next_states.setdefault(row.turn, []).append(state)
    fates = _fates(connection, ids)
    return tuple(
        Glimpse(
            id=row.id,
            session=row.session,
            index=row.idx,
            kind=row.kind,
            lineage=row.lineage,
            version=row.policy_version,
            started_at=row.started_at,
            untrainable=row.untrainable,
            messages=tuple(read_json(found[key]) for key in ends[row.id]),
            reply=read_json(found[row.reply]),
            next_states=tuple(next_states.get(row.id, ())),
            score=row.score,
            judge=row.judge,
            fate=fates.get(row.id),
        )
        for row in (rows[turn_id] for turn_id in ids if turn_id in rows)
    )


def _ends(messages: bytes) -> bytes:
    """The hashes of the first and the last messages."""
    if len(messages) <= (_FIRST_MESSAGES + _LAST_MESSAGES) * HASH_BYTES:
        return messages
    return messages[: _FIRST_MESSAGES * HASH_BYTES] + messages[-_LAST_MESSAGES * HASH_BYTES :]


def _fates(connection: sa.Connection, ids: Sequence[str]) -> dict[str, Fate]:
    s = t.samples.c
    query = sa.select(s.turn, s.state, s.trained_in, s.reason, s.advantage).where(s.turn.in_(ids))
    return {
        row.turn: Fate(SampleState(row.state), row.trained_in, row.reason, row.advantage)
        for row in connection.execute(query)
    }
