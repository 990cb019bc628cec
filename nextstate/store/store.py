"""Where the stages meet: every record, and the work that is leased from them.

The only module with queries. All methods are synchronous and safe to call from several threads and
processes; asynchronous callers use `asyncio.to_thread`. Work is leased with an expiry and settled,
never deleted on fetch.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from heapq import merge
from types import FunctionType, SimpleNamespace
from typing import Any, TypeVar, cast

import orjson
import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError

from nextstate.config import StoreConfig
from nextstate.errors import StoreError
from nextstate.private_files import make_state_folder
from nextstate.records import (
    BASE_VERSION,
    Feedback,
    NextState,
    PolicyVersion,
    Sample,
    SampleState,
    ScoreCounts,
    Source,
    Turn,
    TurnKind,
    Verdict,
    VersionState,
)
from nextstate.store import schema as t
from nextstate.store.counts import SHOWN
from nextstate.store.migrations import is_current, migrate
from nextstate.store.recording import Prepared, Recording, Remembered
from nextstate.store.rows import (
    dump,
    hashes,
    load_bodies,
    load_verdict,
    next_states_of,
    sample_of,
    turn_of,
    verdict_of,
    version_of,
    version_row,
)
from nextstate.store.settling import (
    Reception,
    feedback_of,
    give_feedback,
    judge_anew,
    settle_feedback,
    settle_verdict,
)
from nextstate.store.shares import LOOKED_AT, fair_share
from nextstate.store.sqlite import begin_writing, checkpoint, file_of, is_damaged, open_file
from nextstate.store.waiting import Patience

BUDGET_S = 3600.0
"""The window of the judge's budget."""
_MOST_STEPS = 32
_READ_AHEAD = 8
"""Rows that are fetched before it is known whether more are wanted."""
_AT_ONCE = 500
"""Rows of one statement."""
_SILENT_S = 10.0
"""A worker that says nothing for so long is taken for dead."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A leased turn with what the judge may know of it."""

    turn: Turn
    next_states: tuple[NextState, ...]
    later: tuple[NextState, ...]
    """What the user said when the turn's task ended, where that speaks about this turn."""
    task_end: str | None
    """The turn that `later` followed."""
    attempts: int
    """How many times the turn has been leased, this time included."""
    feedback: Feedback | None = None
    """What a person said of it: then nobody votes."""


T = TypeVar("T")


def _patient(store: type[T]) -> type[T]:
    """Lets every public method of the class wait for the database, as its `Patience` says."""

    def waiting(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def patiently(self: Store, *args: Any, **kwargs: Any) -> Any:
            return self.waiting(lambda: method(self, *args, **kwargs))

        return patiently

    for name, method in list(vars(store).items()):
        if isinstance(method, FunctionType) and not name.startswith("_") and name != "waiting":
            setattr(store, name, waiting(method))
    return store


@_patient
class Store:
    """The database behind one state folder; see the module.

    A method is one transaction. Where the database is locked or its disk is full, it is tried again
    until `patience` ends with a WaitError.
    """

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float] = time.time,
        patience: Patience | None = None,
    ) -> None:
        self._clock = clock
        self._patience = patience or Patience()
        self.dir = config.path
        self.config = replace(config, dir=str(self.dir))
        """What another process opens the same store with, whatever its working directory."""
        self._file = file_of(config.url, self.dir)
        try:
            self.waiting(self._open)
        except (OSError, ValueError, DatabaseError) as error:
            raise StoreError(
                f"[store] dir = {config.dir!r} cannot hold the store: {error}; "
                "name a folder that you may write to"
            ) from error
        self._known = Remembered()
        self._idle: list[sa.PoolProxiedConnection] = []
        """Driver connections that nobody uses: to take one out of the pool, to look after it and to
        put it back takes as long as the statements of a turn."""
        serving = t.versions.c.state == VersionState.SERVING
        self._serving = Prepared(sa.select(t.versions).where(serving), self._db.dialect)

    def _open(self) -> None:
        make_state_folder(self.dir)
        self._db = open_file(self._file)
        with self._read() as connection:
            if is_current(connection):
                return
        with self._write() as connection:
            try:
                migrate(connection)
            except StoreError as error:
                raise StoreError(f"{self._file}: {error}") from error

    def waiting(self, work: Callable[[], T]) -> T:
        """The result of `work`, which is one transaction, once the database lets it.

        Raises WaitError, and StoreError for a database that is damaged.
        """
        try:
            return self._patience.run(work)
        except DatabaseError as error:
            if not is_damaged(error):
                raise
            raise StoreError(
                f"{self._file} is no whole SQLite database: {error.orig}; it is left as it is: "
                "put a whole copy in its place, or move it away to begin with an empty store"
            ) from error

    def close(self) -> None:
        """Closes every connection."""
        while self._idle:
            self._idle.pop().close()
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

    @contextmanager
    def _driver(self) -> Generator[sa.PoolProxiedConnection]:
        """The driver's own connection, for what is done so often that SQLAlchemy takes longer."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._db.raw_connection()
        try:
            yield connection
        except BaseException:
            connection.close()  # and roll back
            raise
        self._idle.append(connection)

    # Recording

    @contextmanager
    def recording(self) -> Generator[Recording]:
        """One transaction in which turns are linked and added; all of them are kept or none."""
        with self._driver() as connection, closing(connection.cursor()) as cursor:
            begin_writing(cursor)
            recording = Recording(cursor, self._db.dialect, self._known)
            yield recording
            connection.commit()
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
            return load_verdict(connection, turn_id)

    def feedback(self, turn_id: str) -> Feedback | None:
        """What a person said last of the turn, or None."""
        with self._read() as connection:
            return feedback_of(connection, turn_id)

    def newest_turn(
        self, names: Sequence[str], lineages: Sequence[str] | None = None
    ) -> str | None:
        """The newest main turn of the sessions that have one of `names`; None without any.

        A name is ours for a session, or the client's own, which may stand for several of them.
        Only turns of `lineages` count, if given; none that a retry stands for.
        """
        c = t.turns.c
        counting = [c.kind == TurnKind.MAIN, c.replaced_by.is_(None)]
        if lineages is not None:
            counting.append(c.lineage.in_(lineages))
        # Each name by itself is the end of an index; all of them together would have to be sorted.
        found: list[tuple[int, str]] = []
        with self._read() as connection:
            for name in names:
                for column, order in ((c.session, c.idx), (c.client_session, c.seq)):
                    query = sa.select(c.seq, c.id).where(column == name, *counting)
                    newest = connection.execute(query.order_by(order.desc()).limit(1)).first()
                    found += [] if newest is None else [(newest.seq, newest.id)]
        return max(found)[1] if found else None

    def labels(self) -> dict[str, dict[tuple[int, int], int]]:
        """How many turns have both, by judge and (what a person said, what the votes came to)."""
        found: dict[str, dict[tuple[int, int], int]] = {}
        with self._read() as connection:
            for key, count in _counts(connection, "labels"):
                judge, said, voted = key.rsplit("/", 2)
                found.setdefault(judge, {})[int(said), int(voted)] = count
        return found

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
        with self._read() as connection:
            found = {f"{a}/{key}": n for a in SHOWN for key, n in _counts(connection, a)}
        return {"turns/trainable": 0} | found

    # The judge's work

    def lease_judgements(self, limit: int, lease_s: float) -> list[str]:
        """Leases up to `limit` turns to judge; an expired lease is leased again.

        Oldest first: of those that were never put back, and of those that wait again for longest.
        """
        now = self._clock()
        j = t.judgements.c
        pending = sa.select(j.seq, j.turn).where(j.state == "pending")
        expired = sa.select(j.seq, j.turn).where(j.state == "leased", j.lease_until < now)
        due = (  # each in the order of the index, so that none needs to be sorted
            pending.where(j.not_before == 0.0).order_by(j.seq),
            pending.where(j.not_before > 0.0, j.not_before <= now).order_by(j.not_before),
            expired,
        )
        with self._write() as connection:
            found = [tuple(r) for q in due for r in connection.execute(q.limit(limit))]
            ids = [turn_id for _, turn_id in sorted(found)[:limit]]
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

    def judgement(self, turn_id: str) -> Judgement | None:
        """What there is to judge of a leased turn; None when the turn is gone."""
        j = t.judgements.c
        with self._read() as connection:
            row = connection.execute(sa.select(t.turns).where(t.turns.c.id == turn_id)).first()
            work = connection.execute(
                sa.select(j.attempts, j.task_end).where(j.turn == turn_id)
            ).first()
            if row is None or work is None:
                return None
            later = () if work.task_end is None else next_states_of(connection, work.task_end)
            return Judgement(
                turn_of(connection, row),
                next_states_of(connection, turn_id),
                tuple(state for state in later if state.source is Source.USER),
                work.task_end,
                work.attempts,
                feedback_of(connection, turn_id),
            )

    def earlier_steps(self, turn_id: str) -> list[str]:
        """The turns of the same task before this one, newest first.

        A task is what happened between two messages of a user: every turn before the last one was
        followed by tools or the environment only.
        """
        c, n = t.turns.c, t.next_states.c
        found: list[str] = []
        with self._read() as connection:
            above = sa.select(c.parent).where(c.id == sa.bindparam("turn"))
            sources = sa.select(n.source).where(n.turn == sa.bindparam("turn"))
            last: str | None = turn_id
            while len(found) < _MOST_STEPS:
                last = connection.execute(above, {"turn": last}).scalar()
                if last is None:
                    break
                said = set(connection.execute(sources, {"turn": last}).scalars())
                if not said or said & {Source.USER, Source.FEEDBACK}:
                    break
                found.append(last)
        return found

    def settle_verdict(
        self, verdict: Verdict, *, task_end: str | None = None, meant: Sequence[str] = ()
    ) -> bool:
        """Keeps the verdict and makes its sample; False when the turn has another one already.

        A vote that knew the end of the turn's task, `task_end`, replaces one that did not, unless
        the sample is trained or being trained. `meant` are earlier steps that this turn's next
        state speaks about too: they are judged anew, with it as evidence, unless they are trained
        or a person has judged them.

        With `FEEDBACK` as its judge it only adds the hinted prompt to what a person said, and is
        False if that is not, or no longer, the turn's verdict.
        """
        with self._write() as connection:
            settled = settle_verdict(connection, verdict, task_end, self._clock())
            if settled and meant:
                judge_anew(connection, meant, verdict.turn)
        return settled

    def give_feedback(self, feedback: Feedback) -> Reception:
        """Keeps what a person says of a turn and settles it, unless it is trained or being trained.

        The last word counts; the same again changes nothing. A hint opens the judge's work again,
        which renders the hinted prompt. Raises StoreError when there is no such turn.
        """
        with self._write() as connection:
            return give_feedback(connection, feedback, self._clock())

    def spend(self, calls: int, tokens: int) -> None:
        """Notes what judging a turn has cost; what is an hour old is forgotten."""
        now = self._clock()
        with self._write() as connection:
            old = t.spending.c.at < now - BUDGET_S
            connection.execute(sa.delete(t.spending).where(old))
            connection.execute(sa.insert(t.spending).values(at=now, calls=calls, tokens=tokens))

    def spent(self) -> tuple[int, int]:
        """(calls, tokens) that judging has cost in the last hour."""
        s = t.spending.c
        with self._read() as connection:
            query = sa.select(sa.func.sum(s.calls), sa.func.sum(s.tokens))
            calls, tokens = connection.execute(query.where(s.at >= self._clock() - BUDGET_S)).one()
        return calls or 0, tokens or 0

    # The learner's work

    def ready_samples(self, lineage: str, scored: bool, hinted: bool) -> int:
        """How many samples wait that carry a score (`scored`) or a hinted prompt (`hinted`)."""
        with self._read() as connection:
            ready = _ready(connection, lineage)
        return sum(n for (_, *kind), n in ready.items() if _usable(kind, scored, hinted))

    def lease_samples(
        self, lineage: str, limit: int, batch: str, lease_s: float, *, scored: bool, hinted: bool
    ) -> list[Sample]:
        """Leases `limit` usable samples under the name `batch`: of the newest versions first.

        Where turns come faster than the learner takes them, the freshest are the most on-policy;
        the rest stays ready until its lag is too large (`drop_stale`). No session gives more than
        half of a batch while others have some that wait (`nextstate/store/shares.py`).
        """
        s = t.samples.c
        with self._read() as connection:
            waiting = _freshest(connection, lineage, limit * LOOKED_AT, scored, hinted)
            chosen = fair_share(waiting, limit)
        with self._write() as connection:
            connection.execute(
                sa.update(t.samples)
                .where(s.turn.in_(chosen), s.state == SampleState.READY)
                .values(state=SampleState.LEASED, batch=batch, lease_until=self._clock() + lease_s)
            )
            ours = _SAMPLES.where(s.turn.in_(chosen), s.batch == batch)
            found = {sample.turn: sample for sample in _samples(connection, ours)}
        return [found[turn_id] for turn_id in chosen if turn_id in found]

    def hold_out(self, lineage: str, chosen: Callable[[str], bool]) -> int:
        """Keeps the ready samples of the sessions that are `chosen` from training, for good.

        Returns how many.
        """
        s = t.samples.c
        ready = (s.lineage == lineage, s.state == SampleState.READY)
        with self._read() as connection:
            query = sa.select(s.turn, t.turns.c.session).join(t.turns, s.turn == t.turns.c.id)
            found = connection.execute(query.where(*ready)).all()
        sessions = {session for _, session in found}
        held = {session for session in sessions if chosen(session)}
        turns = [turn_id for turn_id, session in found if session in held]
        done = 0
        for start in range(0, len(turns), _AT_ONCE):
            some = s.turn.in_(turns[start : start + _AT_ONCE])
            with self._write() as connection:
                values = sa.update(t.samples).where(*ready, some).values(state=SampleState.HELD)
                done += connection.execute(values).rowcount
        return done

    def trained_sessions(self, lineage: str) -> frozenset[str]:
        """The sessions of the samples that have trained."""
        s = t.samples.c
        query = sa.select(t.turns.c.session).join(t.samples, s.turn == t.turns.c.id).distinct()
        trained = query.where(s.lineage == lineage, s.state == SampleState.TRAINED)
        with self._read() as connection:
            return frozenset(connection.execute(trained).scalars())

    def held_samples(self, lineage: str, limit: int, per_session: int) -> list[Sample]:
        """The newest `limit` samples that are held out, newest first.

        Of each session only its newest `per_session`, so that one long session is not all there is.
        """
        s = t.samples.c
        query = (
            sa.select(s.turn, t.turns.c.session)
            .join(t.turns, t.turns.c.id == s.turn)
            .where(s.lineage == lineage, s.state == SampleState.HELD)
            .order_by(s.seq.desc())
        )
        chosen: list[str] = []
        of_session = Counter[str]()
        with self._read() as connection:
            for turn_id, session in connection.execute(query):
                of_session[session] += 1
                if of_session[session] <= per_session:
                    chosen.append(turn_id)
                if len(chosen) == limit:
                    break
            found = {x.turn: x for x in _samples(connection, _SAMPLES.where(s.turn.in_(chosen)))}
        return [found[turn_id] for turn_id in chosen]

    def release_samples(self, lineage: str) -> int:
        """Makes leased samples ready again: for a learner that starts and knows it is alone.

        What a person said meanwhile of one of them now counts.
        """
        s = t.samples.c
        leased = s.lineage == lineage, s.state == SampleState.LEASED
        with self._write() as connection:
            spoken_of = sa.select(s.turn).join(t.feedback, t.feedback.c.turn == s.turn)
            turns = connection.execute(spoken_of.where(*leased)).scalars().all()
            done = connection.execute(
                sa.update(t.samples)
                .where(*leased)
                .values(state=SampleState.READY, batch=None, lease_until=None)
            )
            for turn_id in turns:
                settle_feedback(connection, turn_id, self._clock())
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
            versions = {version for version, _, _ in _ready(connection, lineage)}
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
            .where(s.lineage == lineage, s.trained_in == number)
            .order_by(s.seq)
        )
        with self._read() as connection:
            rows = connection.execute(query).all()
            packed = b"".join(row.hinted_prompt_ids or b"" for row in rows)
            bodies = load_bodies(connection, hashes(packed))
            return [(row.turn, verdict_of(row, bodies)) for row in rows]

    def score_counts(self, lineage: str, numbers: Sequence[int]) -> dict[int, ScoreCounts]:
        """The verdicts on the turns that each of the versions has served."""
        found = dict.fromkeys(numbers, ScoreCounts())
        fields = {1: "good", 0: "neutral", -1: "bad"}
        c = t.counts.c
        keys = {
            f"{lineage}/{n}/{score}": (n, field) for n in numbers for score, field in fields.items()
        }
        query = sa.select(c.key, c.count).where(c.area == "scores", c.key.in_(keys))
        with self._read() as connection:
            for key, count in connection.execute(query):
                number, field = keys[key]
                found[number] += ScoreCounts(**{field: count})
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
        """The version that serves each of the lineages: a proxy asks 20 times a second."""
        with self._driver() as connection, closing(connection.cursor()) as cursor:
            cursor.execute(self._serving.sql, self._serving.arguments({}))
            names = [column[0] for column in cursor.description]
            rows = [
                SimpleNamespace(**dict(zip(names, row, strict=True))) for row in cursor.fetchall()
            ]
        found = {row.lineage: version_of(row) for row in rows}
        base = VersionState.SERVING
        return {name: found.get(name) or base_version(name, base) for name in lineages}

    def set_serving(self, lineage: str, number: int) -> None:
        """Flips the lineage to `number`, which a person chose; the version that served is retired.

        So is a candidate that waits for its publication: it was made before they chose.
        """
        v = t.versions.c
        waiting = sa.and_(v.state == VersionState.CANDIDATE, v.number != number)
        with self._write() as connection:
            _set_state(connection, lineage, _SERVING, VersionState.RETIRED)
            _set_state(connection, lineage, waiting, VersionState.RETIRED, _passed_over(number))
            _set_state(connection, lineage, v.number == number, VersionState.SERVING)

    def serve_candidate(self, version: PolicyVersion) -> bool:
        """Flips from the version's parent to it; True as well if it serves already.

        False if it is `overtaken`.
        """
        v = t.versions.c
        with self._write() as connection:
            if _retire_overtaken(connection, version, *_standing(connection, version)):
                return False
            _set_state(connection, version.lineage, _SERVING, VersionState.RETIRED)
            ours = v.number == version.number
            _set_state(connection, version.lineage, ours, VersionState.SERVING)
        return True

    def overtaken(self, version: PolicyVersion) -> bool:
        """Whether training must not put this version into service, as another one was chosen.

        That is a candidate whose parent no longer serves, which is retired here, and one that was
        retired or rejected before.
        """
        with self._write() as connection:
            return _retire_overtaken(connection, version, *_standing(connection, version))

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

    def reject_version(self, lineage: str, number: int, reason: str) -> bool:
        """Marks a version that must not come into service, and why.

        False, and nothing is changed, if it serves by now.
        """
        with self._write() as connection:
            chosen = sa.and_(t.versions.c.number == number, sa.not_(_SERVING))
            return _set_state(connection, lineage, chosen, VersionState.REJECTED, reason) > 0

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
    o = t.other_hints.c
    others: dict[str, list[bytes]] = {row.id: [] for row in rows}
    further = sa.select(o.turn, o.prompt_ids).where(o.turn.in_(others)).order_by(o.turn, o.seq)
    for turn_id, prompt_ids in connection.execute(further):
        others[turn_id].append(prompt_ids)
    parts = (
        part or b""
        for row in rows
        for part in (row.prompt_ids, row.hinted_prompt_ids, *others[row.id])
    )
    bodies = load_bodies(connection, hashes(b"".join(parts)))
    return [sample_of(row, bodies, others[row.id]) for row in rows]


_SERVING = t.versions.c.state == VersionState.SERVING


def _standing(connection: sa.Connection, version: PolicyVersion) -> tuple[str | None, int]:
    """The state of a version, and the number of the one that serves its lineage."""
    v = t.versions.c
    ours = v.number == version.number
    query = sa.select(v.number, v.state).where(v.lineage == version.lineage, ours | _SERVING)
    states = {row.number: row.state for row in connection.execute(query)}
    serving = [number for number, state in states.items() if state == VersionState.SERVING]
    return states.get(version.number), next(iter(serving), BASE_VERSION)


def _retire_overtaken(
    connection: sa.Connection, version: PolicyVersion, state: str | None, serving: int
) -> bool:
    """See `Store.overtaken`; `state` and `serving` are the version's `_standing`."""
    if state != VersionState.CANDIDATE:
        return state != VersionState.SERVING
    if serving == version.parent:
        return False
    ours = t.versions.c.number == version.number
    _set_state(connection, version.lineage, ours, VersionState.RETIRED, _passed_over(serving))
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
    """Changes the state of versions, and the reason where there is one; returns how many."""
    values = {"state": state} if reason is None else {"state": state, "reason": reason}
    query = sa.update(t.versions).where(t.versions.c.lineage == lineage, chosen)
    return connection.execute(query.values(**values)).rowcount


def _counts(connection: sa.Connection, area: str, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The counts of an area; of those keys that begin with `prefix`, which ends with a slash."""
    c = t.counts.c
    query = sa.select(c.key, c.count.label("count_")).where(c.area == area)
    if prefix:
        query = query.where(c.key > prefix, c.key < prefix[:-1] + "0")  # what follows the slash
    for row in connection.execute(query):
        yield row.key, row.count_


def _ready(connection: sa.Connection, lineage: str) -> dict[tuple[int, int, int], int]:
    """How many samples are ready, by version, score and whether there is a hinted prompt."""
    found = _counts(connection, "ready", f"{lineage}/")
    kinds = {tuple(map(int, key.rsplit("/", 3)[1:])): count for key, count in found}
    return cast("dict[tuple[int, int, int], int]", kinds)


def _usable(kind: Sequence[int], scored: bool, hinted: bool) -> bool:
    score, has_hint = kind
    return bool((scored and score) or (hinted and has_hint))


def _freshest(
    connection: sa.Connection, lineage: str, limit: int, scored: bool, hinted: bool
) -> Iterator[tuple[str, str]]:
    """(turn, session) of usable samples: of the newest version first, of each the oldest first.

    They are read in the order of the index as they are asked for, at most `limit` of each kind.
    """
    s = t.samples.c
    kinds = [kind for kind in _ready(connection, lineage) if _usable(kind[1:], scored, hinted)]

    def waiting(version: int, score: int, has_hint: int) -> Iterator[sa.Row[*tuple[Any, ...]]]:
        query = sa.select(s.seq, s.turn, t.turns.c.session).where(
            t.turns.c.id == s.turn,
            s.lineage == lineage,
            s.state == SampleState.READY,
            s.policy_version == version,
            s.score == score,
            s.hinted == bool(has_hint),
        )
        some = query.order_by(s.seq).limit(limit).execution_options(yield_per=_READ_AHEAD)
        return iter(connection.execute(some))

    for version in sorted({kind[0] for kind in kinds}, reverse=True):
        of_kind = [waiting(*kind) for kind in kinds if kind[0] == version]
        yield from ((row.turn, row.session) for row in merge(*of_kind, key=lambda row: row.seq))
