"""What a person looks up: turns and sessions in pages of bounded size, and turns a day.

A page looks at so many turns in the order of recording and hands out those that were chosen.
Nothing here needs an index of its own, so recording pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import sqlalchemy as sa

from nextstate.records import Json, NextState, SampleState, Source, TurnKind
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.counts import SHOWN
from nextstate.store.database import Database, queries
from nextstate.wire import read_json

PAGE = 200
"""Turns that one page looks at."""
_LAST = (1 << 63) - 1
_MS_DIGITS = 12
"""Of the time in a turn's name (`nextstate.records.new_id`)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which turns are wanted: those that meet every condition that is given."""

    sessions: tuple[str, ...] = ()
    """Names of one session: ours or the client's own."""
    lineages: tuple[str, ...] | None = None
    """Only of one of these; None: of any."""
    version: int | None = None
    """Only what this policy version answered."""
    since: float | None = None
    """Unix time in seconds: only requests that arrived then or later."""
    untrained: bool = False
    """Only turns that do not train, for whatever reason."""
    main: bool = False
    """Only main turns."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a judged turn."""

    state: SampleState
    reason: str | None
    trained_in: int | None
    advantage: float | None


@dataclass(frozen=True, slots=True)
class TurnSummary:
    """A turn as a list shows it, without its tokens and earlier messages."""

    seq: int
    """Its position in the store."""
    id: str
    session: str
    kind: TurnKind
    lineage: str
    version: int | None
    started_at: float
    """Unix time in seconds."""
    in_episode: bool
    messages: tuple[Json, ...]
    """The last message of its request, before it the first one unless the turn continues another.

    The first one tells which agent sent it. `{"content": …}` of a request without messages."""
    earlier: Json | None
    """The message before the last one; None without one."""
    answers: tuple[Source, str] | None
    """The last next state of the turn that it continues: whose words, without an envelope."""
    reply: Json
    score: int | None
    votes: tuple[int, ...]
    hint: str | None
    untrainable: str | None
    """Why it cannot train; None if it can."""
    fate: Fate | None
    """None before it is judged."""
    followed: tuple[NextState, ...]

    @property
    def untrained(self) -> str | None:
        """Why it does not train; None if it did, may or will."""
        return _untrained(self.kind, self.untrainable, self.fate)


class Page(NamedTuple):
    """What was found, and where the next page begins."""

    turns: list[TurnSummary]
    next: int | None
    """The position after which the search goes on; None at the end of the store."""
    last: str | None
    """The id of the turn there."""
    looked_at: int
    """How many turns this page has looked at."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What became of a turn."""

    client_session: str | None
    """The client's own name for the session."""
    replaced_by: str | None
    """The retry that replaced it: its client did not see the end of the reply."""
    work: str | None
    """The state of the judge's work for it; None without any."""
    work_reason: str | None
    fate: Fate | None


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session as a list shows it."""

    name: str
    client_name: str | None
    """The client's own name for it."""
    lineage: str
    turns: int
    first_at: float
    last_at: float
    """Unix times in seconds, at which the requests of its first and last turn arrived."""
    mean_score: float | None
    """Of its turns that have a verdict."""
    last_seq: int
    """The position of its newest turn in the store."""


class SessionPage(NamedTuple):
    """The sessions of the turns that a page has looked at, the newest first."""

    names: dict[str, int]
    """With the position of the newest chosen turn of each among those."""
    next: int | None
    last: str | None
    """The id of the turn at `next`."""
    looked_at: int


@queries
class Lookup:
    """Queries for people who look something up."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def named(self, beginning: str, limit: int) -> list[str]:
        """The turn with this id, or else up to `limit` turns whose ids begin so."""
        c = t.turns.c
        exact = sa.select(c.id).where(c.id == beginning)
        last = beginning + "\U0010ffff"
        begins = sa.select(c.id).where(c.id.between(beginning, last)).order_by(c.id).limit(limit)
        with self._database.read() as connection:
            found = list(connection.execute(exact).scalars())
            return found or list(connection.execute(begins).scalars())

    def position(self, turn_id: str) -> int | None:
        """A turn's position in the store, or None."""
        with self._database.read() as connection:
            query = sa.select(t.turns.c.seq).where(t.turns.c.id == turn_id)
            return connection.execute(query).scalar()

    def first_since(self, since: float, most: int = _LAST) -> int | None:
        """A position before which no request arrived at `since` or later.

        None if that is not among about `most` of the newest turns.

        It walks back from the newest turn: turns are recorded when they end, so nearly in the order
        of their requests, and a page without any ends the walk.
        """
        c = t.turns.c
        at, looked_at = _LAST, 0
        with self._database.read() as connection:
            while True:
                query = sa.select(c.seq, c.started_at).where(c.seq < at).order_by(c.seq.desc())
                rows = connection.execute(query.limit(PAGE)).all()
                if not any(row.started_at >= since for row in rows):
                    return at
                at, looked_at = rows[-1].seq, looked_at + len(rows)
                if looked_at >= most:
                    return None

    def page(
        self,
        choice: Choice,
        at: int | None = None,
        *,
        newest_first: bool = True,
        until: int | None = None,
        limit: int = PAGE,
    ) -> Page:
        """Looks at up to `PAGE` turns from position `at` on, without it, towards `until`.

        At most `limit` of the chosen ones come back, in the order in which they were looked at.
        Without `at` it begins at the newest or the oldest turn. A turn that a retry replaced is
        left out.
        """
        with self._database.read() as connection:
            looked = _looked_at(connection, choice.sessions, at, newest_first, until)
            rows = [row for row in looked if _is_chosen(row, choice)]
            end = looked[-1] if len(looked) == PAGE else None
            if len(rows) > limit:
                rows = rows[:limit]
                end = rows[-1]
            found = _summaries(connection, [row.seq for row in rows], newest_first)
        return Page(found, end and end.seq, end and end.id, len(looked))

    def summaries(self, ids: Sequence[str]) -> list[TurnSummary]:
        """Those of the turns that there are, in the order of recording."""
        c = t.turns.c
        with self._database.read() as connection:
            seqs = connection.execute(sa.select(c.seq).where(c.id.in_(ids))).scalars().all()
            return _summaries(connection, seqs, False)

    def session_names(
        self, choice: Choice, at: int | None = None, until: int | None = None
    ) -> SessionPage:
        """The sessions of the chosen ones among up to `PAGE` turns before position `at`."""
        with self._database.read() as connection:
            rows = _looked_at(connection, choice.sessions, at, True, until)
        names: dict[str, int] = {}
        for row in rows:
            if _is_chosen(row, choice):
                names.setdefault(row.session, row.seq)
        end = rows[-1] if len(rows) == PAGE else None
        return SessionPage(names, end and end.seq, end and end.id, len(rows))

    def session(self, name: str, lineages: tuple[str, ...] | None = None) -> SessionSummary | None:
        """A session by our name for it, or None. It reads its turns, only those of `lineages`."""
        c, v, f = t.turns.c, t.verdicts.c, sa.func
        query = (
            sa.select(
                *(f.max(c.client_session), f.max(c.lineage), f.count()),
                *(
                    f.min(c.started_at),
                    f.max(c.started_at),
                    f.avg(sa.cast(v.score, sa.Float)),
                    f.max(c.seq),
                ),
            )
            .select_from(t.turns)
            .outerjoin(t.verdicts, v.turn == c.id)
            .where(c.session == name, c.replaced_by.is_(None))
        )
        if lineages is not None:
            query = query.where(c.lineage.in_(lineages))
        with self._database.read() as connection:
            row = connection.execute(query).one()
        return SessionSummary(name, *row) if row[2] else None

    def standing(self, turn_id: str) -> Standing | None:
        """What became of a turn; None when there is no such turn."""
        c, j = t.turns.c, t.judgements.c
        query = (
            sa.select(c.client_session, c.replaced_by, j.state.label("work"))
            .add_columns(j.reason.label("later"), *_FATE)
            .select_from(t.turns)
            .outerjoin(t.judgements, j.turn == c.id)
            .outerjoin(t.samples, t.samples.c.turn == c.id)
            .where(c.id == turn_id)
        )
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        return Standing(row.client_session, row.replaced_by, row.work, row.later, _fate(row))

    def pulse(self) -> list[tuple[Any, ...]]:
        """What changes when something happened that people look at: numbers, cheap to read."""
        n, d = t.counts.c, t.decisions.c
        query = sa.select(n.area, n.key, n.count.label("n")).where(n.area.in_(SHOWN))
        decided = sa.select(sa.literal("decided"), sa.literal(""), sa.func.max(d.seq))
        with self._database.read() as connection:
            return [tuple(row) for row in connection.execute(sa.union_all(query, decided))]

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


_S = t.samples.c
_FATE = (_S.state, _S.reason, _S.trained_in, _S.advantage)


def _fate(row: Any) -> Fate | None:
    if row.state is None:
        return None
    return Fate(SampleState(row.state), row.reason, row.trained_in, row.advantage)


def _looked_at(
    connection: sa.Connection,
    sessions: Sequence[str],
    at: int | None,
    newest_first: bool,
    until: int | None,
) -> Sequence[Any]:
    """The turns that a page looks at, in its order, with what they are chosen by."""
    c = t.turns.c
    limits: list[sa.ColumnElement[bool]] = []
    if at is not None:
        limits.append(c.seq < at if newest_first else c.seq > at)
    if until is not None:
        limits.append(c.seq >= until if newest_first else c.seq <= until)

    def ordered(column: sa.Column[Any], *where: sa.ColumnElement[bool]) -> list[int]:
        order = column.desc() if newest_first else column
        query = sa.select(c.seq).where(*where, *limits).order_by(order).limit(PAGE)
        return list(connection.execute(query).scalars())

    if sessions:
        # One query a name and column reads an index in its order; one for all would have to sort.
        found: set[int] = set()
        for name in sessions:
            found.update(ordered(c.idx, c.session == name))
            found.update(ordered(c.seq, c.client_session == name))
        seqs = sorted(found, reverse=newest_first)[:PAGE]
    else:
        seqs = ordered(c.seq)
    query = (
        sa.select(c.seq, c.id, c.session, c.kind, c.lineage, c.policy_version, c.started_at)
        .add_columns(c.untrainable, c.replaced_by, *_FATE)
        .select_from(t.turns)
        .outerjoin(t.samples, _S.turn == c.id)
        .where(c.seq.in_(seqs))
        .order_by(c.seq.desc() if newest_first else c.seq)
    )
    return connection.execute(query).all()


def _is_chosen(row: Any, choice: Choice) -> bool:
    return (
        row.replaced_by is None
        and (choice.lineages is None or row.lineage in choice.lineages)
        and (choice.version is None or row.policy_version == choice.version)
        and (choice.since is None or row.started_at >= choice.since)
        and not (choice.main and row.kind != TurnKind.MAIN)
        and not (choice.untrained and _untrained(row.kind, row.untrainable, _fate(row)) is None)
    )


def _untrained(kind: str, untrainable: str | None, fate: Fate | None) -> str | None:
    """Why a turn does not train, if that is certain."""
    if kind == TurnKind.SIDE:
        return "side turn"
    if untrainable is not None or fate is None:
        return untrainable
    if fate.state is SampleState.DROPPED:
        return fate.reason or "dropped"
    return "held out, to check new versions on" if fate.state is SampleState.HELD else None


def _summaries(
    connection: sa.Connection, seqs: Sequence[int], newest_first: bool
) -> list[TurnSummary]:
    c, v, n, size = t.turns.c, t.verdicts.c, t.next_states.c, texts.HASH_BYTES
    query = (
        sa.select(c.seq, c.id, c.session, c.kind, c.lineage, c.policy_version, c.started_at)
        .add_columns(c.messages, c.rest, c.reply, c.untrainable, c.parent, c.episode)
        .add_columns(v.score, v.votes, v.hint, *_FATE)
        .select_from(t.turns)
        .outerjoin(t.samples, _S.turn == c.id)
        .outerjoin(t.verdicts, v.turn == c.id)
        .where(c.seq.in_(seqs))
        .order_by(c.seq.desc() if newest_first else c.seq)
    )
    rows = connection.execute(query).all()
    ends: dict[int, list[bytes]] = {}
    for row in rows:
        first = row.messages[:size] if row.parent is None and len(row.messages) > size else b""
        last = row.messages[-size:] or row.rest
        ends[row.seq] = [first, last] if first else [last]
    earlier = {row.seq: row.messages[-2 * size : -size] for row in rows}
    around = {row.id for row in rows} | {row.parent for row in rows if row.parent is not None}
    query = sa.select(t.next_states).where(n.turn.in_(around)).order_by(n.turn, n.seq)
    states = connection.execute(query).all()
    keys = [key for row in rows for key in (*ends[row.seq], row.reply)]
    keys += filter(None, earlier.values())
    keys += [row.hint for row in rows if row.hint is not None]
    found = texts.get(connection, [*keys, *(state.text for state in states)])
    followed: dict[str, list[NextState]] = {}
    for state in states:
        text = found[state.text].decode()
        known = NextState(state.turn, Source(state.source), text, state.trust)
        followed.setdefault(state.turn, []).append(known)
    return [
        TurnSummary(
            seq=row.seq,
            id=row.id,
            session=row.session,
            kind=TurnKind(row.kind),
            lineage=row.lineage,
            version=row.policy_version,
            started_at=row.started_at,
            in_episode=row.episode is not None,
            messages=tuple(
                _message(read_json(found[key]), bool(row.messages)) for key in ends[row.seq]
            ),
            earlier=read_json(found[key]) if (key := earlier[row.seq]) else None,
            answers=(before[-1].source, before[-1].text)
            if (before := followed.get(row.parent))
            else None,
            reply=read_json(found[row.reply]),
            score=row.score,
            votes=() if row.votes is None else tuple(read_json(row.votes.encode())),
            hint=None if row.hint is None else found[row.hint].decode(),
            untrainable=row.untrainable,
            fate=_fate(row),
            followed=tuple(followed.get(row.id, ())),
        )
        for row in rows
    ]


def _message(stored: Json, is_message: bool) -> Json:
    """The message, or what a request without messages asks for."""
    return stored if is_message else {"content": stored.get("prompt", stored.get("input"))}
