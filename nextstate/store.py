"""Where the stages meet: every record, and the work that is leased from them.

The only module with queries. All methods are synchronous and safe to call from several threads and
processes; asynchronous callers use `asyncio.to_thread`. Work is leased with an expiry and settled,
never deleted on fetch.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson
import sqlalchemy as sa
import zstandard
from sqlalchemy.exc import DatabaseError

from nextstate import schema as t
from nextstate.config import StoreConfig
from nextstate.errors import StoreError
from nextstate.records import (
    BASE_VERSION,
    Json,
    NextState,
    PolicyVersion,
    Sample,
    SampleState,
    Source,
    Timings,
    Turn,
    TurnKind,
    Verdict,
    VersionState,
)
from nextstate.sqlite import open_file

FEEDBACK = "feedback"
"""The judge's name in a verdict that a person gave."""
_HASH_BYTES = 16
_Row: TypeAlias = sa.Row[*tuple[Any, ...]]
_REMEMBERED_HASHES = 100_000


@dataclass(frozen=True, slots=True)
class Link:
    """How a request is recognised as the continuation of a turn; all keys are 16-byte digests."""

    chain_key: bytes
    """Of all assistant messages in the request's history."""
    reply_key: bytes
    """Of the last assistant message alone."""
    message_hashes: tuple[bytes, ...]
    """Of every message in the request, to choose among turns with identical replies."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The turn that a request continues."""

    id: str
    session: str
    index: int
    kind: TurnKind
    continued: bool
    """True when another request has already given it a next state."""


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
            self._db = open_file(self.dir / file)
            with self._write() as connection:
                t.migrate(connection)
        except (OSError, DatabaseError) as error:
            raise StoreError(
                f"[store] dir = {config.dir!r} cannot hold the store: {error}; "
                "name a folder that you may write to"
            ) from error
        self._known: set[bytes] = set()

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
        fresh: set[bytes] = set()
        with self._write() as connection:
            yield Recording(connection, self._known, fresh, self._clock())
        if len(self._known) > _REMEMBERED_HASHES:
            self._known.clear()
        self._known |= fresh

    # Reading back

    def turn(self, turn_id: str) -> Turn | None:
        """One turn with its whole request, or None."""
        with self._read() as connection:
            row = connection.execute(sa.select(t.turns).where(t.turns.c.id == turn_id)).first()
            return None if row is None else _turn(connection, row)

    def next_states(self, turn_id: str) -> tuple[NextState, ...]:
        """What followed the turn, in order."""
        with self._read() as connection:
            return _next_states(connection, turn_id)

    def verdict(self, turn_id: str) -> Verdict | None:
        """The settled verdict of the turn, or None."""
        with self._read() as connection:
            query = sa.select(t.verdicts).where(t.verdicts.c.turn == turn_id)
            row = connection.execute(query).first()
            return None if row is None else _verdict(row)

    def turn_ids(self, limit: int | None = None, newest_first: bool = False) -> list[str]:
        """Turn ids in the order of recording."""
        order = t.turns.c.seq.desc() if newest_first else t.turns.c.seq
        with self._read() as connection:
            query = sa.select(t.turns.c.id).order_by(order).limit(limit)
            return list(connection.execute(query).scalars())

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
            connection.execute(
                sa.insert(t.verdicts).values(
                    turn=verdict.turn,
                    votes=_dump(verdict.votes),
                    score=verdict.score,
                    judge=verdict.judge,
                    hint=verdict.hint,
                    hinted_prompt_ids=_pack_ids(verdict.hinted_prompt_ids),
                    created_at=self._clock(),
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
        the rest stays ready until its lag is too large.
        """
        s = t.samples.c
        with self._write() as connection:
            query = (
                sa.select(t.turns, t.verdicts.c.score, t.verdicts.c.hinted_prompt_ids)
                .join(t.samples, s.turn == t.turns.c.id)
                .join(t.verdicts, t.verdicts.c.turn == t.turns.c.id)
                .where(*_usable(lineage, scored, hinted))
                .order_by(s.policy_version.desc(), t.turns.c.seq)
                .limit(limit)
            )
            leased = [_sample(row) for row in connection.execute(query)]
            connection.execute(
                sa.update(t.samples)
                .where(s.turn.in_([sample.turn for sample in leased]))
                .values(state=SampleState.LEASED, batch=batch, lease_until=self._clock() + lease_s)
            )
        return leased

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
                .values(state=SampleState.DROPPED, reason=reason, lease_until=None)
            )

    def add_version(self, version: PolicyVersion, batch: str | None) -> None:
        """Registers a version and settles the samples of its batch as trained, in one step."""
        s = t.samples.c
        with self._write() as connection:
            connection.execute(sa.insert(t.versions).values(**_version_row(version, self._clock())))
            if batch is not None:
                connection.execute(
                    sa.update(t.samples)
                    .where(s.lineage == version.lineage, s.batch == batch)
                    .values(state=SampleState.TRAINED, trained_in=version.number, lease_until=None)
                )

    # Versions

    def versions(self, lineage: str | None = None) -> list[PolicyVersion]:
        """Every version, oldest first, of one lineage or of all."""
        query = sa.select(t.versions).order_by(t.versions.c.lineage, t.versions.c.number)
        if lineage is not None:
            query = query.where(t.versions.c.lineage == lineage)
        with self._read() as connection:
            return [_version(row) for row in connection.execute(query)]

    def version(self, lineage: str, number: int) -> PolicyVersion | None:
        """One version, or None; version 0 is the base and always there."""
        for version in self.versions(lineage):
            if version.number == number:
                return version
        if number == BASE_VERSION:
            return base_version(lineage, VersionState.RETIRED)
        return None

    def serving(self, lineage: str) -> PolicyVersion:
        """The version that serves the lineage: the base until a first one is published."""
        v = t.versions.c
        with self._read() as connection:
            row = connection.execute(
                sa.select(t.versions).where(v.lineage == lineage, v.state == VersionState.SERVING)
            ).first()
        return base_version(lineage, VersionState.SERVING) if row is None else _version(row)

    def set_serving(self, lineage: str, number: int) -> None:
        """Flips the lineage to `number`; the version that served is retired."""
        v = t.versions.c
        with self._write() as connection:
            connection.execute(
                sa.update(t.versions)
                .where(v.lineage == lineage, v.state == VersionState.SERVING)
                .values(state=VersionState.RETIRED)
            )
            connection.execute(
                sa.update(t.versions)
                .where(v.lineage == lineage, v.number == number)
                .values(state=VersionState.SERVING)
            )

    def reject_version(self, lineage: str, number: int, reason: str) -> None:
        """Marks a version that must never serve, keeping why in its metrics' place."""
        v = t.versions.c
        with self._write() as connection:
            connection.execute(
                sa.update(t.versions)
                .where(v.lineage == lineage, v.number == number)
                .values(state=VersionState.REJECTED, metrics=_dump({"rejected": reason}))
            )


class Recording:
    """An open recording transaction: see `Store.recording`."""

    def __init__(
        self, connection: sa.Connection, known: set[bytes], fresh: set[bytes], now: float
    ) -> None:
        self._connection = connection
        self._known = known
        self._fresh = fresh
        self._now = now

    def parent(self, lineage: str, link: Link, session: str | None) -> Parent | None:
        """The turn that a request with this link continues, within `session` if one is named.

        Turns whose whole chain of replies agrees come first; without one, the newest with the same
        last reply (the agent may have cut its history). Among equals, one that nothing has
        continued yet wins, then the one that shares most messages, then the newest.
        """
        c = t.turns.c
        columns = (c.id, c.session, c.idx, c.kind, c.continued, c.messages, c.seq)
        for column, key in ((c.chain_key, link.chain_key), (c.reply_key, link.reply_key)):
            query = (
                sa.select(*columns)
                .where(column == key, c.lineage == lineage)
                .order_by(c.seq.desc())
                .limit(16)
            )
            if session is not None:
                query = query.where(c.session == session)
            rows = self._connection.execute(query).all()
            if rows:
                ours = set(link.message_hashes)

                def rank(row: _Row, ours: set[bytes] = ours) -> tuple[bool, int, int]:
                    return not row.continued, len(ours.intersection(_hashes(row.messages))), row.seq

                best = max(rows, key=rank)
                return Parent(best.id, best.session, best.idx, TurnKind(best.kind), best.continued)
        return None

    def next_index(self, session: str) -> int:
        """The position of the next turn in a session."""
        c = t.turns.c
        query = sa.select(sa.func.max(c.idx)).where(c.session == session)
        last = self._connection.execute(query).scalar()
        return 0 if last is None else last + 1

    def add_turn(self, turn: Turn, chain_key: bytes, reply_key: bytes) -> None:
        """Adds a turn; `chain_key` and `reply_key` are those of its own reply."""
        rest = {key: value for key, value in turn.request.items() if key != "messages"}
        if "tools" in rest:
            rest["tools"] = self._keep(rest["tools"]).hex()
        messages: list[Json] = turn.request.get("messages") or []
        self._connection.execute(
            sa.insert(t.turns).values(
                id=turn.id,
                session=turn.session,
                idx=turn.index,
                kind=turn.kind,
                lineage=turn.lineage,
                policy_version=turn.policy_version,
                client_model=turn.client_model,
                messages=b"".join(self._keep(message) for message in messages),
                rest=_compress(orjson.dumps(rest)),
                reply=self._keep(turn.reply),
                finish_reason=turn.finish_reason,
                prompt_ids=_pack_ids(turn.prompt_ids),
                completion_ids=_pack_ids(turn.completion_ids),
                behaviour_logprobs=_pack_floats(turn.behaviour_logprobs),
                sampling=_dump(turn.sampling),
                started_at=turn.timings.started_at,
                first_token_s=turn.timings.first_token_s,
                total_s=turn.timings.total_s,
                untrainable=turn.untrainable,
                parent=turn.parent,
                chain_key=chain_key,
                reply_key=reply_key,
            )
        )

    def add_next_states(self, turn: str, judge: bool, states: Sequence[NextState]) -> None:
        """Adds what followed `turn` and, if `judge`, the judge's work for it."""
        if not states:
            return
        self._connection.execute(
            sa.insert(t.next_states),
            [
                {
                    "turn": turn,
                    "seq": seq,
                    "source": state.source,
                    "text": _compress(state.text.encode()),
                    "trust": state.trust,
                }
                for seq, state in enumerate(states)
            ],
        )
        self._connection.execute(
            sa.update(t.turns).where(t.turns.c.id == turn).values(continued=True)
        )
        if judge:
            self._connection.execute(sa.insert(t.judgements).values(turn=turn, state="pending"))

    def _keep(self, value: object) -> bytes:
        """Stores a JSON value once and returns its content hash."""
        body = orjson.dumps(value)
        key = content_hash(body)
        if key not in self._known and key not in self._fresh:
            m = t.messages
            if self._connection.execute(sa.select(m.c.hash).where(m.c.hash == key)).first() is None:
                self._connection.execute(sa.insert(m).values(hash=key, body=_compress(body)))
            self._fresh.add(key)
        return key


def content_hash(body: bytes) -> bytes:
    """The 16-byte name under which a message's JSON bytes are stored."""
    return hashlib.blake2b(body, digest_size=_HASH_BYTES).digest()


def base_version(lineage: str, state: VersionState) -> PolicyVersion:
    """Version 0 of a lineage: the base model without an adapter."""
    return PolicyVersion(lineage, BASE_VERSION, None, None, None, 0, state)


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
    elif state in (SampleState.READY, SampleState.DROPPED):
        connection.execute(sa.update(t.samples).where(s.turn == verdict.turn).values(**values))


def _sample(row: _Row) -> Sample:
    return Sample(
        turn=row.id,
        session=row.session,
        policy_version=row.policy_version,
        prompt_ids=_unpack_ids(row.prompt_ids) or (),
        completion_ids=_unpack_ids(row.completion_ids) or (),
        behaviour_logprobs=_unpack_floats(row.behaviour_logprobs) or (),
        score=row.score,
        hinted_prompt_ids=_unpack_ids(row.hinted_prompt_ids),
    )


def _turn(connection: sa.Connection, row: _Row) -> Turn:
    request: Json = {"messages": [_load(connection, key) for key in _hashes(row.messages)]}
    request.update(orjson.loads(_decompress(row.rest)))
    if "tools" in request:
        request["tools"] = _load(connection, bytes.fromhex(request["tools"]))
    return Turn(
        id=row.id,
        session=row.session,
        index=row.idx,
        kind=TurnKind(row.kind),
        lineage=row.lineage,
        policy_version=row.policy_version,
        client_model=row.client_model,
        request=request,
        reply=_load(connection, row.reply),
        finish_reason=row.finish_reason,
        prompt_ids=_unpack_ids(row.prompt_ids),
        completion_ids=_unpack_ids(row.completion_ids),
        behaviour_logprobs=_unpack_floats(row.behaviour_logprobs),
        sampling=orjson.loads(row.sampling),
        timings=Timings(row.started_at, row.first_token_s, row.total_s),
        untrainable=row.untrainable,
        parent=row.parent,
    )


def _next_states(connection: sa.Connection, turn_id: str) -> tuple[NextState, ...]:
    n = t.next_states.c
    query = sa.select(t.next_states).where(n.turn == turn_id).order_by(n.seq)
    return tuple(
        NextState(row.turn, Source(row.source), _decompress(row.text).decode(), row.trust)
        for row in connection.execute(query)
    )


def _verdict(row: _Row) -> Verdict:
    return Verdict(
        turn=row.turn,
        votes=tuple(orjson.loads(row.votes)),
        score=row.score,
        judge=row.judge,
        hint=row.hint,
        hinted_prompt_ids=_unpack_ids(row.hinted_prompt_ids),
    )


def _version(row: _Row) -> PolicyVersion:
    return PolicyVersion(
        lineage=row.lineage,
        number=row.number,
        parent=row.parent,
        path=row.path,
        sha256=row.sha256,
        samples=row.samples,
        state=VersionState(row.state),
        metrics=orjson.loads(row.metrics),
    )


def _version_row(version: PolicyVersion, now: float) -> dict[str, Any]:
    return {
        "lineage": version.lineage,
        "number": version.number,
        "parent": version.parent,
        "path": version.path,
        "sha256": version.sha256,
        "samples": version.samples,
        "state": version.state,
        "metrics": _dump(dict(version.metrics)),
        "created_at": now,
    }


def _load(connection: sa.Connection, key: bytes) -> Any:
    query = sa.select(t.messages.c.body).where(t.messages.c.hash == key)
    return orjson.loads(_decompress(connection.execute(query).scalar_one()))


def _hashes(packed: bytes) -> Iterable[bytes]:
    return (packed[i : i + _HASH_BYTES] for i in range(0, len(packed), _HASH_BYTES))


def _dump(value: Any) -> str:
    return orjson.dumps(value).decode()


def _compress(body: bytes) -> bytes:
    # A compressor is not safe to share between threads and costs microseconds to make.
    return zstandard.ZstdCompressor(level=3).compress(body)


def _decompress(body: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(body)


def _pack_ids(ids: Sequence[int] | None) -> bytes | None:
    return None if ids is None else _compress(array("I", ids).tobytes())


def _unpack_ids(packed: bytes | None) -> tuple[int, ...] | None:
    return None if packed is None else tuple(array("I", _decompress(packed)))


def _pack_floats(values: Sequence[float] | None) -> bytes | None:
    # 64-bit: the store holds the very numbers that the engine returned.
    return None if values is None else _compress(array("d", values).tobytes())


def _unpack_floats(packed: bytes | None) -> tuple[float, ...] | None:
    return None if packed is None else tuple(array("d", _decompress(packed)))
