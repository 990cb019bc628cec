"""The judge's work: leased turns, verdicts, what people said, and what judging has cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from nextstate.records import Feedback, NextState, Source, Turn, Verdict
from nextstate.store import schema as t
from nextstate.store.counts import read_counts
from nextstate.store.database import Database, queries
from nextstate.store.settling import (
    add_hinted_prompt,
    judge_again,
    load_feedback,
    load_verdict,
    settle_votes,
)
from nextstate.store.turns import load_next_states, load_turn

BUDGET_S = 3600.0
"""The window of the judge's budget."""
_MOST_STEPS = 32


@dataclass(frozen=True, slots=True)
class Judgement:
    """A leased turn with everything that the judge may know about it."""

    turn: Turn
    next_states: tuple[NextState, ...]
    later: tuple[NextState, ...]
    """What the user said when the turn's task ended, where that speaks about this turn."""
    task_end: str | None
    """The turn that `later` followed."""
    attempts: int
    """How many times the turn has been leased, this time included."""
    feedback: Feedback | None = None
    """What a person said about it: then nobody votes."""


_J, _NOW = t.judgements.c, sa.bindparam("now", type_=sa.Float)
_DUE = sa.select(sa.literal_column("1", sa.Integer).label("due")).where(
    sa.or_(
        sa.exists().where(_J.state == "pending", _J.not_before <= _NOW),
        sa.exists().where(_J.state == "leased", _J.lease_until < _NOW),
    )
)
"""Whether there is a turn to judge."""


@queries
class Judging:
    """Queries for judgements, verdicts, feedback and the judge's budget."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def lease(self, limit: int, lease_s: float) -> list[str]:
        """Leases up to `limit` turns to judge; an expired lease is leased again.

        The oldest first: of those that were never put back, and of those that wait again longest.
        Where there is nothing to judge, nobody who writes is held up.
        """
        now = self._database.now()
        with self._database.cursor(write=False) as cursor:
            if cursor.first(_DUE, now=now) is None:
                return []
        j = t.judgements.c
        pending = sa.select(j.seq, j.turn).where(j.state == "pending")
        expired = sa.select(j.seq, j.turn).where(j.state == "leased", j.lease_until < now)
        due = (  # each in the order of the index, so that nothing is sorted
            pending.where(j.not_before == 0.0).order_by(j.seq),
            pending.where(j.not_before > 0.0, j.not_before <= now).order_by(j.not_before),
            expired,
        )
        with self._database.write() as connection:
            found = [
                tuple(row)
                for query in due
                for row in connection.execute(query.limit(limit).with_for_update(skip_locked=True))
            ]
            ids = [turn_id for _, turn_id in sorted(found)[:limit]]
            connection.execute(
                sa.update(t.judgements)
                .where(j.turn.in_(ids))
                .values(state="leased", lease_until=now + lease_s, attempts=j.attempts + 1)
            )
        return ids

    def defer(self, turn_id: str, delay_s: float, reason: str) -> None:
        """Puts a turn back for a later attempt."""
        j = t.judgements.c
        with self._database.write() as connection:
            connection.execute(
                sa.update(t.judgements)
                .where(j.turn == turn_id, j.state == "leased")
                .values(state="pending", not_before=self._database.now() + delay_s, reason=reason)
            )

    def judgement(self, turn_id: str) -> Judgement | None:
        """What there is to judge about a leased turn; None when the turn is gone."""
        j = t.judgements.c
        query = sa.select(j.attempts, j.task_end).where(j.turn == turn_id)
        with self._database.read() as connection:
            turn, work = load_turn(connection, turn_id), connection.execute(query).first()
            if turn is None or work is None:
                return None
            later = () if work.task_end is None else load_next_states(connection, work.task_end)
            return Judgement(
                turn,
                load_next_states(connection, turn_id),
                tuple(state for state in later if state.source is Source.USER),
                work.task_end,
                work.attempts,
                load_feedback(connection, turn_id),
            )

    def earlier_steps(self, turn_id: str) -> list[str]:
        """The turns of the same task before this one, newest first.

        A task is what happened between two messages of a user: every turn before the last one was
        followed by tools or the environment only.
        """
        c, n = t.turns.c, t.next_states.c
        above = sa.select(c.parent).where(c.id == sa.bindparam("turn"))
        sources = sa.select(n.source).where(n.turn == sa.bindparam("turn"))
        found: list[str] = []
        with self._database.read() as connection:
            last: str | None = turn_id
            while len(found) < _MOST_STEPS:
                last = connection.execute(above, {"turn": last}).scalar()
                if last is None:
                    break
                followed_by = set(connection.execute(sources, {"turn": last}).scalars())
                if not followed_by or followed_by & {Source.USER, Source.FEEDBACK}:
                    break
                found.append(last)
        return found

    def settle_verdict(
        self,
        verdict: Verdict,
        *,
        task_end: str | None = None,
        also_about: Sequence[str] = (),
        read: Judgement | None = None,
    ) -> bool:
        """Keeps a judge's verdict and makes its sample; False if the turn has another one already.

        It is False too if something of what the judge has `read` was forgotten meanwhile: the
        verdict may quote it.

        A verdict that knew the end of the turn's task, `task_end`, replaces one that did not,
        unless the sample is trained or in training. `also_about` are earlier steps that this turn's
        next state speaks about too: they are judged again, with it as evidence, unless they are
        trained or a person has judged them.
        """
        with self._database.write() as connection:
            if read is not None and not _is_there(connection, read):
                return False
            settled = settle_votes(connection, verdict, task_end, self._database.now())
            if settled and also_about:
                judge_again(connection, also_about, verdict.turn)
        return settled

    def add_hinted_prompt(self, verdict: Verdict, *, also_about: Sequence[str] = ()) -> bool:
        """Adds the hinted prompt to a verdict that a person gave; `also_about` as above.

        False if that is not, or no longer, the turn's verdict.
        """
        with self._database.write() as connection:
            added = add_hinted_prompt(connection, verdict, self._database.now())
            if added and also_about:
                judge_again(connection, also_about, verdict.turn)
        return added

    def verdict(self, turn_id: str) -> Verdict | None:
        """The settled verdict of the turn, or None."""
        with self._database.read() as connection:
            return load_verdict(connection, turn_id)

    def feedback(self, turn_id: str) -> Feedback | None:
        """What a person said last about the turn, or None."""
        with self._database.read() as connection:
            return load_feedback(connection, turn_id)

    def rated(self, limit: int) -> list[tuple[str, int]]:
        """The turns that a person has rated and that something followed, as (turn, score).

        At most `limit`, those that were rated last first.
        """
        f, n = t.feedback.c, t.next_states.c
        followed = sa.exists().where(n.turn == f.turn)
        query = sa.select(f.turn, f.score).where(followed).order_by(f.updated_at.desc(), f.turn)
        with self._database.read() as connection:
            return [(row.turn, row.score) for row in connection.execute(query.limit(limit))]

    def labels(self) -> dict[str, dict[tuple[int, int], int]]:
        """How many turns have both, by judge and (what a person said, what the votes came to)."""
        found: dict[str, dict[tuple[int, int], int]] = {}
        with self._database.read() as connection:
            for key, count in read_counts(connection, "labels"):
                judge, person, votes = key.rsplit("/", 2)
                found.setdefault(judge, {})[int(person), int(votes)] = count
        return found

    def spend(self, calls: int, tokens: int) -> None:
        """Notes what judging a turn has cost, and forgets what is an hour old."""
        now = self._database.now()
        with self._database.write() as connection:
            old = t.spending.c.at < now - BUDGET_S
            connection.execute(sa.delete(t.spending).where(old))
            connection.execute(sa.insert(t.spending).values(at=now, calls=calls, tokens=tokens))

    def spent(self) -> tuple[int, int]:
        """(calls, tokens) that judging has cost in the last hour."""
        s = t.spending.c
        query = sa.select(sa.func.sum(s.calls), sa.func.sum(s.tokens))
        query = query.where(s.at >= self._database.now() - BUDGET_S)
        with self._database.read() as connection:
            calls, tokens = connection.execute(query).one()
        return int(calls or 0), int(tokens or 0)


def _is_there(connection: sa.Connection, read: Judgement) -> bool:
    """Whether all that a judge has read of what followed a turn is in the store."""
    there = {*load_next_states(connection, read.turn.id)}
    if read.task_end is not None:
        there |= {*load_next_states(connection, read.task_end)}
    return there >= {*read.next_states, *read.later}
