"""The proxy's keys: made, revoked, removed, and when each was used last."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from nextstate.errors import ConflictError, NoKeyError
from nextstate.keys import Key, Scope
from nextstate.store import schema as t
from nextstate.store.database import Database, queries

MOST_KEYS = 100
"""Keys that are in force. Each request is compared with all of them."""
_K = t.keys.c
_ALL = sa.select(t.keys).order_by(_K.created_at, _K.name)


@queries
class Keys:
    """Queries for keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, key: Key) -> None:
        """Keeps a new key. Raises ConflictError if its name is taken or there are too many."""
        values = {
            "name": key.name,
            "hash": key.hash,
            "scopes": ",".join(sorted(key.scopes)),
            "lineage": key.lineage,
            "created_at": key.created_at,
        }
        with self._database.write() as connection:
            taken = connection.execute(sa.select(_K.hash).where(_K.name == key.name)).scalar()
            if taken == key.hash:
                return  # this query has run before
            if taken is not None:
                raise ConflictError(
                    f"there was a key named {key.name!r} already: choose another name, or remove "
                    f"that one with `nextstate keys revoke {key.name} --remove`"
                )
            in_force = sa.select(sa.func.count()).where(_K.revoked_at.is_(None))
            if connection.execute(in_force).scalar_one() >= MOST_KEYS:
                raise ConflictError(
                    f"there are {MOST_KEYS} keys: revoke one that nobody uses (`nextstate keys "
                    "list`)"
                )
            connection.execute(sa.insert(t.keys).values(values))

    def all(self) -> list[Key]:
        """Every key, also revoked ones, in the order in which they were made."""
        with self._database.cursor(write=False) as cursor:
            rows = cursor.all(_ALL)
        return [
            Key(
                row.name,
                row.hash,
                # A scope of a newer program gives nothing here.
                frozenset(Scope(scope) for scope in row.scopes.split(",") if scope in {*Scope}),
                row.lineage,
                row.created_at,
                row.used_at,
                row.revoked_at,
            )
            for row in rows
        ]

    def revoke(self, name: str) -> None:
        """Takes a key out of force for good. Raises NoKeyError."""
        at = sa.func.coalesce(_K.revoked_at, self._database.now())
        self._change(name, sa.update(t.keys).values(revoked_at=at).where(_K.name == name))

    def remove(self, name: str) -> None:
        """Forgets that there was such a key. Raises NoKeyError."""
        self._change(name, sa.delete(t.keys).where(_K.name == name))

    def used(self, at: Mapping[str, float]) -> None:
        """Notes when keys were used last, by name."""
        with self._database.write() as connection:
            for name, when in at.items():
                row = sa.update(t.keys).where(_K.name == name)
                newer = sa.or_(_K.used_at.is_(None), _K.used_at < when)
                connection.execute(row.where(newer).values(used_at=when))

    def _change(self, name: str, statement: sa.Update | sa.Delete) -> None:
        with self._database.write() as connection:
            if not connection.execute(statement).rowcount:
                raise NoKeyError(f"there is no key {name!r:.80}: see `nextstate keys list`")
