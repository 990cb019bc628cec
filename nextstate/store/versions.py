"""Policy versions: which exist, which one serves, and why others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import sqlalchemy as sa

from nextstate.records import (
    BASE_VERSION,
    PolicyVersion,
    SampleState,
    ScoreCounts,
    Verdict,
    VersionState,
)
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.database import Database, queries
from nextstate.store.packing import dump
from nextstate.store.settling import verdict_of, verdict_texts

_SERVING = t.versions.c.state == VersionState.SERVING
_ALL_SERVING = sa.select(t.versions).where(_SERVING)


@queries
class Versions:
    """Queries for the versions of each lineage."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, version: PolicyVersion, batch: str | None) -> None:
        """Registers a version and settles the samples of its batch, in one step.

        They are trained, or dropped if the version is rejected.
        """
        s = t.samples.c
        settled: dict[str, Any] = {"state": SampleState.TRAINED}
        if version.state is VersionState.REJECTED:
            reason = f"their version {version.number} was rejected: {version.reason}"
            settled = {"state": SampleState.DROPPED, "reason": reason}
        row = sa.insert(t.versions).values(
            lineage=version.lineage,
            number=version.number,
            parent=version.parent,
            path=version.path,
            sha256=version.sha256,
            samples=version.samples,
            state=version.state,
            metrics=dump(dict(version.metrics)),
            created_at=self._database.now(),
            reason=version.reason,
        )
        with self._database.write() as connection:
            connection.execute(row)
            if batch is None:
                return
            leased = s.lineage == version.lineage, s.state == SampleState.LEASED
            connection.execute(
                sa.update(t.samples)
                .where(*leased, s.batch == batch)
                .values(trained_in=version.number, **settled)
            )

    def all(self, lineage: str | None = None) -> list[PolicyVersion]:
        """Every version, oldest first, of one lineage or of all."""
        query = sa.select(t.versions).order_by(t.versions.c.lineage, t.versions.c.number)
        if lineage is not None:
            query = query.where(t.versions.c.lineage == lineage)
        with self._database.read() as connection:
            return [_version_of(row) for row in connection.execute(query)]

    def get(self, lineage: str, number: int) -> PolicyVersion | None:
        """One version, or None; version 0 is the base and always exists."""
        v = t.versions.c
        query = sa.select(t.versions).where(v.lineage == lineage, v.number == number)
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None and number == BASE_VERSION:
            return base_version(lineage, VersionState.RETIRED)
        return None if row is None else _version_of(row)

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

    def used_turns(self, lineage: str, number: int) -> list[tuple[str, Verdict]]:
        """The turns that the version's update used and their verdicts, in order of recording."""
        s = t.samples.c
        query = (
            sa.select(t.verdicts)
            .join(t.samples, s.turn == t.verdicts.c.turn)
            .where(s.lineage == lineage, s.trained_in == number)
            .order_by(s.seq)
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            found = texts.get(connection, (key for row in rows for key in verdict_texts(row)))
            return [(row.turn, verdict_of(row, found)) for row in rows]

    def score_counts(self, lineage: str, numbers: Sequence[int]) -> dict[int, ScoreCounts]:
        """The verdicts on the turns that each of the versions has served."""
        found = dict.fromkeys(numbers, ScoreCounts())
        fields = {1: "good", 0: "neutral", -1: "bad"}
        c = t.counts.c
        keys = {
            f"{lineage}/{n}/{score}": (n, field) for n in numbers for score, field in fields.items()
        }
        query = sa.select(c.key, c.count).where(c.area == "scores", c.key.in_(keys))
        with self._database.read() as connection:
            for key, count in connection.execute(query):
                number, field = keys[key]
                found[number] += ScoreCounts(**{field: count})
        return found

    def serving(self, lineage: str) -> PolicyVersion:
        """The version that serves the lineage: the base until a first one is published."""
        return self.serving_of([lineage])[lineage]

    def serving_of(self, lineages: Sequence[str]) -> dict[str, PolicyVersion]:
        """The version that serves each of the lineages: a proxy asks 20 times a second."""
        with self._database.cursor(write=False) as cursor:
            found = {row.lineage: _version_of(row) for row in cursor.all(_ALL_SERVING)}
        base = VersionState.SERVING
        return {name: found.get(name) or base_version(name, base) for name in lineages}

    def set_serving(self, lineage: str, number: int) -> None:
        """Puts version `number`, which a person chose, into service and retires the one before.

        A candidate that waits for its publication is retired too: it was made before they chose.
        """
        v = t.versions.c
        waiting = sa.and_(v.state == VersionState.CANDIDATE, v.number != number)
        with self._database.write() as connection:
            _set_state(connection, lineage, _SERVING, VersionState.RETIRED)
            _set_state(connection, lineage, waiting, VersionState.RETIRED, _passed_over(number))
            _set_state(connection, lineage, v.number == number, VersionState.SERVING)

    def serve_candidate(self, version: PolicyVersion) -> bool:
        """Puts a version into service in place of its parent; True as well if it serves already.

        False if it is `overtaken`.
        """
        v = t.versions.c
        with self._database.write() as connection:
            if _is_overtaken(connection, version):
                return False
            _set_state(connection, version.lineage, _SERVING, VersionState.RETIRED)
            ours = v.number == version.number
            _set_state(connection, version.lineage, ours, VersionState.SERVING)
        return True

    def overtaken(self, version: PolicyVersion) -> bool:
        """True if training must not put this version into service, as another one was chosen.

        That is a candidate whose parent no longer serves, which is retired here, and one that was
        retired or rejected before.
        """
        with self._database.write() as connection:
            return _is_overtaken(connection, version)

    def replace_serving(self, rejected: PolicyVersion, number: int) -> bool:
        """Puts version `number` into service in place of `rejected`, which keeps its reason.

        False, and nothing is changed, if another version serves by now.
        """
        v = t.versions.c
        lineage, ours = rejected.lineage, sa.and_(v.number == rejected.number, _SERVING)
        with self._database.write() as connection:
            if not _set_state(connection, lineage, ours, VersionState.REJECTED, rejected.reason):
                return False
            _set_state(connection, lineage, v.number == number, VersionState.SERVING)
        return True

    def reject(self, lineage: str, number: int, reason: str) -> bool:
        """Marks a version that must not come into service, and why.

        False, and nothing is changed, if it serves by now.
        """
        with self._database.write() as connection:
            chosen = sa.and_(t.versions.c.number == number, sa.not_(_SERVING))
            return _set_state(connection, lineage, chosen, VersionState.REJECTED, reason) > 0


def base_version(lineage: str, state: VersionState) -> PolicyVersion:
    """Version 0 of a lineage: the base model without an adapter."""
    return PolicyVersion(lineage, BASE_VERSION, None, None, None, 0, state)


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


def _is_overtaken(connection: sa.Connection, version: PolicyVersion) -> bool:
    """See `Versions.overtaken`."""
    v = t.versions.c
    ours = v.number == version.number
    query = sa.select(v.number, v.state).where(v.lineage == version.lineage, ours | _SERVING)
    states = {row.number: row.state for row in connection.execute(query)}
    state = states.get(version.number)
    if state != VersionState.CANDIDATE:
        return state != VersionState.SERVING
    serving = [number for number, other in states.items() if other == VersionState.SERVING]
    chosen = next(iter(serving), BASE_VERSION)
    if chosen == version.parent:
        return False
    _set_state(connection, version.lineage, ours, VersionState.RETIRED, _passed_over(chosen))
    return True


def _passed_over(chosen: int) -> str:
    return (
        f"not served: version {chosen} was put into service before this one could be; "
        "`nextstate rollback` serves it"
    )


def _set_state(
    connection: sa.Connection,
    lineage: str,
    chosen: sa.ColumnElement[bool],
    state: VersionState,
    reason: str | None = None,
) -> int:
    """Changes the state of versions, and the reason if one is given; returns how many."""
    values = {"state": state} if reason is None else {"state": state, "reason": reason}
    query = sa.update(t.versions).where(t.versions.c.lineage == lineage, chosen)
    return connection.execute(query.values(**values)).rowcount
