"""Adding turns to the store: how a request finds the turn that it continues, and what is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
import sqlalchemy as sa

from nextstate.records import NextState, Turn, TurnKind
from nextstate.store import schema as t
from nextstate.store.database import Cursor, Prepared
from nextstate.store.packing import dump, id_runs, pack_floats, pack_ids
from nextstate.store.texts import HASH_BYTES, Known, Writer, content_hash, hashes
from nextstate.store.turns import turn_texts
from nextstate.wire import objects, write_json

_MOST_CANDIDATES = 16
SETTING_BYTES, EXACT_BYTES = 8, 8
SAID_BYTES = HASH_BYTES + SETTING_BYTES + EXACT_BYTES
"""A key of what was said: of the words, the system's setting, the messages to the letter."""


@dataclass(frozen=True, slots=True)
class Link:
    """How a request is recognised as the continuation of a turn; keys and hashes are digests."""

    chain_key: bytes
    """Of all assistant messages in the request's history."""
    reply_key: bytes | None
    """Of the last assistant message alone; None if it is empty, as many are."""
    message_hashes: tuple[bytes, ...]
    """Of every message before that one, to choose among turns with identical replies."""
    said_key: bytes | None = None
    """Of the chain and what was said before its last reply: 16 bytes of the words, 8 of the system
    but for its clock, 8 of the messages to the letter. None if nothing was said."""
    told: tuple[bytes, ...] = ()
    """Of what was said, message by message: what a request must have in common with a turn."""
    telling: bool = False
    """True if the last reply is so long that hardly anybody else gets the same."""
    longer: tuple[Link, ...] = ()
    """The same if more of the last messages are one reply, which the agent cut into several."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The turn that a request continues."""

    id: str
    session: str
    index: int
    kind: TurnKind
    continued: bool
    """True when another request has already given it a next state."""
    at: int | None = None
    """Which message of the request that was looked for begins the turn's reply."""


_C = t.turns.c
_PARENT_COLUMNS = (_C.id, _C.session, _C.idx, _C.kind, _C.continued)
_ABOVE = sa.select(_C.parent).where(_C.id == sa.bindparam("turn")).scalar_subquery()
_CUT_HERE = (_C.place == sa.bindparam("here"), _C.replaced_by.is_(None), _C.continued.is_(False))
_OF_CLIENT = sa.select(_C.session, _C.idx).where(_C.client_session == sa.bindparam("name"))
_IN_LINEAGE = _C.lineage == sa.bindparam("lineage")
_MAIN = _C.kind == TurnKind.MAIN.value
_THEIRS = (_C.client_session == sa.bindparam("name"), _IN_LINEAGE, _MAIN)


def _candidates(*where: sa.ColumnElement[bool]) -> sa.Select[*tuple[Any, ...]]:
    query = sa.select(
        *_PARENT_COLUMNS,
        *(_C.messages, _C.reply_key, _C.said_key, _C.seq),
    )
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
        self.above = prepared(sa.select(*_PARENT_COLUMNS).where(_C.id == _ABOVE))
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
        self.parent_of = prepared(sa.select(_C.parent).where(_C.id == sa.bindparam("turn")))
        placed = sa.update(t.turns).where(_C.id == sa.bindparam("turn"))
        self.set_place = prepared(placed.values(place=sa.bindparam("here")))
        last = sa.select(sa.func.max(_C.idx).label("last")).where(
            _C.session == sa.bindparam("name")
        )
        self.last_index = prepared(last)
        of_turn = sa.select(_C.messages, _C.tools, _C.rest, _C.reply, _C.prompt_ids)
        self.texts_of = prepared(of_turn.where(_C.id == sa.bindparam("turn")))
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


@lru_cache(maxsize=4)
def _statements(dialect: sa.Dialect) -> _Statements:
    return _Statements(dialect)


def scoped(key: bytes, lineage: str, client_session: str | None) -> bytes:
    """A link key within one lineage and one client's name for a session: others never match it."""
    scope = orjson.dumps([lineage, client_session])
    return hashlib.blake2b(scope + key, digest_size=HASH_BYTES).digest()


def scoped_said(key: bytes, lineage: str, client_session: str | None) -> bytes:
    """The key of what was said, likewise; what stands after the words stays as it is."""
    return scoped(key[:HASH_BYTES], lineage, client_session) + key[HASH_BYTES:]


class Recording:
    """An open recording transaction: see `Store.recording`."""

    def __init__(self, cursor: Cursor, known: Known) -> None:
        self.unsure = False
        """Whether the turn that was looked for last is one of several and none is surely it."""
        self._cursor = cursor
        self._statements = _statements(cursor.dialect)
        self._texts = Writer(cursor, known)

    def parent(
        self, lineage: str, link: Link, client_session: str | None, *, own_name: bool = True
    ) -> Parent | None:
        """The turn that a request with this link continues, under the client's name if it has one.

        First come turns whose whole chain of replies agrees and before which the same was said, to
        the letter or at least in words; then those whose chain agrees; then those with the same
        last reply (the agent may have cut its history). Where what was said differs, something of
        it must be the same, for strangers get the same replies too. If nothing is, only a telling
        reply will do, or a name under which one conversation alone goes on; `own_name` is false of
        a name that is a person's or an app's.

        Among those found, the one with most in common wins, then one that nothing has continued
        yet, then the newest; but if several conversations have as much in common and are not all
        alike, it is none of them. `unsure` then says that there were some.
        """
        self.unsure = False
        for rows in self._alike(lineage, link, client_session, own_name):
            if rows:
                best = _surest(rows, link)
                self.unsure = best is None
                if best is None:
                    return None
                return replace(_parent(best), at=_begins_at(link, best, lineage, client_session))
        return None

    def _alike(
        self, lineage: str, link: Link, client_session: str | None, own_name: bool
    ) -> Iterator[list[_Candidate]]:
        """The turns that a request may continue, the likeliest first."""

        def sharing(rows: list[_Candidate], told: Sequence[bytes]) -> list[_Candidate]:
            shared = [row for row in rows if _in_common(row, told)]
            if shared or not rows or link.telling:
                return shared or rows
            name = client_session
            self.unsure = name is None or not self._one_conversation(lineage, name, own_name)
            return [] if self.unsure else rows

        links = (link, *link.longer)
        keys = [scoped_said(one.said_key, lineage, client_session) for one in links if one.said_key]
        for key in keys[:1]:
            yield self._candidates(self._statements.by_said, key=key)
        key = scoped(link.chain_key, lineage, client_session)
        of_chain = self._candidates(self._statements.by_chain, key=key)
        if of_chain:
            for key in keys[1:]:
                yield self._candidates(self._statements.by_said, key=key)
            for key in keys:
                setting = key[: HASH_BYTES + SETTING_BYTES]
                yield [row for row in of_chain if (row.said_key or b"").startswith(setting)]
                yield self._beginning(setting)
            for key in keys:
                yield self._beginning(key[:HASH_BYTES])
            yield sharing(of_chain, link.told)
        for one in links:
            if one.reply_key is not None:
                key = scoped(one.reply_key, lineage, client_session)
                # Of a history that was cut, what stood before the reply is left.
                of_reply = self._candidates(self._statements.by_reply, key=key)
                yield sharing(of_reply, one.told[-1:])

    def _beginning(self, words: bytes) -> list[_Candidate]:
        last = words.ljust(SAID_BYTES, b"\xff")
        return self._candidates(self._statements.by_words, key=words, last=last)

    def _candidates(self, statement: Prepared, **values: object) -> list[_Candidate]:
        return self._cursor.all(statement, **values)

    def _one_conversation(self, lineage: str, name: str, own_name: bool) -> bool:
        """Whether one conversation alone goes on under a client's name.

        That is of a name of its own the last that began, if no other went on since: an agent that
        resets a chat keeps its name. Under other names it is the only one that there was.
        """
        begun = self._cursor.first(self._statements.last_begun, name=name, lineage=lineage)
        if begun is None:
            return True
        since = {"begun": begun.session, "since": begun.seq if own_name else 0}
        return (
            self._cursor.first(self._statements.others, name=name, lineage=lineage, **since) is None
        )

    def main_ancestor(self, turn: Parent) -> Parent | None:
        """The newest main turn that a side turn goes back to."""
        found: Parent | None = turn
        while found is not None and found.kind is not TurnKind.MAIN:
            row = self._cursor.first(self._statements.above, turn=found.id)
            found = None if row is None else _parent(row)
        return found

    def session(self, lineage: str, client_session: str, *, fresh: bool) -> str:
        """The session of a turn that continues none: the client's own name for it, where free.

        A client may use one name for many conversations (`user`, or a chat that was reset), and so
        may clients of several lineages: each further one that starts `fresh`, with nothing from the
        assistant in it, is named `name~2`, `name~3`, … One that does not is taken for the lineage's
        newest of them, its history rewritten.
        """
        newest = self._cursor.first(
            self._statements.newest_of_client, name=client_session, lineage=lineage
        )
        if newest is not None and not fresh:
            return newest.session
        started = self._cursor.first(self._statements.last_started, name=client_session)
        found = "" if started is None else started.session.removeprefix(f"{client_session}~")
        number = int(found) if found.isdecimal() else 1
        session = client_session
        while self.next_index(session):  # also where a client has named one `name~2` itself
            number += 1
            session = f"{client_session}~{number}"
        return session

    def cut_session(self, place: bytes) -> str | None:
        """The session of a turn at this place whose reply never came to an end, if there is one."""
        row = self._cursor.first(self._statements.cut_here, here=place)
        return None if row is None else row.session

    def replace_cut(self, place: bytes, turn: str) -> None:
        """Lets `turn` stand for the turns at the same place whose replies never came to an end."""
        self._cursor.run(self._statements.replace_cut, here=place, turn=turn)

    def set_place(self, turn: str, place: bytes) -> None:
        """Says where a stored turn stands: the client did not see the end of its reply."""
        self._cursor.run(self._statements.set_place, turn=turn, here=place)

    def parent_of(self, turn: str) -> str | None:
        """The turn that a stored turn continues."""
        row = self._cursor.first(self._statements.parent_of, turn=turn)
        return None if row is None else row.parent

    def holds(self, turn: str) -> bool:
        """Whether a turn is stored already, and with it its next states."""
        return self._cursor.first(self._statements.known_turn, turn=turn) is not None

    def next_index(self, session: str) -> int:
        """The position of the next turn in a session."""
        row = self._cursor.first(self._statements.last_index, name=session)
        return 0 if row is None or row.last is None else row.last + 1

    def add_turn(
        self,
        turn: Turn,
        chain_key: bytes,
        reply_key: bytes,
        *,
        said_key: bytes | None = None,
        client_session: str | None = None,
        place: bytes | None = None,
        message_hashes: Sequence[bytes] | None = None,
    ) -> None:
        """Adds a turn; `chain_key`, `reply_key` and `said_key` are those of its own reply.

        `place` is where it stands if the client saw no end of its reply: a retry is found by it.
        `message_hashes` are those of the request's messages, where they are known already.
        """
        messages = objects(turn.request.get("messages"))
        rest = {k: v for k, v in turn.request.items() if k not in ("messages", "tools")}
        tools = write_json(turn.request["tools"]) if "tools" in turn.request else None
        if message_hashes is None:
            message_hashes = [content_hash(write_json(message)) for message in messages]
        of_rest, of_reply = write_json(rest), write_json(turn.reply)
        runs = id_runs(turn.prompt_ids or ())
        others = [part for part in (tools, of_rest, of_reply, *runs) if part is not None]
        other_hashes = [content_hash(part) for part in others]
        used = self._texts_of(turn.parent)
        for key, message in zip(message_hashes, messages, strict=True):
            if key not in used:
                used.add(self._texts.put(write_json(message), key))
        for key, part in zip(other_hashes, others, strict=True):
            if key not in used:
                used.add(self._texts.put(part, key))
        of_tools = [] if tools is None else [other_hashes.pop(0)]
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
            tools=of_tools[0] if of_tools else None,
            rest=other_hashes[0],
            reply=other_hashes[1],
            finish_reason=turn.finish_reason,
            prompt_ids=None if turn.prompt_ids is None else b"".join(other_hashes[2:]),
            completion_ids=pack_ids(turn.completion_ids),
            behaviour_logprobs=pack_floats(turn.behaviour_logprobs),
            sampling=dump(turn.sampling),
            started_at=turn.timings.started_at,
            first_token_s=turn.timings.first_token_s,
            total_s=turn.timings.total_s,
            untrainable=turn.untrainable,
            parent=turn.parent,
            continued=False,
            chain_key=scoped(chain_key, turn.lineage, client_session),
            reply_key=scoped(reply_key, turn.lineage, client_session),
            client_session=client_session,
            place=place,
            said_key=None
            if said_key is None
            else scoped_said(said_key, turn.lineage, client_session),
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
                text=self._texts.put(state.text.encode()),
                trust=state.trust,
            )
        self._cursor.run(self._statements.continued, turn=turn)
        if judge:
            self._cursor.run(self._statements.add_judgement, turn=turn)

    def _texts_of(self, turn: str | None) -> set[bytes]:
        """The hashes of the texts that a stored turn uses, or that the turn it continues uses."""
        row = None if turn is None else self._cursor.first(self._statements.texts_of, turn=turn)
        return set() if row is None else turn_texts(row)


class _Candidate(NamedTuple):
    """A turn that a request may continue."""

    id: str
    session: str
    idx: int
    kind: str
    continued: bool
    messages: bytes
    reply_key: bytes
    said_key: bytes | None
    seq: int


def _in_common(row: _Candidate, told: Sequence[bytes]) -> int:
    """How many of the messages that were told before a reply were told before this turn's, too."""
    return len(frozenset(told).intersection(hashes(row.messages)))


def _surest(rows: Sequence[_Candidate], link: Link) -> _Candidate | None:
    """The turn that has most in common with a request; None if it may as well be a stranger's."""
    setting = _setting(link.said_key)
    marks = [(_in_common(row, link.told), _setting(row.said_key) == setting) for row in rows]
    top = [row for row, mark in zip(rows, marks, strict=True) if mark == max(marks)]
    kinds = {row.said_key[:-EXACT_BYTES] if row.said_key else row.messages for row in top}
    if len(kinds) > 1 and len({row.session for row in top}) > 1:
        return None
    return max(top, key=lambda row: (not row.continued, row.seq))


def _setting(said_key: bytes | None) -> bytes | None:
    return said_key and said_key[HASH_BYTES : HASH_BYTES + SETTING_BYTES]


def _begins_at(link: Link, row: _Candidate, lineage: str, client_session: str | None) -> int:
    """Which message of a request begins the reply of the turn that it continues."""
    for one in (link, *link.longer):
        reply_key = one.reply_key and scoped(one.reply_key, lineage, client_session)
        if reply_key == row.reply_key:
            return len(one.message_hashes)
    return len(link.message_hashes)  # the last holds more than this reply


def _parent(row: Any) -> Parent:
    return Parent(row.id, row.session, row.idx, TurnKind(row.kind), bool(row.continued))
