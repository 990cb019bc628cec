"""Where a new turn stands: the stored turns that it may continue, and the sessions of a client.

These queries hand out rows. The decision is in `proxy/linking/parents.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import sqlalchemy as sa

from nextstate.records import TurnKind
from nextstate.store import schema as t
from nextstate.store.database import Cursor, Prepared
from nextstate.store.texts import hashes

_MOST_CANDIDATES = 16
_CONTEXT_KEY_BYTES = 32


class Candidate(NamedTuple):
    """A stored turn that a request may continue."""

    id: str
    session: str
    kind: str
    continued: bool
    """True when another request has already given it a next state."""
    messages: bytes
    """The hashes of its request's messages, joined."""
    reply_key: bytes
    context_key: bytes | None
    seq: int
    """Its position in the store."""

    @property
    def message_hashes(self) -> list[bytes]:
        """The hashes of its request's messages."""
        return list(hashes(self.messages))


_C = t.turns.c
_CANDIDATE = sa.select(
    *(_C.id, _C.session, _C.kind, _C.continued, _C.messages, _C.reply_key, _C.said_key, _C.seq)
)
_KEY: sa.BindParameter[Any] = sa.bindparam("key")
_NAME: sa.BindParameter[Any] = sa.bindparam("name")
_TURN: sa.BindParameter[Any] = sa.bindparam("turn")
_PLACE: sa.BindParameter[Any] = sa.bindparam("at")
_OF_NAME = sa.select(_C.session, _C.seq).where(_C.client_session == _NAME)
_IN_LINEAGE = _C.lineage == sa.bindparam("lineage")
_IS_MAIN = _C.kind == TurnKind.MAIN.value
_CUT_HERE = (_C.place == _PLACE, _C.replaced_by.is_(None), _C.continued.is_(False))


def _candidates(condition: sa.ColumnElement[bool]) -> sa.Select[*tuple[Any, ...]]:
    return _CANDIDATE.where(condition, _C.replaced_by.is_(None)).limit(_MOST_CANDIDATES)


def _newest(query: sa.Select[*tuple[Any, ...]]) -> sa.Select[*tuple[Any, ...]]:
    return query.order_by(_C.seq.desc())


class _Statements:
    """Every statement of this module, compiled once."""

    def __init__(self, dialect: sa.Dialect) -> None:
        def prepared(statement: sa.ClauseElement) -> Prepared:
            return Prepared(statement, dialect)

        self.with_context_key = prepared(_newest(_candidates(_C.said_key == _KEY)))
        # Not the newest: the index orders them by the rest of their keys.
        prefix = _C.said_key.between(_KEY, sa.bindparam("last"))
        self.with_context_prefix = prepared(_candidates(prefix))
        self.with_chain_key = prepared(_newest(_candidates(_C.chain_key == _KEY)))
        self.with_reply_key = prepared(_newest(_candidates(_C.reply_key == _KEY)))
        parent = sa.select(_C.parent).where(_C.id == _TURN).scalar_subquery()
        self.parent_of = prepared(_CANDIDATE.where(_C.id == parent))
        self.newest_of_name = prepared(_newest(_OF_NAME.where(_IN_LINEAGE)).limit(1))
        self.newest_first = prepared(_newest(_OF_NAME.where(_C.idx == 0)).limit(1))
        started = _OF_NAME.where(_IN_LINEAGE, _IS_MAIN, _C.idx == 0)
        self.newest_start = prepared(_newest(started).limit(1))
        others = (_C.session != sa.bindparam("session"), _C.seq > sa.bindparam("after"))
        self.others = prepared(_OF_NAME.where(_IN_LINEAGE, _IS_MAIN, *others).limit(1))
        last = sa.select(sa.func.max(_C.idx).label("last")).where(_C.session == _NAME)
        self.last_index = prepared(last)
        self.cut_here = prepared(sa.select(_C.session).where(*_CUT_HERE).limit(1))
        cut = sa.update(t.turns).where(*_CUT_HERE, _C.id != _TURN)
        self.replace_cut = prepared(cut.values(replaced_by=_TURN))
        placed = sa.update(t.turns).where(_C.id == _TURN)
        self.set_place = prepared(placed.values(place=_PLACE))


@lru_cache(maxsize=4)
def _statements(dialect: sa.Dialect) -> _Statements:
    return _Statements(dialect)


class Sessions:
    """Queries within a recording transaction. Turns that a retry replaced are no candidates."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._statements = _statements(cursor.dialect)

    def with_context_key(self, key: bytes) -> list[Candidate]:
        """The newest turns with this context key."""
        return self._candidates(self._statements.with_context_key, key=key)

    def with_context_prefix(self, prefix: bytes) -> list[Candidate]:
        """Some turns whose context key begins so."""
        last = prefix.ljust(_CONTEXT_KEY_BYTES, b"\xff")
        return self._candidates(self._statements.with_context_prefix, key=prefix, last=last)

    def with_chain_key(self, key: bytes) -> list[Candidate]:
        """The newest turns with this chain key."""
        return self._candidates(self._statements.with_chain_key, key=key)

    def with_reply_key(self, key: bytes) -> list[Candidate]:
        """The newest turns with this reply key."""
        return self._candidates(self._statements.with_reply_key, key=key)

    def parent_of(self, turn: str) -> Candidate | None:
        """The turn that a stored turn continues."""
        return next(iter(self._candidates(self._statements.parent_of, turn=turn)), None)

    def newest_start(self, name: str, lineage: str) -> tuple[str, int] | None:
        """(session, position in the store) of the newest main conversation under a name."""
        return self._cursor.first(self._statements.newest_start, name=name, lineage=lineage)

    def has_others(self, name: str, lineage: str, session: str, after: int) -> bool:
        """Whether other sessions under a name have main turns after a position in the store."""
        values = {"name": name, "lineage": lineage, "session": session, "after": after}
        return self._cursor.first(self._statements.others, **values) is not None

    def newest_of_name(self, name: str, lineage: str) -> str | None:
        """The session of a lineage's newest turn under a name."""
        row = self._cursor.first(self._statements.newest_of_name, name=name, lineage=lineage)
        return None if row is None else row.session

    def newest_started(self, name: str) -> str | None:
        """The session of any lineage that was started last under a name."""
        row = self._cursor.first(self._statements.newest_first, name=name)
        return None if row is None else row.session

    def next_index(self, session: str) -> int:
        """The index of the next turn in a session."""
        row = self._cursor.first(self._statements.last_index, name=session)
        return 0 if row is None or row.last is None else row.last + 1

    def cut_session(self, place: bytes) -> str | None:
        """The session of a turn at this place whose client did not see the end of the reply."""
        row = self._cursor.first(self._statements.cut_here, at=place)
        return None if row is None else row.session

    def replace_cut(self, place: bytes, turn: str) -> None:
        """Lets `turn` replace the cut turns at the same place."""
        self._cursor.run(self._statements.replace_cut, at=place, turn=turn)

    def set_place(self, turn: str, place: bytes) -> None:
        """Stores the place of a turn whose client did not see the end of the reply."""
        self._cursor.run(self._statements.set_place, turn=turn, at=place)

    def _candidates(self, statement: Prepared, **values: object) -> list[Candidate]:
        return [Candidate._make(row) for row in self._cursor.all(statement, **values)]
