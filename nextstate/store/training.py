"""The learner's work: which samples are ready, leased, held out and dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from heapq import merge
from typing import Any

import sqlalchemy as sa

from nextstate.records import Sample, SampleState
from nextstate.sampling import Sampling
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.counts import read_counts
from nextstate.store.database import Database, queries
from nextstate.store.packing import join_runs, unpack_floats, unpack_ids
from nextstate.store.settling import settle_feedback
from nextstate.store.shares import (
    LOOKED_AT,
    REMEMBERED,
    REMEMBERED_S,
    Waiting,
    allotted,
    fair_share,
)
from nextstate.store.turns import turn_values
from nextstate.wire import read_json

_READ_AHEAD = 8
"""Rows that are fetched before it is known whether more are needed."""
_PER_STATEMENT = 500
_Kind = tuple[str, int, int, int]
"""Of a sample: its client, version, score and whether it has a hinted prompt."""


_ENDS = sa.union_all(
    sa.select(
        sa.literal_column("''", sa.String).label("key"),
        sa.literal_column("0", sa.Integer).label("count_"),
        sa.func.coalesce(sa.func.max(t.ledger.c.seq), 0).label("seq"),
    ),
    sa.select(
        t.counts.c.key,
        t.counts.c.count.label("count_"),
        sa.literal_column("0", sa.Integer).label("seq"),
    ).where(t.counts.c.area == "ready"),
).subquery()
_NEWS = sa.select(_ENDS)


@queries
class Training:
    """Queries for samples."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def ready_samples(self, lineage: str, scored: bool, hinted: bool) -> int:
        """How many samples wait that carry a score (`scored`) or a hinted prompt (`hinted`)."""
        with self._database.read() as connection:
            ready = _ready(connection, lineage)
        return sum(_by_client(ready, scored, hinted).values())

    def ready_by_version(self, lineage: str) -> dict[int, int]:
        """How many samples wait, by the policy version that answered."""
        found: dict[int, int] = {}
        with self._database.read() as connection:
            for (_, version, *_), count in _ready(connection, lineage).items():
                found[version] = found.get(version, 0) + count
        return found

    def allotted(self, lineage: str, limit: int, scored: bool, hinted: bool) -> dict[str, int]:
        """How many usable samples of each client a batch of `limit` may have now."""
        with self._database.read() as connection:
            ready = _ready(connection, lineage)
            given = _by_client(ready, scored, hinted)
            return allotted(given, self._known(connection, lineage), limit)

    def news(self) -> tuple[int, tuple[tuple[str, int], ...]]:
        """What changes whenever a learner may have more to do than before, in one statement.

        It is of the ledger, which tells of every version and decision, and of the samples that
        wait.
        """
        with self._database.cursor(write=False) as cursor:
            found = cursor.all(_NEWS)
        return sum(row.seq for row in found), tuple(
            sorted((row.key, row.count_) for row in found if row.key)
        )

    def held_back(self, lineage: str, limit: int, scored: bool, hinted: bool) -> dict[str, int]:
        """How many usable samples wait by client, if they were a batch but for the shares."""
        with self._database.read() as connection:
            given = _by_client(_ready(connection, lineage), scored, hinted)
            known = self._known(connection, lineage)
        enough = sum(given.values()) >= limit > sum(allotted(given, known, limit).values())
        return given if enough else {}

    def lease_samples(
        self, lineage: str, limit: int, batch: str, *, scored: bool, hinted: bool
    ) -> list[Sample]:
        """Leases `limit` usable samples under the name `batch`: of the newest versions first.

        Where turns come faster than the learner takes them, the newest are the most on-policy;
        the others stay ready until their lag is too large (`drop_stale`). What a session and a
        client give is limited (`nextstate/store/shares.py`). An episode trains whole: the others
        of its steps that wait come with the chosen ones, beyond `limit`.
        """
        s = t.samples.c
        most = limit * LOOKED_AT
        of_client: dict[str, list[str]] = {}
        with self._database.read() as connection:
            ready = _ready(connection, lineage)
            for client in sorted(_by_client(ready, scored, hinted)):
                kinds = [kind[1:] for kind in ready if kind[0] == client]
                kinds = [kind for kind in kinds if _usable(kind[1:], scored, hinted)]
                with closing(_freshest(connection, lineage, client, kinds, most)) as waiting:
                    of_client[client] = fair_share(waiting, limit)
            found = {client: len(turns) for client, turns in of_client.items()}
            given = allotted(found, self._known(connection, lineage), limit)
            chosen = [turn for client, n in given.items() for turn in of_client[client][:n]]
            chosen += _siblings(connection, lineage, chosen, scored, hinted)
        ours = s.lineage == lineage, s.state == SampleState.LEASED, s.batch == batch
        with self._database.write() as connection:
            # Those that it leased when it was called before and the answer was lost.
            known = connection.execute(sa.select(s.turn).where(*ours)).scalars()
            if found := known.all():
                return _load_samples(connection, found)
            connection.execute(
                sa.update(t.samples)
                .where(s.turn.in_(chosen), s.state == SampleState.READY)
                .values(state=SampleState.LEASED, batch=batch)
            )
            return _load_samples(connection, chosen, s.batch == batch)

    def is_leased(self, lineage: str, batch: str) -> bool:
        """Whether samples are leased under the name `batch`."""
        s = t.samples.c
        ours = s.lineage == lineage, s.state == SampleState.LEASED, s.batch == batch
        with self._database.read() as connection:
            return connection.execute(sa.select(s.turn).where(*ours).limit(1)).first() is not None

    def leased_count(self, lineage: str) -> int:
        """How many samples an update has."""
        s = t.samples.c
        ours = s.lineage == lineage, s.state == SampleState.LEASED
        with self._database.read() as connection:
            query = sa.select(sa.func.count()).select_from(t.samples).where(*ours)
            return connection.execute(query).scalar_one()

    def _known(self, connection: sa.Connection, lineage: str) -> set[str]:
        """The clients that gave something to the last versions."""
        s, v = t.samples.c, t.versions.c
        since = self._database.now() - REMEMBERED_S
        newest = sa.select(v.number).where(v.lineage == lineage, v.created_at > since)
        numbers = connection.execute(newest.order_by(v.number.desc()).limit(REMEMBERED))
        gave = sa.select(s.client).where(s.lineage == lineage, s.trained_in.in_(numbers.scalars()))
        return {*connection.execute(gave.distinct()).scalars()}

    def begin_holding_out(self, lineage: str) -> frozenset[str]:
        """Lets `hold_out` look at every ready sample again: for a learner that starts.

        Returns the sessions that have trained, which should never be held out.
        """
        s = t.samples.c
        ours = s.lineage == lineage
        looked_at = sa.update(t.samples).where(
            ours, s.state == SampleState.READY, s.screened.is_not(None)
        )
        query = sa.select(t.turns.c.session).join(t.samples, s.turn == t.turns.c.id).distinct()
        with self._database.write() as connection:
            connection.execute(looked_at.values(screened=None))
        with self._database.read() as connection:  # it may be long: nobody waits for it
            trained = connection.execute(query.where(ours, s.state == SampleState.TRAINED))
            return frozenset(trained.scalars())

    def hold_out(self, lineage: str, chosen: Callable[[str], bool]) -> int:
        """Keeps the ready samples of the sessions that are `chosen` from training, for good.

        It looks at each sample once, so its cost does not grow with those that wait. Returns how
        many it held out.
        """
        s = t.samples.c
        ready = (s.lineage == lineage, s.state == SampleState.READY)
        query = sa.select(s.turn, t.turns.c.session).join(t.turns, s.turn == t.turns.c.id)
        query = query.where(*ready, s.screened.is_(None)).order_by(s.seq).limit(_PER_STATEMENT)
        held = 0
        while True:
            with self._database.read() as connection:
                rows = connection.execute(query).all()
            if not rows:
                return held
            sessions = {session for session in {row.session for row in rows} if chosen(session)}
            with self._database.write() as connection:
                for is_held in (False, True):
                    turns = [row.turn for row in rows if (row.session in sessions) == is_held]
                    values = {"state": SampleState.HELD} if is_held else {"screened": True}
                    update = sa.update(t.samples).where(*ready, s.turn.in_(turns)).values(values)
                    held += connection.execute(update).rowcount * is_held

    def held_samples(self, lineage: str, limit: int, per_session: int) -> list[Sample]:
        """The newest `limit` samples that are held out, newest first.

        Of each session only its newest `per_session`, so that no long session fills them alone, and
        of each client beside others its share, as in a version (`allotted`).
        """
        s = t.samples.c
        query = (
            sa.select(s.turn, t.turns.c.session, s.client)
            .join(t.turns, t.turns.c.id == s.turn)
            .where(s.lineage == lineage, s.state == SampleState.HELD, s.screened.is_(None))
            .order_by(s.seq.desc())
            .limit(LOOKED_AT * limit)
        )
        found: list[tuple[str, str]] = []
        of_session, of_client = Counter[str](), Counter[str]()
        with self._database.read() as connection:
            waited_for = _held_clients(connection, lineage)
            for row in connection.execute(query):
                of_session[row.session] += 1
                if of_session[row.session] <= per_session:
                    found.append((row.turn, row.client))
                    of_client[row.client] += 1
                    if of_client[row.client] == limit:
                        waited_for.discard(row.client)
                        if not waited_for:
                            break
            given = Counter(allotted(of_client, self._known(connection, lineage), limit))
            chosen: list[str] = []
            for turn, client in found:
                if given[client]:
                    given[client] -= 1
                    chosen.append(turn)
            return _load_samples(connection, chosen)

    def release_samples(self, lineage: str) -> int:
        """Makes leased samples ready again: for a learner that starts and knows it is alone.

        What a person said about one of them meanwhile counts now.
        """
        s = t.samples.c
        leased = s.lineage == lineage, s.state == SampleState.LEASED
        with self._database.write() as connection:
            judged = sa.select(s.turn).join(t.feedback, t.feedback.c.turn == s.turn)
            turns = connection.execute(judged.where(*leased)).scalars().all()
            done = connection.execute(
                sa.update(t.samples).where(*leased).values(state=SampleState.READY, batch=None)
            )
            for turn_id in turns:
                settle_feedback(connection, turn_id, self._database.now())
        return done.rowcount

    def drop_samples(self, turn_ids: Sequence[str], reason: str) -> None:
        """Settles samples that must not train."""
        s = t.samples.c
        with self._database.write() as connection:
            connection.execute(
                sa.update(t.samples)
                .where(s.turn.in_(turn_ids), s.state != SampleState.TRAINED)
                .values(state=SampleState.DROPPED, reason=reason, batch=None)
            )

    def drop_stale(self, lineage: str, reason_for: Callable[[int], str | None]) -> dict[str, int]:
        """Drops ready samples of the versions that `reason_for` gives a reason for.

        Returns how many it dropped for each reason.
        """
        s = t.samples.c
        ready = (s.lineage == lineage, s.state == SampleState.READY)
        with self._database.read() as connection:
            ready_now = _ready(connection, lineage)
        clients = {client for client, *_ in ready_now}
        versions = {version for _, version, *_ in ready_now}
        reasons = {version: reason_for(version) for version in versions}
        stale = {version: reason for version, reason in reasons.items() if reason is not None}
        dropped = Counter[str]()
        if not stale:
            return dropped
        with self._database.write() as connection:
            for version, reason in stale.items():
                done = connection.execute(
                    sa.update(t.samples)
                    .where(*ready, s.client.in_(clients), s.policy_version == version)
                    .values(state=SampleState.DROPPED, reason=reason)
                )
                dropped[reason] += done.rowcount
        return dropped


def _siblings(
    connection: sa.Connection, lineage: str, chosen: Sequence[str], scored: bool, hinted: bool
) -> list[str]:
    """The usable steps of the chosen turns' episodes that are ready and not chosen themselves."""
    s, c = t.samples.c, t.turns.c
    of_chosen = sa.select(c.episode).where(c.id.in_(chosen), c.episode.is_not(None)).distinct()
    episodes = connection.execute(of_chosen).scalars().all()
    if not episodes:
        return []
    steps = sa.select(c.id).where(c.episode.in_(episodes))
    turns = {*connection.execute(steps).scalars()}.difference(chosen)
    query = sa.select(s.seq, s.turn, s.score, s.hinted).where(s.turn.in_(turns))
    ready = query.where(
        s.lineage == lineage, s.state == SampleState.READY, s.policy_version.is_not(None)
    )
    rows = sorted(connection.execute(ready))
    return [row.turn for row in rows if _usable((row.score, row.hinted), scored, hinted)]


def _load_samples(
    connection: sa.Connection, turn_ids: Sequence[str], *where: sa.ColumnElement[bool]
) -> list[Sample]:
    """The samples of those of the turns that are `where`, in the order of `turn_ids`."""
    s, v = t.samples.c, t.verdicts.c
    query = (
        sa.select(t.turns, s.score, s.advantage, t.episodes.c.outcome, v.hinted_prompt_ids)
        .join(t.samples, s.turn == t.turns.c.id)
        .outerjoin(t.verdicts, v.turn == t.turns.c.id)  # not every step of an episode is judged
        .outerjoin(t.episodes, t.episodes.c.id == t.turns.c.episode)
        .where(t.turns.c.id.in_(turn_ids), *where)
    )
    rows = {row.id: row for row in connection.execute(query)}
    parts = (
        part or b"" for row in rows.values() for part in (row.prompt_ids, row.hinted_prompt_ids)
    )
    found = texts.get(connection, texts.hashes(b"".join(parts)))
    opened = {turn_id: turn_values(connection, row) for turn_id, row in rows.items()}
    return [
        Sample(
            turn=row.id,
            session=row.session,
            policy_version=row.policy_version,
            prompt_ids=join_runs(row.prompt_ids, found) or (),
            completion_ids=unpack_ids(opened[row.id]["completion_ids"]) or (),
            behaviour_logprobs=unpack_floats(opened[row.id]["behaviour_logprobs"]) or (),
            score=row.score,
            hinted_prompt_ids=join_runs(row.hinted_prompt_ids, found),
            sampling=Sampling.read(read_json(opened[row.id]["sampling"].encode())),
            advantage=row.advantage,
            outcome=row.outcome,
        )
        for row in (rows[turn_id] for turn_id in turn_ids if turn_id in rows)
    ]


def _ready(connection: sa.Connection, lineage: str) -> dict[_Kind, int]:
    """How many samples are ready."""
    found: dict[_Kind, int] = {}
    for key, count in read_counts(connection, "ready", f"{lineage}/"):
        _, client, *numbers = key.rsplit("/", 4)
        version, score, hinted = map(int, numbers)
        found[client, version, score, hinted] = count
    return found


def _held_clients(connection: sa.Connection, lineage: str) -> set[str]:
    """The clients that have held-out samples: one look into the index for each."""
    s = t.samples.c
    first = sa.select(s.client).where(s.lineage == lineage, s.state == SampleState.HELD)
    first = first.order_by(s.client).limit(1)
    found = set[str]()
    client = connection.execute(first).scalar()
    while client is not None:
        found.add(client)
        client = connection.execute(first.where(s.client > client)).scalar()
    return found


def _by_client(ready: Mapping[_Kind, int], scored: bool, hinted: bool) -> dict[str, int]:
    """How many usable samples each client has."""
    found: dict[str, int] = {}
    for (client, _, *kind), count in ready.items():
        if _usable(kind, scored, hinted):
            found[client] = found.get(client, 0) + count
    return found


def _usable(kind: Sequence[int], scored: bool, hinted: bool) -> bool:
    score, has_hint = kind
    return bool((scored and score) or (hinted and has_hint))


def _freshest(
    connection: sa.Connection,
    lineage: str,
    client: str,
    kinds: Sequence[tuple[int, int, int]],
    limit: int,
) -> Generator[Waiting]:
    """A client's samples of some kinds: of the newest version first, of each the oldest first.

    They are read in the order of the index as they are asked for, at most `limit` of each kind.
    Close it: a SELECT that was not read to its end keeps the connection at what it saw. Once
    another process has written, no write can begin there: "database is locked", until it is closed.
    """
    s, v = t.samples.c, t.verdicts.c

    def waiting(version: int, score: int, has_hint: int) -> Iterable[sa.Row[*tuple[Any, ...]]]:
        judged = sa.select(v.created_at).where(v.turn == s.turn).scalar_subquery()
        query = sa.select(
            s.seq, s.turn, t.turns.c.session, s.source, judged.label("judged_at")
        ).where(
            t.turns.c.id == s.turn,
            s.lineage == lineage,
            s.state == SampleState.READY,
            s.client == client,
            s.policy_version == version,
            s.score == score,
            s.hinted == bool(has_hint),
        )
        some = query.order_by(s.seq).limit(limit).execution_options(yield_per=_READ_AHEAD)
        result = connection.execute(some)
        opened.callback(result.close)
        return result

    with ExitStack() as opened:
        for version in sorted({kind[0] for kind in kinds}, reverse=True):
            of_kind = [waiting(*kind) for kind in kinds if kind[0] == version]
            for row in merge(*of_kind, key=lambda row: row.seq):
                hour = int((row.judged_at or 0.0) // 3600)
                yield Waiting(row.turn, row.session, row.source, hour)
