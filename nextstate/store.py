"""Where the stages meet: every record, and the work that is leased from them.

The only module with queries. All methods are synchronous and safe to call from several threads and
processes; asynchronous callers use `asyncio.to_thread`. Work is leased with an expiry and settled,
never deleted on fetch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError

from nextstate import schema as t
from nextstate.config import StoreConfig
from nextstate.errors import StoreError
from nextstate.migrations import migrate
from nextstate.recording import Recording, Remembered
from nextstate.records import (
    BASE_VERSION,
    NextState,
    PolicyVersion,
    Sample,
    SampleState,
    ScoreCounts,
    Turn,
    Verdict,
    VersionState,
)
from nextstate.rows import (
    dump,
    hashes,
    keep_ids,
    load_bodies,
    next_states_of,
    sample_of,
    turn_of,
    verdict_of,
    version_of,
    version_row,
)
from nextstate.sqlite import checkpoint, open_file

FEEDBACK = "feedback"
"""The judge's name in a verdict that a person gave."""
_SILENT_S = 10.0
"""A worker that says nothing for so long is taken for dead."""


class Store:
    """The database behind one state folder; see the module."""

    def __init__(self, config: StoreConfig, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.dir = config.path
        try:
            self.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            if config.url and not config.url.startswith("sqlite:///"):
                raise StoreError(
                    f"[store] url = {config.url!r}: only sqlite:///PATH is supported so far; "
                    "empty the key to use [store] dir"
                )
            file = config.url.removeprefix("sqlite:///") or self.dir / "nextstate.sqlite3"
            self._file = self.dir / file
            self._db = open_file(self._file)
            with self._write() as connection:
                migrate(connection)
        except (OSError, DatabaseError) as error:
            raise StoreError(
                f"[store] dir = {config.dir!r} cannot hold the store: {error}; "
                "name a folder that you may write to"
            ) from error
        self._known = Remembered()

    def close(self) -> None:
        """Closes every connection."""
        self._db.dispose()

    @contextmanager
    def _write(self) -> Generator[sa.Connection]:
        with (
            self._db.connect().execution_options(immediate=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def _read(self) -> Generator[sa.Connection]:
        with self._db.connect() as connection, connection.begin():
            yield connection

    # Recording

    @contextmanager
    def recording(self) -> Generator[Recording]:
        """One transaction in which turns are linked and added; all of them are kept or none."""
        with (
            self._write() as connection,
            closing(Recording(connection, self._known)) as recording,
        ):
            yield recording
        self._known.add(recording.fresh)

    # Reading back

    def turn(self, turn_id: str) -> Turn | None:
        """One turn with its whole request, or None."""
        with self._read() as connection:
            row = connection.execute(sa.select(t.turns).where(t.turns.c.id == turn_id)).first()
            return None if row is None else turn_of(connection, row)

    def lineage_of(self, turn_id: str) -> str | None:
        """The lineage of a turn; None when there is no such turn."""
        with self._read() as connection:
            query = sa.select(t.turns.c.lineage).where(t.turns.c.id == turn_id)
            return connection.execute(query).scalar()

    def next_states(self, turn_id: str) -> tuple[NextState, ...]:
        """What followed the turn, in order."""
        with self._read() as connection:
            return next_states_of(connection, turn_id)

    def verdict(self, turn_id: str) -> Verdict | None:
        """The settled verdict of the turn, or None."""
        with self._read() as connection:
            query = sa.select(t.verdicts).where(t.verdicts.c.turn == turn_id)
            row = connection.execute(query).first()
            if row is None:
                return None
            return verdict_of(row, load_bodies(connection, hashes(row.hinted_prompt_ids or b"")))

    def turn_ids(self, limit: int | None = None, newest_first: bool = False) -> list[str]:
        """Turn ids in the order of recording, without cut ones that a retry stands for."""
        order = t.turns.c.seq.desc() if newest_first else t.turns.c.seq
        with self._read() as connection:
            kept = sa.select(t.turns.c.id).where(t.turns.c.replaced_by.is_(None))
            query = kept.order_by(order).limit(limit)
            return list(connection.execute(query).scalars())

    def checkpoint(self) -> None:
        """Moves what was committed into the database's own file, if that has become much."""
        checkpoint(self._db, self._file)

    def counts(self) -> dict[str, int]:
        """How many records there are of each kind and state, under `area/what` names."""
        groups: tuple[tuple[str, Any], ...] = (
            ("turns", t.turns.c.kind),
            ("judgements", t.judgements.c.state),
            ("verdicts", t.verdicts.c.score),
            ("samples", t.samples.c.state),
            ("versions", t.versions.c.state),
        )
        result: dict[str, int] = {}
        with self._read() as connection:
            for area, column in groups:
                query = sa.select(column, sa.func.count()).group_by(column)
                if area == "turns":
                    query = query.where(t.turns.c.replaced_by.is_(None))
                for value, count in connection.execute(query):
                    result[f"{area}/{value}"] = count
            trainable = sa.select(sa.func.count()).where(t.turns.c.untrainable.is_(None))
            result["turns/trainable"] = connection.execute(trainable).scalar_one()
        return result

    # The judge's work

    def lease_judgements(self, limit: int, lease_s: float) -> list[str]:
        """Leases up to `limit` turns to judge, oldest first; an expired lease is leased again."""
        now = self._clock()
        j = t.judgements.c
        due = sa.or_(
            sa.and_(j.state == "pending", j.not_before <= now),
            sa.and_(j.state == "leased", j.lease_until < now),
        )
        with self._write() as connection:
            query = (
                sa.select(j.turn)
                .join(t.turns, t.turns.c.id == j.turn)
                .where(due)
                .order_by(t.turns.c.seq)
                .limit(limit)
            )
            ids = list(connection.execute(query).scalars())
            connection.execute(
                sa.update(t.judgements)
                .where(j.turn.in_(ids))
                .values(state="leased", lease_until=now + lease_s, attempts=j.attempts + 1)
            )
        return ids

    def defer_judgement(self, turn_id: str, delay_s: float, reason: str) -> None:
        """Puts a turn back for a later attempt."""
        j = t.judgements.c
        with self._write() as connection:
            connection.execute(
                sa.update(t.judgements)
                .where(j.turn == turn_id, j.state == "leased")
                .values(state="pending", not_before=self._clock() + delay_s, reason=reason)
            )

    def judgement_attempts(self, turn_id: str) -> int:
        """How many times the turn has been leased for judging."""
        with self._read() as connection:
            query = sa.select(t.judgements.c.attempts).where(t.judgements.c.turn == turn_id)
            return connection.execute(query).scalar() or 0

    def settle_verdict(self, verdict: Verdict) -> bool:
        """Keeps the verdict and makes its sample; False when the turn already has one.

        A person's verdict replaces what was voted, unless the sample is trained or being trained.
        """
        with self._write() as connection:
            c = t.turns.c
            query = sa.select(c.lineage, c.policy_version, c.untrainable)
            row = connection.execute(query.where(c.id == verdict.turn)).first()
            if row is None:
                raise StoreError(f"there is no turn {verdict.turn!r}: see `nextstate turns`")
            voted = sa.select(t.verdicts.c.judge).where(t.verdicts.c.turn == verdict.turn)
            if connection.execute(voted).first() is not None:
                if verdict.judge != FEEDBACK:
                    return False
                connection.execute(sa.delete(t.verdicts).where(t.verdicts.c.turn == verdict.turn))
            hinted = verdict.hinted_prompt_ids
            connection.execute(
                sa.insert(t.verdicts).values(
                    turn=verdict.turn,
                    votes=dump(verdict.votes),
                    score=verdict.score,
                    judge=verdict.judge,
                    hint=verdict.hint,
                    hinted_prompt_ids=hinted and keep_ids(connection, hinted),
                    created_at=self._clock(),
                    confidence=verdict.confidence,
                )
            )
            connection.execute(
                sa.update(t.judgements)
                .where(t.judgements.c.turn == verdict.turn)
                .values(state="done", lease_until=None, reason=None)
            )
            _put_sample(connection, row, verdict)
        return True

    # The learner's work

    def ready_samples(self, lineage: str, scored: bool, hinted: bool) -> int:
        """How many samples wait that carry a score (`scored`) or a hinted prompt (`hinted`)."""
        with self._read() as connection:
            query = sa.select(sa.func.count()).where(*_usable(lineage, scored, hinted))
            return connection.execute(query).scalar_one()

    def lease_samples(
        self, lineage: str, limit: int, batch: str, lease_s: float, *, scored: bool, hinted: bool
    ) -> list[Sample]:
        """Leases `limit` usable samples under the name `batch`: of the newest versions first.

        Where turns come faster than the learner takes them, the freshest are the most on-policy;
        the rest stays ready until its lag is too large (`drop_stale`).
        """
        s = t.samples.c
        with self._write() as connection:
            query = (
                _SAMPLES.where(*_usable(lineage, scored, hinted))
                .order_by(s.policy_version.desc(), t.turns.c.seq)
                .limit(limit)
            )
            leased = _samples(connection, query)
            connection.execute(
                sa.update(t.samples)
                .where(s.turn.in_([sample.turn for sample in leased]))
                .values(state=SampleState.LEASED, batch=batch, lease_until=self._clock() + lease_s)
            )
        return leased

    def hold_out(self, lineage: str, chosen: Callable[[str], bool]) -> int:
        """Keeps the ready samples of the sessions that are `chosen` from training, for good.

        Returns how many.
        """
        s = t.samples.c
        ready = (s.lineage == lineage, s.state == SampleState.READY)
        with self._read() as connection:
            query = sa.select(t.turns.c.session).join(t.samples, s.turn == t.turns.c.id)
            found = connection.execute(query.where(*ready).distinct()).scalars()
            sessions = [session for session in found if chosen(session)]
        if not sessions:
            return 0
        turns = sa.select(t.turns.c.id).where(t.turns.c.session.in_(sessions))
        with self._write() as connection:
            done = connection.execute(
                sa.update(t.samples).where(*ready, s.turn.in_(turns)).values(state=SampleState.HELD)
            )
        return done.rowcount

    def held_samples(self, lineage: str, limit: int, per_session: int) -> list[Sample]:
        """The newest `limit` samples that are held out, newest first.

        Of each session only its newest `per_session`, so that one long session is not all there is.
        """
        s = t.samples.c
        place = sa.func.row_number().over(
            partition_by=t.turns.c.session, order_by=t.turns.c.seq.desc()
        )
        ranked = (
            sa.select(t.turns.c.id, place.label("place"))
            .join(t.samples, s.turn == t.turns.c.id)
            .where(s.lineage == lineage, s.state == SampleState.HELD)
            .subquery()
        )
        newest = sa.select(ranked.c.id).where(ranked.c.place <= per_session)
        query = _SAMPLES.where(t.turns.c.id.in_(newest)).order_by(t.turns.c.seq.desc())
        with self._read() as connection:
            return _samples(connection, query.limit(limit))

    def release_samples(self, lineage: str) -> int:
        """Makes leased samples ready again: for a learner that starts and knows it is alone."""
        s = t.samples.c
        with self._write() as connection:
            done = connection.execute(
                sa.update(t.samples)
                .where(s.lineage == lineage, s.state == SampleState.LEASED)
                .values(state=SampleState.READY, batch=None, lease_until=None)
            )
        return done.rowcount

    def drop_samples(self, turn_ids: Sequence[str], reason: str) -> None:
        """Settles samples that must not train."""
        s = t.samples.c
        with self._write() as connection:
            connection.execute(
                sa.update(t.samples)
                .where(s.turn.in_(turn_ids), s.state != SampleState.TRAINED)
                .values(state=SampleState.DROPPED, reason=reason, batch=None, lease_until=None)
            )

    def drop_stale(self, lineage: str, reason_for: Callable[[int], str | None]) -> dict[str, int]:
        """Drops ready samples of the versions that `reason_for` gives a reason for.

        Returns how many it dropped for each reason.
        """
        s = t.samples.c
        ready = (s.lineage == lineage, s.state == SampleState.READY)
        dropped: dict[str, int] = {}
        with self._read() as connection:
            query = sa.select(s.policy_version).where(*ready).distinct()
            versions = list(connection.execute(query).scalars())
        stale = {version: reason_for(version) for version in versions}
        if not any(stale.values()):
            return dropped
        with self._write() as connection:
            for version, reason in stale.items():
                if reason is not None:
                    done = connection.execute(
                        sa.update(t.samples)
                        .where(*ready, s.policy_version == version)
                        .values(state=SampleState.DROPPED, reason=reason)
                    )
                    dropped[reason] = dropped.get(reason, 0) + done.rowcount
        return dropped

    def add_version(self, version: PolicyVersion, batch: str | None) -> None:
        """Registers a version and settles the samples of its batch, in one step.

        They have trained it, or, if it is rejected, are dropped with it.
        """
        s = t.samples.c
        settled: dict[str, Any] = {"state": SampleState.TRAINED}
        if version.state is VersionState.REJECTED:
            reason = f"their version {version.number} was rejected: {version.reason}"
            settled = {"state": SampleState.DROPPED, "reason": reason}
        with self._write() as connection:
            connection.execute(sa.insert(t.versions).values(**version_row(version, self._clock())))
            if batch is not None:
                connection.execute(
                    sa.update(t.samples)
                    .where(
                        s.lineage == version.lineage,
                        s.batch == batch,
                        s.state == SampleState.LEASED,
                    )
                    .values(trained_in=version.number, lease_until=None, **settled)
                )

    # Versions

    def versions(self, lineage: str | None = None) -> list[PolicyVersion]:
        """Every version, oldest first, of one lineage or of all."""
        query = sa.select(t.versions).order_by(t.versions.c.lineage, t.versions.c.number)
        if lineage is not None:
            query = query.where(t.versions.c.lineage == lineage)
        with self._read() as connection:
            return [version_of(row) for row in connection.execute(query)]

    def version(self, lineage: str, number: int) -> PolicyVersion | None:
        """One version, or None; version 0 is the base and always there."""
        for version in self.versions(lineage):
            if version.number == number:
                return version
        if number == BASE_VERSION:
            return base_version(lineage, VersionState.RETIRED)
        return None

    def ancestors(self, version: PolicyVersion) -> list[PolicyVersion]:
        """The versions that it was trained from, its parent first and the base last."""
        known = {v.number: v for v in self.versions(version.lineage)}
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
            .join(t.turns, t.turns.c.id == s.turn)
            .where(s.lineage == lineage, s.trained_in == number)
            .order_by(t.turns.c.seq)
        )
        with self._read() as connection:
            rows = connection.execute(query).all()
            packed = b"".join(row.hinted_prompt_ids or b"" for row in rows)
            bodies = load_bodies(connection, hashes(packed))
            return [(row.turn, verdict_of(row, bodies)) for row in rows]

    def score_counts(self, lineage: str, numbers: Sequence[int]) -> dict[int, ScoreCounts]:
        """The verdicts on the turns that each of the versions has served."""
        s = t.samples.c
        query = (
            sa.select(s.policy_version, t.verdicts.c.score, sa.func.count())
            .join(t.verdicts, t.verdicts.c.turn == s.turn)
            .where(s.lineage == lineage, s.policy_version.in_(numbers))
            .group_by(s.policy_version, t.verdicts.c.score)
        )
        found = dict.fromkeys(numbers, ScoreCounts())
        fields = {1: "good", 0: "neutral", -1: "bad"}
        with self._read() as connection:
            for number, score, count in connection.execute(query):
                found[number] += ScoreCounts(**{fields[score]: count})
        return found

    def serving(self, lineage: str) -> PolicyVersion:
        """The version that serves the lineage: the base until a first one is published."""
        v = t.versions.c
        with self._read() as connection:
            row = connection.execute(
                sa.select(t.versions).where(v.lineage == lineage, v.state == VersionState.SERVING)
            ).first()
        return base_version(lineage, VersionState.SERVING) if row is None else version_of(row)

    def serving_versions(self, lineages: Sequence[str]) -> dict[str, PolicyVersion]:
        """The version that serves each of the lineages."""
        v = t.versions.c
        query = sa.select(t.versions).where(v.state == VersionState.SERVING)
        with self._read() as connection:
            found = {row.lineage: version_of(row) for row in connection.execute(query)}
        base = VersionState.SERVING
        return {name: found.get(name) or base_version(name, base) for name in lineages}

    def set_serving(self, lineage: str, number: int) -> None:
        """Flips the lineage to `number`; the version that served is retired."""
        with self._write() as connection:
            _set_state(connection, lineage, _SERVING, VersionState.RETIRED)
            _set_state(connection, lineage, t.versions.c.number == number, VersionState.SERVING)

    def replace_serving(self, rejected: PolicyVersion, number: int) -> bool:
        """Flips from `rejected`, which keeps its reason, to `number`.

        False, and nothing is changed, if another version serves by now.
        """
        v = t.versions.c
        with self._write() as connection:
            ours = sa.and_(v.number == rejected.number, _SERVING)
            if not _set_state(
                connection, rejected.lineage, ours, VersionState.REJECTED, rejected.reason
            ):
                return False
            _set_state(connection, rejected.lineage, v.number == number, VersionState.SERVING)
        return True

    def reject_version(self, lineage: str, number: int, reason: str) -> None:
        """Marks a version that must not come into service, and why."""
        with self._write() as connection:
            chosen = t.versions.c.number == number
            _set_state(connection, lineage, chosen, VersionState.REJECTED, reason)

    # The proxy's workers

    def beat(self, worker: str, adapters: Sequence[str], counts: Mapping[str, int]) -> None:
        """Says that a worker lives, which adapters it uses and what it has counted."""
        values = {
            "beat": self._clock(),
            "adapters": dump(list(adapters)),
            "counts": dump(dict(counts)),
        }
        w = t.workers
        with self._write() as connection:
            done = connection.execute(sa.update(w).where(w.c.id == worker).values(values))
            if not done.rowcount:
                connection.execute(sa.insert(w).values(id=worker, **values))

    def leave(self, worker: str) -> None:
        """Says that a worker has ended."""
        with self._write() as connection:
            connection.execute(sa.delete(t.workers).where(t.workers.c.id == worker))

    def others(self, worker: str) -> list[tuple[list[str], dict[str, int]]]:
        """What each other living worker said last: the adapters it uses, and its counts."""
        w = t.workers.c
        query = sa.select(w.adapters, w.counts)
        alive = query.where(w.id != worker, w.beat >= self._clock() - _SILENT_S)
        with self._read() as connection:
            return [tuple(map(orjson.loads, row)) for row in connection.execute(alive)]


def base_version(lineage: str, state: VersionState) -> PolicyVersion:
    """Version 0 of a lineage: the base model without an adapter."""
    return PolicyVersion(lineage, BASE_VERSION, None, None, None, 0, state)


_SAMPLES = (
    sa.select(t.turns, t.verdicts.c.score, t.verdicts.c.hinted_prompt_ids)
    .join(t.samples, t.samples.c.turn == t.turns.c.id)
    .join(t.verdicts, t.verdicts.c.turn == t.turns.c.id)
)


def _samples(connection: sa.Connection, query: sa.Select[Any]) -> list[Sample]:
    """The samples of a query that begins as `_SAMPLES` does."""
    rows = connection.execute(query).all()
    packed = (part or b"" for row in rows for part in (row.prompt_ids, row.hinted_prompt_ids))
    bodies = load_bodies(connection, hashes(b"".join(packed)))
    return [sample_of(row, bodies) for row in rows]


_SERVING = t.versions.c.state == VersionState.SERVING


def _set_state(
    connection: sa.Connection,
    lineage: str,
    chosen: sa.ColumnElement[bool],
    state: VersionState,
    reason: str | None = None,
) -> int:
    """Changes the state of versions, and the reason where there is one; returns how many."""
    values = {"state": state} if reason is None else {"state": state, "reason": reason}
    query = sa.update(t.versions).where(t.versions.c.lineage == lineage, chosen)
    return connection.execute(query.values(**values)).rowcount


def _usable(lineage: str, scored: bool, hinted: bool) -> tuple[sa.ColumnElement[bool], ...]:
    s = t.samples.c
    signals = [s.score != 0] * scored + [s.hinted] * hinted
    return s.lineage == lineage, s.state == SampleState.READY, sa.or_(*signals)


def _put_sample(
    connection: sa.Connection, turn: sa.Row[str, int | None, str | None], verdict: Verdict
) -> None:
    reason = turn.untrainable
    if reason is None and turn.policy_version is None:
        reason = "served by a model that is not a version of this lineage"
    if reason is None and verdict.score == 0 and verdict.hinted_prompt_ids is None:
        reason = "score 0 without a hint teaches nothing"
    values = {
        "lineage": turn.lineage,
        "state": SampleState.READY if reason is None else SampleState.DROPPED,
        "policy_version": turn.policy_version,
        "score": verdict.score,
        "hinted": verdict.hinted_prompt_ids is not None,
        "reason": reason,
    }
    s = t.samples.c
    state = connection.execute(sa.select(s.state).where(s.turn == verdict.turn)).scalar()
    if state is None:
        connection.execute(sa.insert(t.samples).values(turn=verdict.turn, **values))
    elif state in (SampleState.READY, SampleState.DROPPED, SampleState.HELD):
        # What was held out is ready only until the learner looks: before it leases, it holds out.
        connection.execute(sa.update(t.samples).where(s.turn == verdict.turn).values(**values))
