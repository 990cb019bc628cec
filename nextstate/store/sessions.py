"""Where a new turn stands: the stored turns that it may continue, and the sessions of a client.

These queries hand out rows. The decision is in `proxy/linking/parents.py`.

A batch of turns asks much of the same. Where each question waits for a server (`looks_ahead` of the
cursor), it is asked for all turns at once, before the first is added. What the batch itself changes
is forgotten, and then asked for one by one: so the answers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from nextstate.episodes import EpisodeState
from nextstate.records import Json, Turn, TurnKind
from nextstate.store import schema as t
from nextstate.store.database import Cursor
from nextstate.store.texts import hashes, one, one_within
from nextstate.store.turns import turn_texts
from nextstate.store.vault import PREFIX_BYTES, open_column
from nextstate.wire import read_json

_MOST_CANDIDATES = 16


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
    *(_C.id, _C.session, _C.kind, _C.continued, _C.messages, _C.reply_key, _C.context_key, _C.seq)
)
_KEY: sa.BindParameter[Any] = sa.bindparam("key")
_NAME: sa.BindParameter[Any] = sa.bindparam("name")
_TURN: sa.BindParameter[Any] = sa.bindparam("turn")
_PLACE: sa.BindParameter[Any] = sa.bindparam("at")
_OF_NAME = sa.select(_C.session, _C.seq).where(_C.client_session == _NAME, _C.episode.is_(None))
_IN_LINEAGE = _C.lineage == sa.bindparam("lineage")
_IS_MAIN = _C.kind == TurnKind.MAIN.value
_CUT_HERE = (_C.place == _PLACE, _C.replaced_by.is_(None), _C.continued.is_(False))


def _candidates(condition: sa.ColumnElement[bool]) -> sa.Select[*tuple[Any, ...]]:
    return _CANDIDATE.where(condition, _C.replaced_by.is_(None)).limit(_MOST_CANDIDATES)


def _newest(query: sa.Select[*tuple[Any, ...]]) -> sa.Select[*tuple[Any, ...]]:
    return query.order_by(_C.seq.desc())


_WITH_CONTEXT_KEY = _newest(_candidates(_C.context_key == _KEY))
# Not the newest: the index orders them by the rest of their keys.
_WITH_CONTEXT_PREFIX = _candidates(
    _C.context_key.between(
        sa.bindparam("first", type_=sa.LargeBinary), sa.bindparam("last", type_=sa.LargeBinary)
    )
)
_WITH_CHAIN_KEY = _newest(_candidates(_C.chain_key == _KEY))
_WITH_REPLY_KEY = _newest(_candidates(_C.reply_key == _KEY))
_PARENT_OF = _CANDIDATE.where(_C.id == sa.select(_C.parent).where(_C.id == _TURN).scalar_subquery())
_LAST_STEP = (
    _CANDIDATE.where(_C.episode == sa.bindparam("episode"), _C.step >= 0, _IS_MAIN)
    .where(_C.client_session.is_not_distinct_from(_NAME))
    .where(_C.replaced_by.is_(None), _C.place.is_(None))
    .order_by(_C.step.desc())
    .limit(1)
)
_NEWEST_OF_NAME = _newest(_OF_NAME.where(_IN_LINEAGE)).limit(1)
_NEWEST_STARTED = _newest(_OF_NAME.where(_C.idx == 0)).limit(1)
_NEWEST_START = _newest(_OF_NAME.where(_IN_LINEAGE, _IS_MAIN, _C.idx == 0)).limit(1)
_OTHERS = _OF_NAME.where(
    *(_IN_LINEAGE, _IS_MAIN, _C.session != sa.bindparam("session"), _C.seq > sa.bindparam("after"))
).limit(1)
_OF_EPISODE = sa.select(t.episodes.c.state).where(t.episodes.c.id == sa.bindparam("episode"))
_REPLY_OF = sa.select(_C.reply).where(_C.id == _TURN)
_SAMPLING_OF = sa.select(_C.sampling).where(_C.id == _TURN)
_LAST_INDEX = sa.select(sa.func.max(_C.idx).label("last")).where(_C.session == _NAME)
_TEXTS = (_C.messages, _C.tools, _C.rest, _C.reply, _C.prompt_ids)
_TEXTS_OF = sa.select(*_TEXTS).where(_C.id == _TURN)
_KNOWN_TURN = sa.select(_C.seq).where(_C.id == _TURN)
_CUT_SESSION = sa.select(_C.session).where(*_CUT_HERE).limit(1)
REPLACE_CUT = sa.update(t.turns).where(*_CUT_HERE, _C.id != _TURN).values(replaced_by=_TURN)
_SET_PLACE = sa.update(t.turns).where(_C.id == _TURN).values(place=_PLACE)


def _keys(name: str, type_: sa.types.TypeEngine[Any]) -> sa.BindParameter[Any]:
    return sa.bindparam(name, type_=ARRAY[Any](type_))


def _with_context_keys() -> sa.Select[*tuple[Any, ...]]:
    """`_WITH_CONTEXT_KEY` for several keys, with the texts and the last index of each session."""
    wanted = sa.func.unnest(_keys("keys", sa.LargeBinary())).table_valued("key").render_derived()
    rows = sa.select(*dict.fromkeys((*_CANDIDATE.selected_columns, *_TEXTS)))
    of_key = rows.where(_C.context_key == wanted.c.key, _C.replaced_by.is_(None))
    found, others = _newest(of_key).limit(_MOST_CANDIDATES).lateral("found"), t.turns.alias()
    last = sa.select(sa.func.max(others.c.idx)).where(others.c.session == found.c.session)
    columns = *found.c, last.scalar_subquery().label("last")
    query = sa.select(*columns).select_from(wanted.join(found, sa.true()))
    return query.order_by(found.c.seq.desc())


_WITH_CONTEXT_KEYS = _with_context_keys()
_STORED_OR_CUT = sa.select(
    sa.union_all(
        sa.select(_C.id, sa.null().label("place"), _C.session).where(
            _C.id == sa.any_(_keys("turns", sa.Text()))
        ),
        sa.select(_C.id, _C.place, _C.session).where(
            _C.place == sa.any_(_keys("places", sa.LargeBinary())), *_CUT_HERE[1:]
        ),
    ).subquery()
)


class Sessions:
    """Queries within a recording transaction. Turns that a retry replaced are no candidates."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self.looks_ahead = cursor.looks_ahead
        """Whether to ask ahead for several turns is worth it."""
        # What is known already, and stays true until the batch changes it:
        self._of_key: dict[bytes, list[Candidate]] = {}
        self._rows: dict[str, Any] = {}
        """Of these candidates, with their texts."""
        self._next: dict[str, int] = {}
        """The next index of their sessions."""
        self._absent: set[str] = set()
        """Turns that are not stored."""
        self._uncut: set[bytes] = set()
        """Places without a cut turn."""

    def look_ahead(self, keys: Sequence[bytes]) -> None:
        """Asks at once for the turns with these context keys, their texts and their sessions."""
        self._of_key = {key: [] for key in keys}
        for row in self._cursor.all(_WITH_CONTEXT_KEYS, keys=[*self._of_key]) if keys else ():
            self._of_key[row.context_key].append(Candidate._make(row[: len(Candidate._fields)]))
            self._rows[row.id] = row
            self._next[row.session] = row.last + 1

    def look_further(self, turns: Sequence[str], places: Sequence[bytes]) -> None:
        """Asks at once which of these turns are stored, and which places have a cut turn."""
        found = self._cursor.all(_STORED_OR_CUT, turns=[*turns], places=[*places])
        self._absent = {*turns}.difference(row.id for row in found)
        self._uncut = {*places}.difference(row.place for row in found)

    def added(self, turn: Turn, context_key: bytes | None, place: bytes | None) -> None:
        """Forgets what a new turn changes."""
        self._absent.discard(turn.id)
        self._next.pop(turn.session, None)
        if context_key is not None:
            self._of_key.pop(context_key, None)
        if place is not None:
            self._uncut.discard(place)

    def continued(self, turn: str) -> None:
        """Forgets what changes with a turn that has got a next state."""
        if (row := self._rows.get(turn)) is not None:
            self._of_key.pop(row.context_key, None)

    def replaced(self, place: bytes) -> None:
        """Forgets what changes with the cut turns at a place, unless there is none."""
        if place not in self._uncut:
            self._of_key.clear()

    def holds(self, turn: str) -> bool:
        """True if a turn is stored already, with its next states."""
        return turn not in self._absent and self._cursor.first(_KNOWN_TURN, turn=turn) is not None

    def texts_of(self, turn: str) -> set[bytes]:
        """The hashes of the texts that a stored turn uses."""
        row = self._rows.get(turn) or self._cursor.first(_TEXTS_OF, turn=turn)
        return set() if row is None else turn_texts(row)

    def with_context_key(self, key: bytes) -> list[Candidate]:
        """The newest turns with this context key."""
        known = self._of_key.get(key)
        return self._candidates(_WITH_CONTEXT_KEY, key=key) if known is None else known

    def with_context_prefix(self, prefix: bytes) -> list[Candidate]:
        """Some turns whose context key begins so."""
        vault = self._cursor.vault
        first = prefix if vault is None else vault.seal_prefix(prefix)
        last = first.ljust(PREFIX_BYTES, b"\xff")
        return self._candidates(_WITH_CONTEXT_PREFIX, first=first, last=last)

    def with_chain_key(self, key: bytes) -> list[Candidate]:
        """The newest turns with this chain key."""
        return self._candidates(_WITH_CHAIN_KEY, key=key)

    def with_reply_key(self, key: bytes) -> list[Candidate]:
        """The newest turns with this reply key."""
        return self._candidates(_WITH_REPLY_KEY, key=key)

    def parent_of(self, turn: str) -> Candidate | None:
        """The turn that a stored turn continues."""
        return next(iter(self._candidates(_PARENT_OF, turn=turn)), None)

    def last_step(self, episode: str, name: str | None) -> Candidate | None:
        """The newest main turn of an episode under the client's name for a conversation in it.

        A turn whose client did not see the end of the reply does not count.
        """
        return next(iter(self._candidates(_LAST_STEP, episode=episode, name=name)), None)

    def takes_steps(self, episode: str) -> bool:
        """Whether an episode is open."""
        row = self._cursor.first(_OF_EPISODE, episode=episode)
        return row is not None and row.state == EpisodeState.OPEN

    def said(self, turn: Candidate) -> tuple[Json, Json]:
        """(the last message of a turn's request, its reply)."""
        reply = self._cursor.first(_REPLY_OF, turn=turn.id)
        assert reply is not None
        return self.message(turn.message_hashes[-1]), self.message(reply.reply)

    def sampling(self, turn: Candidate) -> Json:
        """The sampling settings of a turn's request, its stop sequences among them."""
        row = self._cursor.first(_SAMPLING_OF, turn=turn.id)
        assert row is not None
        opened = open_column(self._cursor.vault, turn.id, "sampling", row.sampling)
        return read_json(str(opened).encode())

    def message(self, key: bytes) -> Json:
        """The stored message with this hash."""
        return read_json(one(self._cursor, key))

    def written(self, key: bytes, most: int) -> bytes | None:
        """The JSON of the stored message with this hash; None if it has more than `most` bytes."""
        return one_within(self._cursor, key, most)

    def newest_start(self, name: str, lineage: str) -> tuple[str, int] | None:
        """(session, position in the store) of the newest main conversation under a name."""
        return self._cursor.first(_NEWEST_START, name=name, lineage=lineage)

    def has_others(self, name: str, lineage: str, session: str, after: int) -> bool:
        """Whether other sessions under a name have main turns after a position in the store."""
        values = {"name": name, "lineage": lineage, "session": session, "after": after}
        return self._cursor.first(_OTHERS, **values) is not None

    def newest_of_name(self, name: str, lineage: str) -> str | None:
        """The session of a lineage's newest turn under a name."""
        row = self._cursor.first(_NEWEST_OF_NAME, name=name, lineage=lineage)
        return None if row is None else row.session

    def newest_started(self, name: str) -> str | None:
        """The session of any lineage that was started last under a name."""
        row = self._cursor.first(_NEWEST_STARTED, name=name)
        return None if row is None else row.session

    def next_index(self, session: str) -> int:
        """The index of the next turn in a session."""
        if (known := self._next.get(session)) is not None:
            return known
        row = self._cursor.first(_LAST_INDEX, name=session)
        return 0 if row is None or row.last is None else row.last + 1

    def cut_session(self, place: bytes) -> str | None:
        """The session of a turn at this place whose client did not see the end of the reply."""
        if place in self._uncut:
            return None
        row = self._cursor.first(_CUT_SESSION, at=place)
        return None if row is None else row.session

    def set_place(self, turn: str, place: bytes) -> None:
        """Stores the place of a turn whose client did not see the end of the reply."""
        self._uncut.discard(place)
        self._cursor.send(_SET_PLACE, turn=turn, at=place)

    def _candidates(self, statement: sa.ClauseElement, **values: object) -> list[Candidate]:
        return [Candidate._make(row) for row in self._cursor.all(statement, **values)]
