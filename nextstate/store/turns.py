"""Reading turns back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from nextstate.episodes import Split
from nextstate.records import Json, NextState, Source, Timings, Turn, TurnKind
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.database import Database, queries
from nextstate.store.packing import join_runs, unpack_floats, unpack_ids
from nextstate.store.texts import hashes
from nextstate.store.vault import open_column, vault_of
from nextstate.wire import read_json


class Exported(NamedTuple):
    """A turn on its way out of the store."""

    position: int
    id: str
    parent: str | None
    request: bytes
    """Equal for requests with the same messages and tools."""
    score: int | None
    """What a person or the judge's votes said; None without a verdict."""
    imported: bool


@queries
class Turns:
    """Queries for recorded turns and for what followed them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, turn_id: str) -> Turn | None:
        """One turn with its whole request, or None."""
        with self._database.read() as connection:
            return load_turn(connection, turn_id)

    def lineage(self, turn_id: str) -> str | None:
        """The lineage of a turn; None when there is no such turn."""
        with self._database.read() as connection:
            query = sa.select(t.turns.c.lineage).where(t.turns.c.id == turn_id)
            return connection.execute(query).scalar()

    def next_states(self, turn_id: str) -> tuple[NextState, ...]:
        """What followed the turn, in order."""
        with self._database.read() as connection:
            return load_next_states(connection, turn_id)

    def ids(self, limit: int | None = None, newest_first: bool = False) -> list[str]:
        """Turn ids in the order of recording, without cut turns that a retry replaced."""
        order = t.turns.c.seq.desc() if newest_first else t.turns.c.seq
        kept = sa.select(t.turns.c.id).where(t.turns.c.replaced_by.is_(None))
        with self._database.read() as connection:
            return list(connection.execute(kept.order_by(order).limit(limit)).scalars())

    def of_session(self, name: str, lineages: Collection[str], most: int) -> list[str]:
        """Ids of up to `most` turns of a session, by our name for it, oldest first."""
        c = t.turns.c
        query = sa.select(c.id).where(c.session == name, c.lineage.in_(lineages))
        with self._database.read() as connection:
            return list(connection.execute(query.order_by(c.seq).limit(most)).scalars())

    def after(
        self, position: int, limit: int, lineage: str | None = None, *, imported: bool = False
    ) -> list[Exported]:
        """The next main turns in the order of recording; begin with position 0.

        Without cut turns that a retry replaced, and without those of held-out episodes. With
        `imported`, also what was imported.
        """
        c, v, e = t.turns.c, t.verdicts.c, t.episodes.c
        kinds = (TurnKind.MAIN, TurnKind.IMPORTED) if imported else (TurnKind.MAIN,)
        held_out = sa.exists().where(e.id == c.episode, e.split == Split.EVAL)
        query = (
            sa.select(c.seq, c.id, c.kind, c.parent, c.messages, c.tools, v.score)
            .outerjoin(t.verdicts, v.turn == c.id)
            .where(c.seq > position, c.kind.in_(kinds), c.replaced_by.is_(None), ~held_out)
            .order_by(c.seq)
            .limit(limit)
        )
        if lineage is not None:
            query = query.where(c.lineage == lineage)
        with self._database.read() as connection:
            return [
                Exported(
                    row.seq,
                    row.id,
                    row.parent,
                    texts.content_hash(row.messages + (row.tools or b"")),
                    row.score,
                    row.kind == TurnKind.IMPORTED,
                )
                for row in connection.execute(query)
            ]

    def last(self) -> int:
        """The position of the newest turn; 0 without any."""
        with self._database.read() as connection:
            return connection.execute(sa.select(sa.func.max(t.turns.c.seq))).scalar() or 0

    def newest(self, names: Sequence[str], lineages: Sequence[str] | None = None) -> str | None:
        """The newest main turn of the sessions that have one of `names`; None without any.

        A name is ours for a session, or the client's own, which may stand for several of them.
        Only turns of `lineages` count, if given. A turn that a retry replaced does not count.
        """
        c = t.turns.c
        counting = [c.kind == TurnKind.MAIN, c.replaced_by.is_(None)]
        if lineages is not None:
            counting.append(c.lineage.in_(lineages))
        # One query a name reads the end of an index; one for all names would have to sort.
        found: list[tuple[int, str]] = []
        with self._database.read() as connection:
            for name in names:
                for column, order in ((c.session, c.idx), (c.client_session, c.seq)):
                    query = sa.select(c.seq, c.id).where(column == name, *counting)
                    newest = connection.execute(query.order_by(order.desc()).limit(1)).first()
                    found += [] if newest is None else [(newest.seq, newest.id)]
        return max(found)[1] if found else None


def load_turn(connection: sa.Connection, turn_id: str) -> Turn | None:
    """One turn, or None."""
    row = connection.execute(sa.select(t.turns).where(t.turns.c.id == turn_id)).first()
    if row is None:
        return None
    found = texts.get(connection, turn_texts(row))
    opened = turn_values(connection, row)
    request: Json = {"messages": [read_json(found[key]) for key in hashes(row.messages)]}
    request.update(read_json(found[row.rest]))
    if row.tools is not None:
        request["tools"] = read_json(found[row.tools])
    return Turn(
        id=row.id,
        session=row.session,
        index=row.idx,
        kind=TurnKind(row.kind),
        lineage=row.lineage,
        policy_version=row.policy_version,
        client_model=row.client_model,
        request=request,
        reply=read_json(found[row.reply]),
        finish_reason=row.finish_reason,
        prompt_ids=join_runs(row.prompt_ids, found),
        completion_ids=unpack_ids(opened["completion_ids"]),
        behaviour_logprobs=unpack_floats(opened["behaviour_logprobs"]),
        sampling=read_json(opened["sampling"].encode()),
        timings=Timings(row.started_at, row.first_token_s, row.total_s),
        untrainable=row.untrainable,
        parent=row.parent,
        episode=row.episode,
        step=row.step,
        client=row.client,
        engine=row.engine,
    )


def turn_values(connection: sa.Connection, row: Any) -> dict[str, Any]:
    """Those columns of a row of `turns` that are values, opened."""
    vault = vault_of(connection.dialect)
    return {
        name: open_column(vault, row.id, name, getattr(row, name)) for name in t.VALUES["turns"]
    }


def turn_texts(row: Any) -> set[bytes]:
    """The hashes of the texts that a row of `turns` refers to."""
    found = {row.rest, row.reply, *hashes(row.messages), *hashes(row.prompt_ids or b"")}
    return found if row.tools is None else {*found, row.tools}


def load_next_states(connection: sa.Connection, turn_id: str) -> tuple[NextState, ...]:
    """What followed a turn, in order."""
    n = t.next_states.c
    query = sa.select(t.next_states).where(n.turn == turn_id).order_by(n.seq)
    rows = connection.execute(query).all()
    found = texts.get(connection, (row.text for row in rows))
    return tuple(
        NextState(row.turn, Source(row.source), found[row.text].decode(), row.trust) for row in rows
    )
