"""Retention: the oldest turns go by themselves once they are too old, or the store is too large.

Unlike `nextstate forget`, it withdraws nothing: a version that learned from a turn stays. So what
is still of use stays too: samples that did not train yet, sessions that go on, episodes that are
not settled, feedback that waits for a review, and the newest judged and held-out turns of each
lineage, which the watch and the gate look at: steps of episodes do not count as judged.

It goes on from a position in short transactions, each of which looks at a fixed number of turns, so
its cost does not grow with the store and recording waits for milliseconds. The bytes of what goes
are overwritten; its room in the file is used again by what comes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import sqlalchemy as sa

from nextstate.episodes import EpisodeState
from nextstate.records import WATCHED_TURNS, SampleState
from nextstate.store import schema as t
from nextstate.store.database import Database, queries
from nextstate.store.forgetting import delete_episodes, delete_turn, unbase
from nextstate.store.judged import newest_judged
from nextstate.store.ledger import Kind, append
from nextstate.store.texts import Row

LOOKED_AT, AT_ONCE = 64, 4
"""Turns that a step looks at, and how many of them it deletes at most."""
ACTIVE_S = 86_400.0
"""A session goes on if its newest turn is younger."""
PENDING_S = 7 * 86_400.0
"""A turn waits so long for its verdict."""
KEPT_JUDGED, KEPT_HELD = WATCHED_TURNS, 64
"""Newest turns of a lineage that stay: those that the watch looks at, and held-out ones."""
_UNBASED = 64
"""So many texts are compressed anew at most when the one goes that they are compressed against."""
_NONE = (1 << 63) - 1
_T, _S, _J, _E = t.turns.c, t.samples.c, t.judgements.c, t.episodes.c
_USED = (SampleState.WAITING, SampleState.READY, SampleState.LEASED)
_OVER = (EpisodeState.SETTLED, EpisodeState.DROPPED)


class Step(NamedTuple):
    """What one step did."""

    position: int | None
    """Where the next step begins; None at the end of what is old enough."""
    turns: tuple[str, ...]
    """What went."""
    episodes: tuple[str, ...]


@queries
class Retention:
    """Queries of the sweep."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def used_bytes(self) -> tuple[int, int]:
        """What the store needs on its disk: (its pages that are not free, its log)."""
        return self._database.used_bytes()

    def step(self, position: int, before: float | None, by: str) -> Step:
        """Deletes some of the oldest turns after a position, of requests before a Unix time.

        `before` is None where the age does not count; `by` says in the ledger why they go.
        """
        query = sa.select(_T.seq, _T.id, _T.session, _T.started_at, _T.episode, _T.lineage)
        query = query.where(_T.seq > position).order_by(_T.seq).limit(LOOKED_AT)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            last = connection.execute(sa.select(sa.func.max(_T.seq))).scalar() or 0
            old = [row for row in rows if before is None or row.started_at < before]
            lineages = {row.lineage for row in old}
            first = {lineage: _first_kept(connection, lineage) for lineage in lineages}
            free: list[Row] = []
            for start in range(0, len(old), 2 * AT_ONCE):
                some = self._kept(connection, old[start : start + 2 * AT_ONCE], first)
                free += [row for row, stays in some if not stays]
                if len(free) >= AT_ONCE:
                    break
            free = free[:AT_ONCE]
            ids = [row.id for row in free]
            of_theirs = _T.session.in_({row.session for row in free}), _T.parent.in_(ids)
            query = sa.select(_T.id, _T.parent).where(*of_theirs)
            children = [*connection.execute(query).all()]
        if free:
            with self._database.write() as connection:
                # What was recorded meanwhile may continue one of them.
                newer = sa.select(_T.id, _T.parent).where(_T.seq > last, _T.parent.in_(ids))
                children += connection.execute(newer).all()
                # Another command may have deleted some of them.
                named = [*ids, *(row.id for row in children)]
                there = {*connection.execute(sa.select(_T.id).where(_T.id.in_(named))).scalars()}
                free = [row for row in free if row.id in there]
                children = [row for row in children if {row.id, row.parent} <= there]
                done = [row for row, stays in self._kept(connection, free, first) if not stays]
                episodes = _delete(connection, done, children)
                if done:
                    names = [row.id for row in done]
                    gone = {"turns": names, "episodes": len(episodes), "by": by}
                    append(connection, self._database.now(), Kind.FORGOTTEN, gone)
        else:
            done, episodes = [], ()
        over = len(old) < LOOKED_AT and len(free) < AT_ONCE
        reached = free[-1].seq if len(free) == AT_ONCE else (rows[-1].seq if rows else position)
        return Step(None if over else reached, tuple(row.id for row in done), tuple(episodes))

    def drop_episodes(self, before: float, by: str) -> tuple[str, ...]:
        """Deletes some episodes that are over and never had a turn, opened before a Unix time.

        Returns their ids; there are no more if it is empty.
        """
        over = _E.state.in_(_OVER), _E.opened_at < before
        alone = sa.select(_E.id).where(*over, ~sa.exists().where(_T.episode == _E.id))
        with self._database.read() as connection:
            if connection.execute(alone.limit(1)).first() is None:
                return ()
        with self._database.write() as connection:
            found = connection.execute(alone.limit(LOOKED_AT)).scalars().all()
            if found:
                unbase(connection, delete_episodes(connection, found), _UNBASED)
                gone = {"turns": list[str](), "episodes": len(found), "by": by}
                append(connection, self._database.now(), Kind.FORGOTTEN, gone)
        return tuple(found)

    def _kept(
        self, connection: sa.Connection, rows: Sequence[Row], first: Mapping[str, tuple[int, int]]
    ) -> list[tuple[Row, bool]]:
        """The rows, each with whether it is still of use; `first`: as `_first_kept`, by lineage."""
        now, ids = self._database.now(), [row.id for row in rows]
        columns = sa.select(_S.turn, _S.state).where(_S.turn.in_(ids))
        samples = {row.turn: row.state for row in connection.execute(columns)}
        waits = sa.select(_J.turn).where(_J.turn.in_(ids), _J.state != "done")
        pending = {*connection.execute(waits).scalars()}
        reviews = sa.select(t.reviews.c.turn).where(t.reviews.c.turn.in_(ids))
        reviewed = {*connection.execute(reviews).scalars()}
        episodes = {row.episode for row in rows if row.episode is not None}
        unsettled = sa.select(_E.id).where(_E.id.in_(episodes), _E.state.not_in(_OVER))
        going_on = {*connection.execute(unsettled).scalars()}
        sessions = {row.session for row in rows}
        active = {name for name in sessions if _last_at(connection, name) > now - ACTIVE_S}

        def is_kept(row: Row) -> bool:
            judged, held = first[row.lineage]
            state = samples.get(row.id)
            return (
                state in _USED
                or row.session in active
                or row.episode in going_on
                or row.id in reviewed
                or (row.id in pending and row.started_at > now - PENDING_S)
                or (state is not None and row.seq >= judged)
                or (state == SampleState.HELD and row.seq >= held)
            )

        return [(row, is_kept(row)) for row in rows]


def _first_kept(connection: sa.Connection, lineage: str) -> tuple[int, int]:
    """The positions of the oldest judged and the oldest held-out turn of a lineage that stay."""

    held = sa.select(_S.seq).where(_S.lineage == lineage, _S.state == SampleState.HELD)
    held = held.where(_S.screened.is_(None)).order_by(_S.seq.desc()).limit(KEPT_HELD)

    def oldest(newest: sa.Subquery) -> int:
        least = sa.select(sa.func.min(newest.c.seq))
        found = connection.execute(least).scalar()
        return _NONE if found is None else found

    judged = newest_judged(lineage, KEPT_JUDGED).limit(KEPT_JUDGED)
    return oldest(judged.subquery()), oldest(held.subquery())


def _last_at(connection: sa.Connection, session: str) -> float:
    """When the newest request of a session arrived."""
    query = sa.select(_T.started_at).where(_T.session == session).order_by(_T.idx.desc()).limit(1)
    return connection.execute(query).scalar() or 0.0


def _delete(
    connection: sa.Connection, rows: Sequence[Row], children: Sequence[Row]
) -> Sequence[str]:
    """Deletes turns with all that is said of them; returns the episodes that went with the last."""
    gone = {row.id for row in rows}
    staying: dict[str, list[str]] = defaultdict(list)
    for child in children:
        if child.id not in gone and child.id not in staying[child.parent]:
            staying[child.parent].append(child.id)
    released = set[bytes]()
    for row in reversed(rows):  # what continues a turn first: it counts fewer texts
        released |= delete_turn(connection, row.id, staying[row.id])
    episodes = {row.episode for row in rows if row.episode is not None}
    left = sa.select(_T.episode).where(_T.episode.in_(episodes)).distinct()
    episodes -= {*connection.execute(left).scalars()}
    if episodes:
        released |= delete_episodes(connection, sorted(episodes))
    unbase(connection, released, _UNBASED)
    return sorted(episodes)
