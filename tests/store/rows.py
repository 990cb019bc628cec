"""Rows of a store as a test sees them, whatever its database."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from nextstate.store import Store


def select(store: Store, query: str, **values: object) -> list[sa.Row[*tuple[Any, ...]]]:
    """What an SQL query with `:name` parameters finds."""
    with store.database.read() as connection:
        return [*connection.execute(sa.text(query), values)]


def change(store: Store, statement: str, **values: object) -> None:
    """Changes rows behind the store's back."""
    with store.database.write() as connection:
        connection.execute(sa.text(statement), values)


def held_tokens(store: Store, episode: str) -> int:
    """What the calls of an episode hold that one of several workers has begun."""
    rows = select(store, "SELECT tokens FROM holds WHERE episode = :episode", episode=episode)
    return sum(row.tokens for row in rows)
