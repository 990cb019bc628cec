"""Adding turns to the store: how a request finds the turn that it continues, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.sql.compiler import SQLCompiler

from nextstate.records import NextState, Turn, TurnKind
from nextstate.store import schema as t
from nextstate.store.rows import (
    compress,
    content_hash,
    dump,
    hashes,
    id_runs,
    pack_floats,
    pack_ids,
)
from nextstate.wire import objects, write_json

_MOST_CANDIDATES = 16
_CONTEXT_KEY_BYTES = 32
_MOST_HASHES = 4096
_MOST_BASES, _MOST_BASE_BYTES = 32, 8 << 20
_LONG_BODY, _BEGINNING = 4096, 256


class Candidate(NamedTuple):
    """A stored turn that a request may continue."""

    id: str
    session: str
    kind: str
    continued: bool
    """True when another request has already given it a next state."""
    messages: bytes
    """The hashes of its request's messages, joined."""
    prompt_ids: bytes | None
    reply: bytes
    rest: bytes
    reply_key: bytes
    context_key: bytes | None
    seq: int
    """Its position in the store."""

    @property
    def message_hashes(self) -> list[bytes]:
        """The hashes of its request's messages."""
        return hashes(self.messages)

    @property
    def bodies(self) -> list[bytes]:
        """The names of all bodies that it is made of: they are stored."""
        return hashes(b"".join((self.messages, self.prompt_ids or b"", self.reply, self.rest)))


_C = t.turns.c
_CANDIDATE = (
    *(_C.id, _C.session, _C.kind, _C.continued, _C.messages, _C.prompt_ids, _C.reply, _C.rest),
    *(_C.reply_key, _C.said_key, _C.seq),
)
_ABOVE = sa.select(_C.parent).where(_C.id == sa.bindparam("turn")).scalar_subquery()
_CUT_HERE = (_C.place == sa.bindparam("here"), _C.replaced_by.is_(None), _C.continued.is_(False))
_OF_CLIENT = sa.select(_C.session, _C.idx).where(_C.client_session == sa.bindparam("name"))
_IN_LINEAGE = _C.lineage == sa.bindparam("lineage")
_MAIN = _C.kind == TurnKind.MAIN.value
_THEIRS = (_C.client_session == sa.bindparam("name"), _IN_LINEAGE, _MAIN)


def _candidates(*where: sa.ColumnElement[bool]) -> sa.Select[*tuple[Any, ...]]:
    query = sa.select(*_CANDIDATE)
    return query.where(*where, _C.replaced_by.is_(None)).limit(_MOST_CANDIDATES)


def _newest(key: sa.Column[Any]) -> sa.Select[*tuple[Any, ...]]:
    """The newest turns with a link key."""
    return _candidates(key == sa.bindparam("key")).order_by(_C.seq.desc())


class _Statements:
    """Every statement of a recording, compiled once.

    The recorder runs some ten a turn, and SQLAlchemy takes longer to look one up and to wrap its
    rows than SQLite to run it: they go to the driver's own cursor.
    """

    def __init__(self, dialect: sa.Dialect) -> None:
        def prepared(statement: sa.ClauseElement) -> Prepared:
            return Prepared(statement, dialect)

        self.by_said = prepared(_newest(_C.said_key))
        # Any of them, not the newest: the index has them by what comes after the words.
        words = _C.said_key.between(sa.bindparam("key"), sa.bindparam("last"))
        self.by_words = prepared(_candidates(words))
        self.by_chain = prepared(_newest(_C.chain_key))
        self.by_reply = prepared(_newest(_C.reply_key))
        self.above = prepared(sa.select(*_CANDIDATE).where(_C.id == _ABOVE))
        theirs = _OF_CLIENT.where(_IN_LINEAGE)
        self.newest_of_client = prepared(theirs.order_by(_C.seq.desc()).limit(1))
        begun = sa.select(_C.session, _C.seq).where(*_THEIRS, _C.idx == 0)
        self.last_begun = prepared(begun.order_by(_C.seq.desc()).limit(1))
        others = sa.select(_C.seq).where(*_THEIRS, _C.session != sa.bindparam("begun"))
        self.others = prepared(others.where(_C.seq > sa.bindparam("since")).limit(1))
        started = _OF_CLIENT.where(_C.idx == 0)
        self.last_started = prepared(started.order_by(_C.seq.desc()).limit(1))
        self.cut_here = prepared(sa.select(_C.session).where(*_CUT_HERE).limit(1))
        self.replace_cut = prepared(
            sa.update(t.turns)
            .where(*_CUT_HERE, _C.id != sa.bindparam("turn"))
            .values(replaced_by=sa.bindparam("turn"))
        )
        placed = sa.update(t.turns).where(_C.id == sa.bindparam("turn"))
        self.set_place = prepared(placed.values(place=sa.bindparam("here")))
        last = sa.select(sa.func.max(_C.idx)).where(_C.session == sa.bindparam("name"))
        self.last_index = prepared(last)
        known = sa.select(t.messages.c.hash).where(t.messages.c.hash == sa.bindparam("key"))
        self.known_body = prepared(known)
        self.add_body = prepared(
            sa.text(
                "INSERT INTO messages (hash, body, base) VALUES (:hash, :body, :base) "
                "ON CONFLICT DO NOTHING"
            )
        )
        columns: dict[str, Any] = {
            c.name: sa.bindparam(c.name) for c in _C if c.name not in ("seq", "replaced_by")
        }
        self.add_turn = prepared(sa.insert(t.turns).values(columns))
        self.add_state = prepared(sa.insert(t.next_states))
        self.add_judgement = prepared(
            sa.text(  # a person may have spoken of the turn first
                "INSERT INTO judgements (turn, seq, state, not_before, attempts) "
                "SELECT id, seq, 'pending', 0.0, 0 FROM turns WHERE id = :turn "
                "ON CONFLICT DO NOTHING"
            )
        )
        self.known_turn = prepared(sa.select(_C.seq).where(_C.id == sa.bindparam("turn")))
        continued = sa.update(t.turns).where(_C.id == sa.bindparam("turn"))
        self.continued = prepared(continued.values(continued=True))


class Prepared:
    """One statement as the driver takes it."""

    def __init__(self, statement: sa.ClauseElement, dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        assert isinstance(compiled, SQLCompiler)
        self.sql = str(compiled)
        self._names = compiled.positiontup
        self._fixed = {k: v for k, v in compiled.params.items() if v is not None}

    def arguments(self, values: Mapping[str, object]) -> Any:
        """The values in the order, or under the names, that the driver wants."""
        if self._names is None:
            return {**self._fixed, **values}
        return [values[n] if n in values else self._fixed[n] for n in self._names]


@lru_cache(maxsize=4)
def _statements(dialect: sa.Dialect) -> _Statements:
    return _Statements(dialect)


@dataclass(slots=True)
class Remembered:
    """What a process knows to be stored, so that it need not look; never more than is stored."""

    hashes: dict[bytes, bool] = field(default_factory=dict[bytes, bool])
    """Those that were asked for last come last."""
    bases: dict[bytes, tuple[bytes, bytes]] = field(
        default_factory=dict[bytes, tuple[bytes, bytes]]
    )
    """(hash, body) of a long body, by how it begins: others that begin so may be much like it."""

    def knows(self, key: bytes) -> bool:
        """Whether this body is known to be stored; if so, others are forgotten before it."""
        known = self.hashes.pop(key, False)
        if known:
            self.hashes[key] = True
        return known

    def add(self, other: Remembered) -> None:
        """Takes in what another has seen stored, and forgets what has become too much."""
        self.hashes |= other.hashes
        for oldest in list(islice(self.hashes, max(0, len(self.hashes) - _MOST_HASHES))):
            self.hashes.pop(oldest, None)
        self.bases |= other.bases
        size = sum(len(body) for _, body in self.bases.values())
        while len(self.bases) > _MOST_BASES or size > _MOST_BASE_BYTES:
            _, body = self.bases.pop(next(iter(self.bases)))
            size -= len(body)


class Recording:
    """An open recording transaction: see `Store.recording`."""

    def __init__(self, cursor: Any, dialect: sa.Dialect, known: Remembered) -> None:
        self.fresh = Remembered()
        """What this transaction stores, once it is committed."""
        self._cursor = cursor
        self._statements = _statements(dialect)
        self._known = known
        self._stored = frozenset[bytes]()

    def with_context_key(self, key: bytes) -> list[Candidate]:
        """The newest turns with this context key."""
        return self._candidates(self._statements.by_said, key=key)

    def with_context_prefix(self, prefix: bytes) -> list[Candidate]:
        """Some turns whose context key begins so."""
        last = prefix.ljust(_CONTEXT_KEY_BYTES, b"\xff")
        return self._candidates(self._statements.by_words, key=prefix, last=last)

    def with_chain_key(self, key: bytes) -> list[Candidate]:
        """The newest turns with this chain key."""
        return self._candidates(self._statements.by_chain, key=key)

    def with_reply_key(self, key: bytes) -> list[Candidate]:
        """The newest turns with this reply key."""
        return self._candidates(self._statements.by_reply, key=key)

    def parent_of(self, turn: str) -> Candidate | None:
        """The turn that a stored turn continues."""
        return next(iter(self._candidates(self._statements.above, turn=turn)), None)

    def newest_start(self, client_session: str, lineage: str) -> tuple[str, int] | None:
        """(session, position in the store) of the newest main conversation under a name."""
        row = self._first(self._statements.last_begun, name=client_session, lineage=lineage)
        return None if row is None else (row[0], row[1])

    def has_others(self, client_session: str, lineage: str, session: str, after: int) -> bool:
        """Whether other sessions under a name have main turns after a position in the store."""
        others = {"name": client_session, "lineage": lineage, "begun": session, "since": after}
        return self._first(self._statements.others, **others) is not None

    def newest_session(self, client_session: str, lineage: str | None = None) -> str | None:
        """The session of the newest turn under a name; of the newest first turn if no lineage."""
        if lineage is None:
            row = self._first(self._statements.last_started, name=client_session)
        else:
            statement = self._statements.newest_of_client
            row = self._first(statement, name=client_session, lineage=lineage)
        return None if row is None else row[0]

    def _candidates(self, statement: Prepared, **values: object) -> list[Candidate]:
        return [Candidate._make(row) for row in self._all(statement, **values)]

    def cut_session(self, place: bytes) -> str | None:
        """The session of a turn at this place whose reply never came to an end, if there is one."""
        row = self._first(self._statements.cut_here, here=place)
        return None if row is None else row[0]

    def replace_cut(self, place: bytes, turn: str) -> None:
        """Lets `turn` stand for the turns at the same place whose replies never came to an end."""
        self._run(self._statements.replace_cut, here=place, turn=turn)

    def set_place(self, turn: str, place: bytes) -> None:
        """Says where a stored turn stands: the client did not see the end of its reply."""
        self._run(self._statements.set_place, turn=turn, here=place)

    def holds(self, turn: str) -> bool:
        """Whether a turn is stored already, and with it its next states."""
        return self._first(self._statements.known_turn, turn=turn) is not None

    def next_index(self, session: str) -> int:
        """The position of the next turn in a session."""
        row = self._first(self._statements.last_index, name=session)
        return 0 if row is None or row[0] is None else row[0] + 1

    def add_turn(
        self,
        turn: Turn,
        chain_key: bytes,
        reply_key: bytes,
        *,
        context_key: bytes | None = None,
        client_session: str | None = None,
        place: bytes | None = None,
        message_hashes: Sequence[bytes] | None = None,
        continues: Candidate | None = None,
    ) -> None:
        """Adds a turn with the keys by which a request that continues it is found.

        `place` is the place of a turn whose client did not see the end of the reply: a retry is
        found by it. `message_hashes` are the hashes of the request's messages, if they are known.
        What `continues` is made of is not looked up again.
        """
        # A request sends again what its parent is made of, so no request need be remembered.
        self._stored = frozenset(() if continues is None else continues.bodies)
        rest = {key: value for key, value in turn.request.items() if key != "messages"}
        if "tools" in rest:
            rest["tools"] = self._keep(rest["tools"]).hex()
        messages = objects(turn.request.get("messages"))
        if message_hashes is None:
            message_hashes = [self._keep(message) for message in messages]
        else:
            for key, message in zip(message_hashes, messages, strict=True):
                if not self._is_known(key):
                    self._keep_body(key, write_json(message))
        prompt = turn.prompt_ids
        runs = None if prompt is None else b"".join(self._keep_run(run) for run in id_runs(prompt))
        self._run(
            self._statements.add_turn,
            id=turn.id,
            session=turn.session,
            idx=turn.index,
            kind=turn.kind.value,
            lineage=turn.lineage,
            policy_version=turn.policy_version,
            client_model=turn.client_model,
            messages=b"".join(message_hashes),
            rest=self._keep(rest),
            reply=self._keep(turn.reply),
            finish_reason=turn.finish_reason,
            prompt_ids=runs,
            completion_ids=pack_ids(turn.completion_ids),
            behaviour_logprobs=pack_floats(turn.behaviour_logprobs),
            sampling=dump(turn.sampling),
            started_at=turn.timings.started_at,
            first_token_s=turn.timings.first_token_s,
            total_s=turn.timings.total_s,
            untrainable=turn.untrainable,
            parent=turn.parent,
            continued=False,
            chain_key=chain_key,
            reply_key=reply_key,
            client_session=client_session,
            place=place,
            said_key=context_key,
        )

    def add_next_states(self, turn: str, judge: bool, states: Sequence[NextState]) -> None:
        """Adds what followed `turn` and, if `judge`, the judge's work for it."""
        if not states:
            return
        for seq, state in enumerate(states):
            self._run(
                self._statements.add_state,
                turn=turn,
                seq=seq,
                source=state.source.value,
                text=compress(state.text.encode()),
                trust=state.trust,
            )
        self._run(self._statements.continued, turn=turn)
        if judge:
            self._run(self._statements.add_judgement, turn=turn)

    def _keep(self, value: object) -> bytes:
        """Stores a JSON value once and returns its content hash."""
        body = write_json(value)
        return self._keep_body(content_hash(body), body)

    def _keep_run(self, run: bytes) -> bytes:
        return self._keep_body(content_hash(run), run)

    def _keep_body(self, key: bytes, body: bytes) -> bytes:
        if not self._is_known(key):
            short = len(body) < _LONG_BODY
            if short or self._first(self._statements.known_body, key=key) is None:
                packed, base = (compress(body), None) if short else self._packed(key, body)
                self._run(self._statements.add_body, hash=key, body=packed, base=base)
            self.fresh.hashes[key] = True
        return key

    def _packed(self, key: bytes, body: bytes) -> tuple[bytes, bytes | None]:
        """(the body compressed, the hash of the base that it was compressed against)."""
        plain = compress(body)
        beginning = body[:_BEGINNING]
        base = self.fresh.bases.get(beginning) or self._known.bases.get(beginning)
        if base is not None:
            against = compress(body, base[1])
            if 2 * len(against) < len(plain):
                return against, base[0]
        self.fresh.bases[beginning] = key, body
        return plain, None

    def _is_known(self, key: bytes) -> bool:
        return key in self._stored or self._known.knows(key) or key in self.fresh.hashes

    def _run(self, statement: Prepared, **values: object) -> None:
        self._cursor.execute(statement.sql, statement.arguments(values))

    def _first(self, statement: Prepared, **values: object) -> tuple[Any, ...] | None:
        self._run(statement, **values)
        return self._cursor.fetchone()

    def _all(self, statement: Prepared, **values: object) -> list[tuple[Any, ...]]:
        self._run(statement, **values)
        return self._cursor.fetchall()
