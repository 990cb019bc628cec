"""Who holds the exams of a lineage, and what episodes say of an exam.

A candidate waits for its exam only while somebody has said that they hold the exams of its lineage:
the endless run of `[rollout]`, `nextstate rollout`, or a program by `POST /v1/exams`. One of them
holds them at a time. Whoever says nothing for a while holds them no more, so a kill ends it.
"""

from __future__ import annotations

import sqlalchemy as sa

from nextstate.episodes import SOLVED, Split
from nextstate.exams import Exam
from nextstate.records import PolicyVersion
from nextstate.store import schema as t
from nextstate.store.database import Database, queries

HELD_S = 60.0
"""Seconds for which exams are held after their holder has said so."""
_R, _E = t.roles.c, t.episodes.c


@queries
class Examiners:
    """The holders of the exams of each lineage, among the roles of the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def hold(self, lineage: str, holder: str) -> str:
        """Who holds the lineage's exams now: `holder`, for HELD_S, unless another one does."""
        name, now = _role(lineage), self._database.now()
        with self._database.write() as connection:
            row = connection.execute(sa.select(_R.holder, _R.since).where(_R.name == name)).first()
            if row is not None and row.holder != holder and row.since > now - HELD_S:
                return row.holder
            values = {"epoch": 0, "holder": holder, "since": now}
            added = self._database.insert(t.roles).values(name=name, **values)
            connection.execute(added.on_conflict_do_update(index_elements=["name"], set_=values))
        return holder

    def leave(self, lineage: str, holder: str) -> None:
        """The holder holds them no more."""
        with self._database.write() as connection:
            ours = _R.name == _role(lineage), _R.holder == holder
            connection.execute(sa.delete(t.roles).where(*ours))

    def holder(self, lineage: str) -> str | None:
        """Who holds the lineage's exams; None: nobody does."""
        held = _R.name == _role(lineage), _R.since > self._database.now() - HELD_S
        with self._database.read() as connection:
            return connection.execute(sa.select(_R.holder).where(*held)).scalar()

    def count(self, candidate: PolicyVersion, planned: int) -> Exam:
        """The exam of `planned` tasks that episodes of the split `eval` are.

        Of those that are pinned to the candidate or to its parent, and have an outcome, each pair
        with the same environment, task, seed, budgets and sampling is one task. The first counts.
        """
        same = _E.environment, _E.task_key, _E.seed, _E.max_calls, _E.max_tokens, _E.sampling
        ours, parents = candidate.number, candidate.parent or 0
        query = sa.select(_E.version, _E.outcome, *same).where(
            _E.lineage == candidate.lineage,
            _E.split == Split.EVAL.value,
            _E.version.in_((ours, parents)),
            _E.outcome.is_not(None),
        )
        solved: dict[int, dict[tuple[object, ...], bool]] = {ours: {}, parents: {}}
        with self._database.read() as connection:
            for row in connection.execute(query.order_by(_E.closed_at, _E.id)):
                solved[row.version].setdefault(tuple(row[2:]), row.outcome >= SOLVED)
        both = solved[ours].keys() & solved[parents].keys()
        return Exam.of_pairs(planned, [(solved[ours][one], solved[parents][one]) for one in both])


def _role(lineage: str) -> str:
    return f"exams/{lineage}"
