"""Adding turns and next states to the store, in one transaction for several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import sqlalchemy as sa

from nextstate.records import NextState, Turn
from nextstate.store import schema as t
from nextstate.store.database import Cursor, Prepared
from nextstate.store.packing import dump, id_runs, pack_floats, pack_ids
from nextstate.store.sessions import Candidate, Sessions
from nextstate.store.texts import compress, content_hash
from nextstate.wire import objects, write_json

_MOST_HASHES = 4096
_MOST_BASES, _MOST_BASE_BYTES = 32, 8 << 20
_LONG_BODY, _BEGINNING = 4096, 256

_C = t.turns.c


class _Statements:
    """Every statement of this module, compiled once."""

    def __init__(self, dialect: sa.Dialect) -> None:
        def prepared(statement: sa.ClauseElement) -> Prepared:
            return Prepared(statement, dialect)

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
            sa.text(  # a person may have given feedback on the turn before
                "INSERT INTO judgements (turn, seq, state, not_before, attempts) "
                "SELECT id, seq, 'pending', 0.0, 0 FROM turns WHERE id = :turn "
                "ON CONFLICT DO NOTHING"
            )
        )
        self.known_turn = prepared(sa.select(_C.seq).where(_C.id == sa.bindparam("turn")))
        continued = sa.update(t.turns).where(_C.id == sa.bindparam("turn"))
        self.continued = prepared(continued.values(continued=True))


@lru_cache(maxsize=4)
def _statements(dialect: sa.Dialect) -> _Statements:
    return _Statements(dialect)


@dataclass(slots=True)
class Remembered:
    """What a process knows to be stored, so that it need not look it up."""

    hashes: dict[bytes, bool] = field(default_factory=dict[bytes, bool])
    """In the order of their last use."""
    bases: dict[bytes, tuple[bytes, bytes]] = field(
        default_factory=dict[bytes, tuple[bytes, bytes]]
    )
    """(hash, body) of a long body by its beginning: bodies with the same beginning are similar."""

    def knows(self, key: bytes) -> bool:
        """True if this body is known to be stored. The others are then forgotten before it."""
        known = self.hashes.pop(key, False)
        if known:
            self.hashes[key] = True
        return known

    def add(self, other: Remembered) -> None:
        """Adds what `other` knows, and forgets the oldest beyond the bounds."""
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

    def __init__(self, cursor: Cursor, known: Remembered) -> None:
        self.sessions = Sessions(cursor)
        """Where a turn stands, as the store knows it."""
        self.fresh = Remembered()
        """What this transaction stores, once it is committed."""
        self._cursor = cursor
        self._statements = _statements(cursor.dialect)
        self._known = known
        self._stored = frozenset[bytes]()

    def holds(self, turn: str) -> bool:
        """True if a turn is stored already, with its next states."""
        return self._cursor.first(self._statements.known_turn, turn=turn) is not None

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
        The texts of the turn that this one `continues` are not looked up again.
        """
        # A request sends again what its parent is made of, so no request need be remembered.
        self._stored = frozenset(() if continues is None else continues.text_hashes)
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
        self._cursor.run(
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
            self._cursor.run(
                self._statements.add_state,
                turn=turn,
                seq=seq,
                source=state.source.value,
                text=compress(state.text.encode()),
                trust=state.trust,
            )
        self._cursor.run(self._statements.continued, turn=turn)
        if judge:
            self._cursor.run(self._statements.add_judgement, turn=turn)

    def _keep(self, value: object) -> bytes:
        """Stores a JSON value once and returns its content hash."""
        body = write_json(value)
        return self._keep_body(content_hash(body), body)

    def _keep_run(self, run: bytes) -> bytes:
        return self._keep_body(content_hash(run), run)

    def _keep_body(self, key: bytes, body: bytes) -> bytes:
        if not self._is_known(key):
            short = len(body) < _LONG_BODY
            if short or self._cursor.first(self._statements.known_body, key=key) is None:
                packed, base = (compress(body), None) if short else self._packed(key, body)
                self._cursor.run(self._statements.add_body, hash=key, body=packed, base=base)
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
