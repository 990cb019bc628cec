"""What each proxy worker said last: that it lives, which adapters it uses, what it counted."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

import orjson
import sqlalchemy as sa

from nextstate.config import StoreConfig
from nextstate.store import schema as t
from nextstate.store.database import Database, queries
from nextstate.store.packing import dump

SILENT_S = 10.0
"""A worker that was silent for longer counts as dead."""
_FORGOTTEN_S = 3600.0


def name_of(worker: int | None, store: StoreConfig, port: int) -> str | None:
    """What the other proxies of a store know one by; None if there can be no other.

    `worker` is its number among those of its process. Where proxies of other machines may use the
    store too, those of one machine and port end with the same "@HOST:PORT".
    """
    if store.url:
        return f"{os.getpid()}@{socket.gethostname()}:{port}"
    return None if worker is None else str(worker)


@queries
class Workers:
    """Queries for the proxy's workers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def beat(self, worker: str, adapters: Sequence[str], counts: Mapping[str, float]) -> None:
        """Notes that a worker lives, which adapters it uses and what it has counted."""
        values = {
            "beat": self._database.now(),
            "adapters": dump(list(adapters)),
            "counts": dump(dict(counts)),
        }
        row = self._database.insert(t.workers).values(id=worker, **values)
        with self._database.write() as connection:
            connection.execute(row.on_conflict_do_update(index_elements=["id"], set_=values))

    def leave(self, worker: str) -> None:
        """Notes that a worker has ended, and forgets those that did so without a word.

        What they held of episodes' tokens is free.
        """
        w, h = t.workers.c, t.holds.c
        gone = sa.or_(w.id == worker, w.beat < self._database.now() - _FORGOTTEN_S)
        with self._database.write() as connection:
            connection.execute(sa.delete(t.workers).where(gone))
            connection.execute(sa.delete(t.holds).where(h.worker.not_in(sa.select(w.id))))

    def others(self, worker: str, of: str = "") -> list[tuple[list[str], dict[str, float]]]:
        """What each other living worker said last: the adapters it uses, and its counts.

        `of`: only of those whose names end so.
        """
        w = t.workers.c
        query = sa.select(w.adapters, w.counts)
        alive = query.where(w.id != worker, w.beat >= self._database.now() - SILENT_S)
        if of:
            alive = alive.where(w.id.endswith(of, autoescape=True))
        with self._database.read() as connection:
            rows = connection.execute(alive).all()
        return [(orjson.loads(row.adapters), orjson.loads(row.counts)) for row in rows]
