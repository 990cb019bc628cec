"""Finding turns and sessions for a person: in pages of bounded size, however large the store is.

A page looks at so many turns in the order of recording and hands out those that were chosen.
Nothing here needs an index of its own, so recording pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from nextstate.records import Json, SampleState, Source, TurnKind
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.database import Database, queries
from nextstate.wire import read_json

PAGE = 200
"""Turns that one page looks at."""
_LAST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Choice:
    """Which turns are wanted: those that meet every condition that is given."""

    sessions: tuple[str, ...] = ()
    """Names of one session: ours or the client's own."""
    lineage: str | None = None
    since: float | None = None
    """Unix time in seconds: only requests that arrived then or later."""
    untrained: bool = False
    """Only turns that do not train, for whatever reason."""
    main: bool = False
    """Only main turns."""


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
    message: Json
    """The last message of its request; `{"content": …}` of a request without messages."""
    earlier: Json | None
    """The message before that one; None without one."""
    answers: tuple[Source, str] | None
    """The last next state of the turn that it continues: whose words, without an envelope."""
    reply: Json
    score: int | None
    untrained: str | None
    """Why it does not train; None if it did, may or will."""
    followed: tuple[str, ...]
    """Its next states' texts; none unless they were asked for."""


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
    sample: SampleState | None
    sample_reason: str | None
    trained_in: int | None
    advantage: float | None


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


class SessionPage(NamedTuple):
    """The sessions of the turns that a page has looked at, the newest first."""

    names: list[str]
    next: int | None
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
        followed: bool = False,
    ) -> Page:
        """Looks at up to `PAGE` turns from position `at` on, without it, towards `until`.

        At most `limit` of the chosen ones come back, in the order in which they were looked at;
        with `followed` they have the texts that followed. Without `at` it begins at the newest or
        the oldest turn. A turn that a retry replaced is left out.
        """
        with self._database.read() as connection:
            seqs = _looked_at(connection, choice.sessions, at, newest_first, until)
            looked = _rows(connection, seqs, newest_first)
            rows = [row for row in looked if _is_chosen(row, choice)]
            end = looked[-1] if len(looked) == PAGE else None
            if len(rows) > limit:
                rows = rows[:limit]
                end = rows[-1]
            later = _followed(connection, rows) if followed else {}
            found = _summaries(connection, rows, later)
        return Page(found, end and end.seq, end and end.id, len(looked))

    def session_names(
        self, choice: Choice, at: int | None = None, until: int | None = None
    ) -> SessionPage:
        """The sessions of the chosen ones among up to `PAGE` turns before position `at`."""
        c, s = t.turns.c, t.samples.c
        columns = c.seq, c.session, c.kind, c.lineage, c.started_at, c.untrainable, c.replaced_by
        with self._database.read() as connection:
            seqs = _looked_at(connection, choice.sessions, at, True, until)
            query = (
                sa.select(*columns, s.state, s.reason)
                .select_from(t.turns)
                .outerjoin(t.samples, s.turn == c.id)
                .where(c.seq.in_(seqs))
            )
            rows = connection.execute(query.order_by(c.seq.desc())).all()
        names = dict.fromkeys(row.session for row in rows if _is_chosen(row, choice))
        return SessionPage([*names], rows[-1].seq if len(rows) == PAGE else None, len(rows))

    def session(self, name: str) -> SessionSummary | None:
        """A session by our name for it, or None. It reads its turns."""
        c, v, f = t.turns.c, t.verdicts.c, sa.func
        query = (
            sa.select(
                *(f.max(c.client_session), f.max(c.lineage), f.count()),
                *(f.min(c.started_at), f.max(c.started_at), f.avg(v.score)),
            )
            .select_from(t.turns)
            .outerjoin(t.verdicts, v.turn == c.id)
            .where(c.session == name, c.replaced_by.is_(None))
        )
        with self._database.read() as connection:
            row = connection.execute(query).one()
        return SessionSummary(name, *row) if row[2] else None

    def standing(self, turn_id: str) -> Standing | None:
        """What became of a turn; None when there is no such turn."""
        c, j, s = t.turns.c, t.judgements.c, t.samples.c
        query = (
            sa.select(
                *(c.client_session, c.replaced_by, j.state.label("work"), j.reason.label("later")),
                *(s.state, s.reason, s.trained_in, s.advantage),
            )
            .select_from(t.turns)
            .outerjoin(t.judgements, j.turn == c.id)
            .outerjoin(t.samples, s.turn == c.id)
            .where(c.id == turn_id)
        )
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        sample = None if row.state is None else SampleState(row.state)
        return Standing(
            *(row.client_session, row.replaced_by, row.work, row.later),
            *(sample, row.reason, row.trained_in, row.advantage),
        )


def _looked_at(
    connection: sa.Connection,
    sessions: Sequence[str],
    at: int | None,
    newest_first: bool,
    until: int | None,
) -> list[int]:
    """The positions of the turns that a page looks at, in its order."""
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

    if not sessions:
        return ordered(c.seq)
    # One query a name and column reads an index in its order; one for all would have to sort.
    found: set[int] = set()
    for name in sessions:
        found.update(ordered(c.idx, c.session == name))
        found.update(ordered(c.seq, c.client_session == name))
    return sorted(found, reverse=newest_first)[:PAGE]


def _rows(connection: sa.Connection, seqs: Sequence[int], newest_first: bool) -> list[Any]:
    c, s, v = t.turns.c, t.samples.c, t.verdicts.c
    query = (
        sa.select(
            *(c.seq, c.id, c.session, c.kind, c.lineage, c.policy_version, c.started_at),
            *(c.messages, c.rest, c.reply, c.untrainable, c.parent, c.replaced_by, c.episode),
            *(s.state, s.reason, v.score),
        )
        .select_from(t.turns)
        .outerjoin(t.samples, s.turn == c.id)
        .outerjoin(t.verdicts, v.turn == c.id)
        .where(c.seq.in_(seqs))
        .order_by(c.seq.desc() if newest_first else c.seq)
    )
    return list(connection.execute(query))


def _is_chosen(row: Any, choice: Choice) -> bool:
    return (
        row.replaced_by is None
        and (choice.lineage is None or row.lineage == choice.lineage)
        and (choice.since is None or row.started_at >= choice.since)
        and not (choice.main and row.kind != TurnKind.MAIN)
        and not (choice.untrained and _untrained(row) is None)
    )


def _untrained(row: Any) -> str | None:
    """Why a turn does not train, if that is certain."""
    if row.kind == TurnKind.SIDE:
        return "side turn"
    if row.untrainable is not None:
        return row.untrainable
    if row.state == SampleState.DROPPED:
        return row.reason or "dropped"
    return "held out, to check new versions on" if row.state == SampleState.HELD else None


def _summaries(
    connection: sa.Connection, rows: Sequence[Any], later: Mapping[str, Sequence[str]]
) -> list[TurnSummary]:
    lasts = {row.seq: row.messages[-texts.HASH_BYTES :] or row.rest for row in rows}
    size = texts.HASH_BYTES
    earlier = {row.seq: row.messages[-2 * size : -size] for row in rows}
    asked = [*lasts.values(), *filter(None, earlier.values()), *(row.reply for row in rows)]
    found = texts.get(connection, asked)
    n = t.next_states.c
    parents = {row.parent for row in rows if row.parent is not None}
    query = sa.select(n.turn, n.source, n.text).where(n.turn.in_(parents))
    states = connection.execute(query.order_by(n.turn, n.seq)).all()
    answered = {state.turn: state for state in states}
    said = texts.get(connection, (state.text for state in answered.values()))
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
            message=_message(read_json(found[lasts[row.seq]]), bool(row.messages)),
            earlier=read_json(found[key]) if (key := earlier[row.seq]) else None,
            answers=None
            if (state := answered.get(row.parent)) is None
            else (Source(state.source), said[state.text].decode()),
            reply=read_json(found[row.reply]),
            score=row.score,
            untrained=_untrained(row),
            followed=tuple(later.get(row.id, ())),
        )
        for row in rows
    ]


def _message(stored: Json, is_message: bool) -> Json:
    """The message, or what a request without messages asks for."""
    return stored if is_message else {"content": stored.get("prompt", stored.get("input"))}


def _followed(connection: sa.Connection, rows: Sequence[Any]) -> dict[str, list[str]]:
    """The texts that followed each turn."""
    n = t.next_states.c
    query = sa.select(n.turn, n.text).where(n.turn.in_([row.id for row in rows]))
    states = connection.execute(query).all()
    found = texts.get(connection, (state.text for state in states))
    texts_of: dict[str, list[str]] = {}
    for state in states:
        texts_of.setdefault(state.turn, []).append(found[state.text].decode())
    return texts_of
