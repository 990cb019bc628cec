"""Adding turns and next states to the store, in one transaction for several of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import sqlalchemy as sa

from nextstate.records import Json, NextState, Turn
from nextstate.store import counts
from nextstate.store import schema as t
from nextstate.store.database import Cursor
from nextstate.store.packing import dump, id_runs, pack_floats, pack_ids
from nextstate.store.sessions import REPLACE_CUT, Sessions
from nextstate.store.texts import Known, Writer, content_hash
from nextstate.store.vault import seal_column
from nextstate.wire import objects, write_json

_C = t.turns.c
_THIS = _C.id == sa.bindparam("turn")
_COLUMNS: dict[str, Any] = {
    c.name: sa.bindparam(c.name) for c in _C if c.name not in ("seq", "replaced_by")
}
_ADD_TURN = sa.insert(t.turns).values(_COLUMNS)
_ADD_STATE = sa.insert(t.next_states)
_ADD_JUDGEMENT = sa.text(  # a person may have given feedback on the turn before
    "INSERT INTO judgements (turn, seq, state, not_before, attempts) "
    "SELECT id, seq, 'pending', 0.0, 0 FROM turns WHERE id = :turn ON CONFLICT DO NOTHING"
)
_VERSION: sa.BindParameter[Any] = sa.bindparam("version")
_E = t.episodes.c
_SERVED = (
    sa.update(t.episodes)
    .where(_E.id == sa.bindparam("episode"))
    .values(
        tokens=_E.tokens + sa.bindparam("tokens"),
        version_min=sa.case(
            (_E.version_min > _VERSION, _VERSION), else_=sa.func.coalesce(_E.version_min, _VERSION)
        ),
        version_max=sa.case(
            (_E.version_max < _VERSION, _VERSION), else_=sa.func.coalesce(_E.version_max, _VERSION)
        ),
    )
)
_CONTINUED = sa.update(t.turns).where(_THIS).values(continued=True)


class Content(Protocol):
    """What the parts of a turn are made of: a turn has it, and what is known before its place."""

    @property
    def request(self) -> Json: ...
    @property
    def reply(self) -> Json: ...
    @property
    def prompt_ids(self) -> tuple[int, ...] | None: ...
    @property
    def completion_ids(self) -> tuple[int, ...] | None: ...
    @property
    def behaviour_logprobs(self) -> tuple[float, ...] | None: ...
    @property
    def sampling(self) -> Json: ...


class Parts(NamedTuple):
    """What of a turn depends on its content alone, as it is stored."""

    message_hashes: Sequence[bytes]
    others: Sequence[tuple[bytes, bytes]]
    """(hash, text) of its tools if it has any, its other settings, its reply, its prompt's runs."""
    values: Mapping[str, bytes | str | None]
    """Columns that may be sealed."""


def parts_of(turn: Content, known: Known, message_hashes: Sequence[bytes] | None = None) -> Parts:
    """The parts of a turn: it needs no store, so no lock is held meanwhile."""
    if message_hashes is None:
        messages = objects(turn.request.get("messages"))
        message_hashes = [content_hash(write_json(message)) for message in messages]
    rest = {k: v for k, v in turn.request.items() if k not in ("messages", "tools")}
    again = [turn.request["tools"], rest] if "tools" in turn.request else [rest]
    reply, runs = write_json(turn.reply), id_runs(turn.prompt_ids or ())
    others = [(known.hash_of(part), part) for part in map(write_json, again)]
    others.append((content_hash(reply), reply))
    others += [(known.hash_of(run), run) for run in runs]
    values: dict[str, bytes | str | None] = {
        "completion_ids": pack_ids(turn.completion_ids),
        "behaviour_logprobs": pack_floats(turn.behaviour_logprobs),
        "sampling": dump(turn.sampling),
    }
    return Parts(message_hashes, others, values)


def prepared(turn: Content, known: Known, message_hashes: Sequence[bytes]) -> Parts:
    """The same, with what seems to be new compressed for the transaction that adds the turn.

    What is before the last assistant message is most likely the parent's, and so are all but the
    last runs of ids, whether this process knows them or not.
    """
    parts = parts_of(turn, known, message_hashes)
    messages = objects(turn.request.get("messages"))
    said = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
    start = said[-1] if said else 0
    for key, message in zip(message_hashes[start:], messages[start:], strict=True):
        if key not in known.hashes:
            known.pack(key, write_json(message))
    for key, text in (*parts.others[:3], *parts.others[-2:]) if said else parts.others:
        known.pack(key, text)
    return parts


class Recording:
    """An open recording transaction: see `Store.recording`."""

    def __init__(self, cursor: Cursor, known: Known) -> None:
        self.sessions = Sessions(cursor)
        """Where a turn stands, as the store knows it."""
        self._cursor = cursor
        self.known = known
        """What this process believes to be stored."""
        self._texts = Writer(cursor, known)
        self._added: Counter[str] = Counter()
        """The turns that were added, by the keys under which they count."""

    def close(self) -> None:
        """Ends what was added; the transaction is committed after it."""
        self._texts.close()
        self._count_added()

    def holds(self, turn: str) -> bool:
        """True if a turn is stored already, with its next states."""
        return self.sessions.holds(turn)

    def add_turn(
        self,
        turn: Turn,
        chain_key: bytes,
        reply_key: bytes,
        *,
        context_key: bytes | None = None,
        client_session: str | None = None,
        place: bytes | None = None,
        parts: Parts | None = None,
        tokens: int = 0,
    ) -> None:
        """Adds a turn with the keys by which a request that continues it is found.

        `place` is the place of a turn whose client did not see the end of the reply: a retry is
        found by it. `parts` are the turn's, if they were made before.
        `tokens` are those of the reply, which count for its episode.
        """
        if parts is None:
            parts = parts_of(turn, self.known)
        used = set[bytes]() if turn.parent is None else self.sessions.texts_of(turn.parent)
        messages = objects(turn.request.get("messages"))
        for key, message in zip(parts.message_hashes, messages, strict=True):
            if key not in used:
                used.add(self._texts.put(write_json(message), key))
        for key, part in parts.others:
            if key not in used:
                used.add(self._texts.put(part, key))
        other_hashes = [key for key, _ in parts.others]
        for key in (*parts.message_hashes, *other_hashes):  # those that the parent uses, too
            if not self.known.has(key):
                self.known.add(key)
        of_tools = other_hashes.pop(0) if "tools" in turn.request else None
        vault = self._cursor.vault
        sealed = {k: seal_column(vault, turn.id, k, value) for k, value in parts.values.items()}
        self._cursor.send(
            _ADD_TURN,
            id=turn.id,
            session=turn.session,
            idx=turn.index,
            kind=turn.kind.value,
            lineage=turn.lineage,
            policy_version=turn.policy_version,
            client_model=turn.client_model,
            messages=b"".join(parts.message_hashes),
            tools=of_tools,
            rest=other_hashes[0],
            reply=other_hashes[1],
            finish_reason=turn.finish_reason,
            prompt_ids=None if turn.prompt_ids is None else b"".join(other_hashes[2:]),
            **sealed,
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
            context_key=context_key,
            episode=turn.episode,
            step=turn.step,
            client=turn.client,
            engine=turn.engine,
        )
        self.sessions.added(turn, context_key, place)
        self._added.update(counts.keys_of_new(turn))
        if turn.episode is not None:
            self._cursor.send(
                _SERVED, episode=turn.episode, tokens=tokens, version=turn.policy_version
            )

    def replace_cut(self, place: bytes, turn: str) -> None:
        """Lets `turn` replace the cut turns at the same place."""
        self._count_added()  # before a trigger counts less
        self.sessions.replaced(place)
        self._cursor.send(REPLACE_CUT, at=place, turn=turn)

    def add_next_states(self, turn: str, judge: bool, states: Sequence[NextState]) -> None:
        """Adds what followed `turn` and, if `judge`, the judge's work for it."""
        if not states:
            return
        for seq, state in enumerate(states):
            self._cursor.later(
                _ADD_STATE,
                turn=turn,
                seq=seq,
                source=state.source.value,
                text=self._texts.put(state.text.encode()),
                trust=state.trust,
            )
        self._cursor.send(_CONTINUED, turn=turn)
        self.sessions.continued(turn)
        if judge:
            self._cursor.later(_ADD_JUDGEMENT, turn=turn)

    def _count_added(self) -> None:
        if self._added:
            rows = [{"area": "turns", "key": key, "more": n} for key, n in self._added.items()]
            self._cursor.run_many(counts.ADD, rows)
            self._added.clear()
