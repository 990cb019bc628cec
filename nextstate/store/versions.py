"""Policy versions: which exist, which one serves, and why others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import sqlalchemy as sa

from nextstate.errors import ConflictError
from nextstate.records import (
    BASE_VERSION,
    Decisions,
    JudgedTurn,
    Pause,
    PolicyVersion,
    SampleState,
    Verdict,
    VersionState,
)
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.database import Database, queries
from nextstate.store.judged import newest_judged, thinned
from nextstate.store.ledger import SOMEBODY, Kind, append, append_states, append_version
from nextstate.store.packing import dump
from nextstate.store.settling import verdict_of, verdict_texts
from nextstate.store.shares import OWNER, REMEMBERED_S, beside_others

_NAME_CHARS = 80
WITHDRAWN = "it, or a version before it, trained on turns that a person let us forget"
_SERVING = t.versions.c.state == VersionState.SERVING
_ALL_SERVING = sa.select(t.versions).where(_SERVING)


@queries
class Versions:
    """Queries for the versions of each lineage."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        version: PolicyVersion,
        batch: str | None,
        decided: int | None = None,
        give_back: Sequence[int] = (),
    ) -> VersionState:
        """Registers a version and settles the samples of its batch, in one step.

        They are trained, or dropped if the version is rejected. A candidate is retired at once if
        people have chosen a version more often than `decided`, the number when its update began:
        their choice stays, and rejected if its parent was withdrawn to be forgotten: then it has no
        folder any more, and its samples are ready again. Of a rejected version with the numbers of
        those rejected before it in `give_back`, the samples of all of them are ready again. Returns
        the state it got.
        """
        s = t.samples.c
        lineage, state, reason = version.lineage, version.state, version.reason
        settled: dict[str, Any] = {"state": SampleState.TRAINED}
        if state is VersionState.REJECTED:
            settled = {"state": SampleState.DROPPED, "reason": _why_dropped(version, reason)}
        now, metrics = self._database.now(), dump(dict(version.metrics))
        v = t.versions.c
        same = v.lineage == lineage, v.number == version.number, v.metrics == metrics
        with self._database.write() as connection:
            known = connection.execute(sa.select(v.state).where(*same)).scalar()
            if known is not None:  # it was added, and the answer was lost
                return VersionState(known)
            made = state is VersionState.CANDIDATE
            if made and decided is not None and _decisions(connection, lineage).choices != decided:
                state = VersionState.RETIRED
                reason = _passed_over(_serving(connection, lineage))
            forgotten = made and _is_withdrawn(connection, lineage, version.parent)
            if forgotten:
                state, reason = VersionState.REJECTED, WITHDRAWN
                settled = {"state": SampleState.READY, "batch": None, "trained_in": None}
            row = sa.insert(t.versions).values(
                lineage=lineage,
                number=version.number,
                parent=version.parent,
                path=None if forgotten else version.path,
                sha256=version.sha256,
                samples=version.samples,
                state=state,
                metrics=metrics,
                created_at=now,
                reason=reason,
            )
            connection.execute(row)
            if batch is not None:
                leased = s.lineage == lineage, s.state == SampleState.LEASED, s.batch == batch
                values = {"trained_in": version.number} | settled
                connection.execute(sa.update(t.samples).where(*leased).values(values))
            append_version(connection, now, lineage, version.number)
            if give_back:
                _give_back(connection, lineage, [*give_back, version.number])
        return state

    def note(self, lineage: str, number: int, metrics: Mapping[str, float]) -> bool:
        """Adds metrics to a candidate. False, and nothing is changed, if it waits no more."""
        v = t.versions.c
        ours = v.lineage == lineage, v.number == number, v.state == VersionState.CANDIDATE
        with self._database.write() as connection:
            known = connection.execute(sa.select(v.metrics).where(*ours)).scalar()
            if known is None:
                return False
            values = {"metrics": dump({**orjson.loads(known), **metrics})}
            connection.execute(sa.update(t.versions).where(*ours).values(values))
            exam = {"lineage": lineage, "number": number, "metrics": dict(metrics)}
            append(connection, self._database.now(), Kind.EXAM, exam)
        return True

    def fail(self, version: PolicyVersion, reason: str, give_back: Sequence[int] = ()) -> bool:
        """Rejects a candidate that has failed its exam; its adapter stays.

        What becomes of samples is as in `add`. False, and nothing is changed, if it waits no more.
        """
        v = t.versions.c
        waits = sa.and_(v.number == version.number, v.state == VersionState.CANDIDATE)
        with self._database.write() as connection:
            state = VersionState.REJECTED
            now = self._database.now()
            if not _set_state(connection, now, version.lineage, waits, state, reason):
                return False
            s = t.samples.c
            used = s.lineage == version.lineage, s.trained_in == version.number
            dropped = {"state": SampleState.DROPPED, "reason": _why_dropped(version, reason)}
            connection.execute(sa.update(t.samples).where(*used).values(dropped))
            if give_back:
                _give_back(connection, version.lineage, [*give_back, version.number])
        return True

    def all(self, lineage: str | None = None, limit: int | None = None) -> list[PolicyVersion]:
        """Every version, or the newest `limit`, of one lineage or of all; oldest first of each."""
        v = t.versions.c
        query = sa.select(t.versions).order_by(v.created_at.desc(), v.number.desc()).limit(limit)
        if lineage is not None:
            query = query.where(v.lineage == lineage)
        with self._database.read() as connection:
            found = [_version_of(row) for row in connection.execute(query)]
        return sorted(found, key=lambda version: (version.lineage, version.number))

    def newest(self, lineage: str, count: int) -> list[PolicyVersion]:
        """The newest `count` versions of a lineage, oldest first."""
        v = t.versions.c
        query = sa.select(t.versions).where(v.lineage == lineage).order_by(v.number.desc())
        with self._database.read() as connection:
            rows = connection.execute(query.limit(count)).all()
        return [_version_of(row) for row in reversed(rows)]

    def get(self, lineage: str, number: int) -> PolicyVersion | None:
        """One version, or None; version 0 is the base and always exists."""
        v = t.versions.c
        query = sa.select(t.versions).where(v.lineage == lineage, v.number == number)
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None and number == BASE_VERSION:
            return base_version(lineage, VersionState.RETIRED)
        return None if row is None else _version_of(row)

    def made_at(self, lineage: str, numbers: Sequence[int]) -> dict[int, float]:
        """When each of the versions was registered, in Unix time."""
        v = t.versions.c
        query = sa.select(v.number, v.created_at).where(v.lineage == lineage, v.number.in_(numbers))
        with self._database.read() as connection:
            return {row.number: row.created_at for row in connection.execute(query)}

    def ancestors(self, version: PolicyVersion) -> list[PolicyVersion]:
        """The versions that it was trained from, its parent first and the base last."""
        known = {v.number: v for v in self.all(version.lineage)}
        found: list[PolicyVersion] = []
        number = version.parent
        while number is not None:
            base = base_version(version.lineage, VersionState.RETIRED)
            found.append(known.get(number, base))
            number = found[-1].parent
        return found

    def chain(self, lineage: str, number: int, most: int) -> list[int]:
        """The numbers of a version, which comes last, and of its nearest ancestors: `most` in all.

        Its cost is that of `most` look-ups, however many versions there are.
        """
        v = t.versions.c
        start = sa.select(sa.literal(number).label("number"), sa.literal(1).label("place"))
        chain = start.cte("chain", recursive=True)
        ours = v.lineage == lineage, v.number == chain.c.number, v.parent.is_not(None)
        parents = sa.select(v.parent, chain.c.place + 1).where(*ours, chain.c.place < most)
        chain = chain.union_all(parents)
        query = sa.select(chain.c.number).order_by(chain.c.place.desc())
        with self._database.read() as connection:
            return [*connection.execute(query).scalars()]

    def used_turns(self, lineage: str, number: int) -> list[tuple[str, Verdict | None]]:
        """The turns that the version's update used, in order of recording, and their verdicts.

        A step of an episode may have none.
        """
        s = t.samples.c
        query = (
            sa.select(s.turn.label("used"), t.verdicts)
            .outerjoin(t.verdicts, s.turn == t.verdicts.c.turn)
            .where(s.lineage == lineage, s.trained_in == number)
            .order_by(s.seq)
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            found = texts.get(connection, (key for row in rows for key in verdict_texts(row)))
            return [(row.used, verdict_of(row, found) if row.turn else None) for row in rows]

    def judged_turns(self, lineage: str, limit: int) -> list[JudgedTurn]:
        """The newest turns with a verdict that a version of the lineage served, oldest first.

        Without the steps of episodes: a group's advantages have a mean of 0, however good it was.
        Where these are many, fewer turns than `limit` may be found. Beside others a client gives no
        more than its share (`beside_others`); where nobody else spoke for a day, none is named.
        """
        query = newest_judged(lineage, limit)
        with self._database.read() as connection:
            rows = connection.execute(query.limit(limit)).all()
            if any(row.client != OWNER for row in rows):
                rows = thinned(connection.execute(query).all(), limit)
        rows = rows[::-1]
        clients = [row.client for row in rows]
        since = self._database.now() - REMEMBERED_S
        recent = {row.client for row in rows if row.created_at > since} or {*clients}
        alone = len(recent) == 1 and OWNER not in recent
        return [
            JudgedTurn(
                *(row.session, row.policy_version, row.score, row.judge),
                client=OWNER if alone else row.client,
            )
            for row in (rows[at] for at in beside_others(clients, recent)[-limit:])
        ]

    def decisions(self, lineage: str) -> Decisions:
        """What people have decided about the lineage so far."""
        with self._database.read() as connection:
            return _decisions(connection, lineage)

    def resume(self, lineage: str, by: str = SOMEBODY) -> None:
        """Lets a lineage go on that a person or the gate's rejections have paused."""
        with self._database.write() as connection:
            _decide(connection, self._database.now(), Kind.RESUME, lineage, by)

    def pause(self, lineage: str, by: str) -> None:
        """Lets a lineage take no batch until a person resumes it; `by` is who says so."""
        with self._database.write() as connection:
            _decide(connection, self._database.now(), Kind.PAUSE, lineage, by)

    def forget_adapter(self, lineage: str, number: int) -> bool:
        """Notes that a version's folder is deleted; it can never serve again.

        False, and nothing is changed, if it serves, waits to serve or a person chose it.
        """
        v, d = t.versions.c, t.decisions.c
        chosen = sa.select(d.number).where(d.lineage == lineage, d.number.is_not(None))
        idle = v.state.in_((VersionState.RETIRED, VersionState.REJECTED)), v.number.not_in(chosen)
        query = sa.update(t.versions).where(v.lineage == lineage, v.number == number, *idle)
        with self._database.write() as connection:
            gone = connection.execute(query.values(path=None)).rowcount > 0
            if gone:
                what = {"lineage": lineage, "number": number}
                append(connection, self._database.now(), Kind.DELETED, what)
        return gone

    def serving(self, lineage: str) -> PolicyVersion:
        """The version that serves the lineage: the base until a first one is published."""
        return self.serving_of([lineage])[lineage]

    def serving_of(self, lineages: Sequence[str]) -> dict[str, PolicyVersion]:
        """The version that serves each of the lineages: a proxy asks 20 times a second."""
        with self._database.cursor(write=False) as cursor:
            found = {row.lineage: _version_of(row) for row in cursor.all(_ALL_SERVING)}
        base = VersionState.SERVING
        return {name: found.get(name) or base_version(name, base) for name in lineages}

    def set_serving(
        self, lineage: str, number: int, by: str = SOMEBODY, decided: int | None = None
    ) -> bool:
        """Puts version `number`, which a person chose, into service and retires the one before.

        A candidate that waits for its publication is retired too: it was made before they chose.
        False, and nothing is changed, if its adapter was deleted meanwhile. Raises ConflictError if
        people have chosen more often than `decided`, unless what they chose serves.
        """
        v = t.versions.c
        waiting = sa.and_(v.state == VersionState.CANDIDATE, v.number != number)
        ours = v.lineage == lineage, v.number == number
        deleted = sa.select(v.number).where(*ours, v.path.is_(None), v.sha256.is_not(None))
        with self._database.write() as connection:
            if connection.execute(deleted).first() is not None:
                return False
            if decided is not None and _decisions(connection, lineage).choices != decided:
                serving = _serving(connection, lineage)
                if serving == number:  # also if it was done, and the answer was lost
                    return True
                raise ConflictError(
                    f"version {serving} of {lineage} was put into service while version {number} "
                    "was loaded: if that one shall serve all the same, choose it again"
                )
            now, passed = self._database.now(), _passed_over(number)
            _decide(connection, now, Kind.CHOICE, lineage, by, number)
            _set_state(connection, now, lineage, _SERVING, VersionState.RETIRED)
            _set_state(connection, now, lineage, waiting, VersionState.RETIRED, passed)
            _set_state(connection, now, lineage, v.number == number, VersionState.SERVING)
        return True

    def serve_candidate(self, version: PolicyVersion) -> bool:
        """Puts a version into service in place of its parent; True as well if it serves already.

        False if it is `overtaken`.
        """
        v = t.versions.c
        with self._database.write() as connection:
            now, ours = self._database.now(), v.number == version.number
            if _is_overtaken(connection, now, version):
                return False
            _set_state(connection, now, version.lineage, _SERVING, VersionState.RETIRED)
            _set_state(connection, now, version.lineage, ours, VersionState.SERVING)
        return True

    def overtaken(self, version: PolicyVersion) -> bool:
        """True if training must not put this version into service, as another one was chosen.

        That is a candidate whose parent no longer serves, which is retired here, and one that was
        retired or rejected before.
        """
        with self._database.write() as connection:
            return _is_overtaken(connection, self._database.now(), version)

    def replace_serving(
        self, rejected: PolicyVersion, number: int, decided: int | None = None
    ) -> bool:
        """Puts version `number` into service in place of `rejected`, which keeps its reason.

        False, and nothing is changed, if another version serves by now, or if people have chosen a
        version more often than `decided`: they may want the rejected one.
        """
        v = t.versions.c
        lineage, ours = rejected.lineage, sa.and_(v.number == rejected.number, _SERVING)
        with self._database.write() as connection:
            if decided is not None and _decisions(connection, lineage).choices != decided:
                return False
            now, state = self._database.now(), VersionState.REJECTED
            if not _set_state(connection, now, lineage, ours, state, rejected.reason):
                return False
            _set_state(connection, now, lineage, v.number == number, VersionState.SERVING)
        return True

    def reject(self, lineage: str, number: int, reason: str) -> bool:
        """Marks a version that must not come into service, and why.

        False, and nothing is changed, if it serves by now.
        """
        with self._database.write() as connection:
            chosen = sa.and_(t.versions.c.number == number, sa.not_(_SERVING))
            now, state = self._database.now(), VersionState.REJECTED
            return _set_state(connection, now, lineage, chosen, state, reason) > 0


def base_version(lineage: str, state: VersionState) -> PolicyVersion:
    """Version 0 of a lineage: the base model without an adapter."""
    return PolicyVersion(lineage, BASE_VERSION, None, None, None, 0, state)


def _is_withdrawn(connection: sa.Connection, lineage: str, number: int | None) -> bool:
    """True for a version that was trained from and whose adapter nobody may have any more."""
    v = t.versions.c
    ours = v.lineage == lineage, v.number == number, v.path.is_(None)
    gone = sa.select(v.number).where(*ours, v.state == VersionState.REJECTED)
    return connection.execute(gone).first() is not None


def _version_of(row: Any) -> PolicyVersion:
    return PolicyVersion(
        lineage=row.lineage,
        number=row.number,
        parent=row.parent,
        path=row.path,
        sha256=row.sha256,
        samples=row.samples,
        state=VersionState(row.state),
        metrics=orjson.loads(row.metrics),
        reason=row.reason,
    )


def _why_dropped(version: PolicyVersion, reason: str | None) -> str:
    return f"their version {version.number} was rejected: {reason}"


def _give_back(connection: sa.Connection, lineage: str, numbers: Sequence[int]) -> None:
    """Makes the samples of versions ready again that were dropped with them."""
    s = t.samples.c
    dropped = s.lineage == lineage, s.trained_in.in_(numbers), s.state == SampleState.DROPPED
    ready = {"state": SampleState.READY, "batch": None, "reason": None}
    again = sa.update(t.samples).where(*dropped)
    connection.execute(again.values(**ready, trained_in=None, screened=None))


def _is_overtaken(connection: sa.Connection, now: float, version: PolicyVersion) -> bool:
    """See `Versions.overtaken`."""
    v = t.versions.c
    ours = v.number == version.number
    query = sa.select(v.state).where(v.lineage == version.lineage, ours)
    state = connection.execute(query).scalar()
    if state != VersionState.CANDIDATE:
        return state != VersionState.SERVING
    serving = _serving(connection, version.lineage)
    if serving == version.parent:
        return False
    passed = _passed_over(serving)
    _set_state(connection, now, version.lineage, ours, VersionState.RETIRED, passed)
    return True


def _serving(connection: sa.Connection, lineage: str) -> int:
    """The number of the version that serves."""
    query = sa.select(t.versions.c.number).where(t.versions.c.lineage == lineage, _SERVING)
    return connection.execute(query).scalar() or BASE_VERSION


def _decisions(connection: sa.Connection, lineage: str) -> Decisions:
    d = t.decisions.c
    columns = d.number, d.after, d.at, d.paused_by
    rows = connection.execute(sa.select(*columns).where(d.lineage == lineage).order_by(d.seq)).all()
    chosen = [row.number for row in rows if row.number is not None]
    accepts = [row.after for row in rows if row.paused_by is None]
    last = next((row for row in reversed(rows) if row.number is None), None)
    return Decisions(
        len(chosen),
        accepts[-1] if accepts else -1,
        frozenset(chosen),
        Pause(last.paused_by, last.at) if last is not None and last.paused_by is not None else None,
    )


def _decide(
    connection: sa.Connection,
    now: float,
    kind: Kind,
    lineage: str,
    by: str,
    number: int | None = None,
) -> None:
    v, by = t.versions.c, by[:_NAME_CHARS]
    newest = connection.execute(sa.select(sa.func.max(v.number)).where(v.lineage == lineage))
    values = {"lineage": lineage, "number": number, "after": newest.scalar() or BASE_VERSION}
    paused_by = by if kind is Kind.PAUSE else None
    connection.execute(sa.insert(t.decisions).values(**values, at=now, paused_by=paused_by))
    append(connection, now, kind, {"lineage": lineage, "number": number, "by": by})


def _passed_over(chosen: int) -> str:
    return (
        f"not served: version {chosen} was put into service before this one could be; "
        "`nextstate rollback` serves it"
    )


def _set_state(
    connection: sa.Connection,
    now: float,
    lineage: str,
    chosen: sa.ColumnElement[bool],
    state: VersionState,
    reason: str | None = None,
) -> int:
    """Changes the state of versions, and the reason if one is given; returns how many."""
    values = {"state": state} if reason is None else {"state": state, "reason": reason}
    query = sa.update(t.versions).where(t.versions.c.lineage == lineage, chosen).values(**values)
    numbers = sorted(connection.execute(query.returning(t.versions.c.number)).scalars())
    append_states(connection, now, lineage, numbers, state, reason)
    return len(numbers)
