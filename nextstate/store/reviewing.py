"""Feedback that counts only once somebody accepts it: floods and contradictions.

A client without the scope `admin` may say much, may speak about another one's turns, and may say
the opposite of what that one or the owner said. Such feedback is kept here and does nothing until
somebody accepts it, drops it, or says themselves what the turn is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from nextstate.records import Feedback
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.database import Database, queries
from nextstate.store.settling import Reception, give_feedback
from nextstate.store.shares import OWNER

AN_HOUR = 60
"""Feedback of a client in an hour; more waits for a review. A person clicks less often."""
MOST = 1000
"""Feedback of a client that waits; more is not kept."""
_F, _R, _T, _V = t.feedback.c, t.reviews.c, t.turns.c, t.verdicts.c


class Why(StrEnum):
    """Why feedback waits for a review."""

    FLOOD = "flood"
    FOREIGN = "foreign"
    """It is about another client's turn."""
    CONTRADICTION = "contradiction"
    """It is, and says otherwise than what followed that turn; or otherwise than the owner."""


_SAID = {
    Why.FLOOD: f"more than {AN_HOUR} verdicts of this key in an hour wait for a review",
    Why.FOREIGN: "the turn is another key's, so it waits for a review",
    Why.CONTRADICTION: "somebody else said otherwise, so it waits for a review",
}


@dataclass(frozen=True, slots=True)
class Review:
    """Feedback that waits."""

    seq: int
    client: str
    """The name of the key that gave it."""
    at: float
    """Unix time in seconds."""
    reason: Why
    said: Feedback


@queries
class Reviewing:
    """Queries for feedback that waits for a review."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def waiting(self, limit: int | None = MOST) -> list[Review]:
        """What waits, oldest first."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(t.reviews).order_by(_R.seq).limit(limit)).all()
            found = texts.get(connection, (key for row in rows for key in (row.hint, row.comment)))
        words = {key: text.decode() for key, text in found.items()}
        return [
            Review(
                row.seq,
                row.client,
                row.at,
                Why(row.reason),
                Feedback(row.turn, row.score, words.get(row.hint), words.get(row.comment)),
            )
            for row in rows
        ]

    def counts(self) -> dict[str, int]:
        """How much waits, by client."""
        query = sa.select(_R.client, sa.func.count()).group_by(_R.client)
        with self._database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def give(self, said: Feedback, client: str) -> Reception:
        """Keeps what a client says about a turn, and settles it or lets it wait.

        Raises NoTurnError. The owner's word settles what waits on the turn.
        """
        with self._database.write() as connection:
            now = self._database.now()
            if client == OWNER:
                _take(connection, _R.turn == said.turn)
                return give_feedback(connection, said, now)
            why = _why(connection, said, client, now)
            if why is None:
                return give_feedback(connection, said, now, client)
            session = sa.select(_T.session).where(_T.id == said.turn)
            turn = connection.execute(session).scalar()
            kept = _keep(connection, said, client, why, now)
        reason = _SAID[why] if kept else f"{MOST} verdicts of this key wait already: it is not kept"
        return Reception(said.turn, turn or "", said.score, applied=False, reason=reason)

    def accept(self, seqs: Sequence[int]) -> int:
        """Lets what waits count, as if the owner had said it; returns how many did."""
        waiting = [review for review in self.waiting(None) if review.seq in seqs]
        with self._database.write() as connection:
            for review in waiting:
                _take(connection, _R.seq == review.seq)
                give_feedback(connection, review.said, self._database.now())
        return len(waiting)

    def drop(self, seqs: Sequence[int]) -> int:
        """Forgets what waits; returns how many went."""
        with self._database.write() as connection:
            turns = _take(connection, _R.seq.in_(seqs))
        return len(turns)


def _why(connection: sa.Connection, said: Feedback, client: str, now: float) -> Why | None:
    turn = connection.execute(sa.select(_T.client).where(_T.id == said.turn)).first()
    if turn is None:
        return None  # give_feedback says so
    known = sa.select(_F.score, _F.client).where(_F.turn == said.turn)
    before = connection.execute(known).first()
    verdict = sa.select(_V.score).where(_V.turn == said.turn)
    score = before.score if before else connection.execute(verdict).scalar()
    differs = score is not None and score != said.score
    if turn.client != client:
        return Why.CONTRADICTION if differs else Why.FOREIGN
    # A hint of this one would take the place of the other's.
    if before is not None and before.client != client and (differs or said.hint is not None):
        return Why.CONTRADICTION
    lately = sa.select(_F.turn).where(_F.client == client, _F.updated_at > now - 3600)
    count = sa.select(sa.func.count()).select_from(lately.limit(AN_HOUR).subquery())
    return Why.FLOOD if (connection.execute(count).scalar() or 0) >= AN_HOUR else None


def _keep(connection: sa.Connection, said: Feedback, client: str, why: Why, now: float) -> bool:
    """Keeps the client's last word on a turn; False if too much of it waits already."""
    _take(connection, sa.and_(_R.turn == said.turn, _R.client == client))
    theirs = sa.select(sa.func.count()).where(_R.client == client)
    if (connection.execute(theirs).scalar() or 0) >= MOST:
        return False
    hint, comment = (
        None if text is None else texts.put(connection, text.encode())
        for text in (said.hint, said.comment)
    )
    values = {"turn": said.turn, "client": client, "score": said.score, "reason": why, "at": now}
    connection.execute(sa.insert(t.reviews).values(**values, hint=hint, comment=comment))
    return True


def _take(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> list[str]:
    """Deletes what waits; returns its turns."""
    columns = _R.turn, _R.hint, _R.comment
    rows = connection.execute(sa.select(*columns).where(condition)).all()
    connection.execute(sa.delete(t.reviews).where(condition))
    texts.release(connection, (key for row in rows for key in (row.hint, row.comment)))
    return [row.turn for row in rows]
