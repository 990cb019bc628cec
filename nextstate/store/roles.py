"""Roles that one process has at a time, wherever it runs, such as the learner of a lineage.

On one machine a lock on a file is enough (nextstate/process_lock.py): the kernel ends it with its
process. A database on a server gives a lock too, but that ends with a connection: a process that
was cut off may still run, and write once it is back, while another one has its role. So each holder
gets a number, the role's epoch, and every write transaction of its `Database` looks whether that is
still the newest.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager

import sqlalchemy as sa

from nextstate.errors import TakenError
from nextstate.store import schema as t
from nextstate.store.database import Database

_R = t.roles.c


class Roles:
    """The roles of this process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @contextmanager
    def hold(self, name: str, taken: str, remedy: str) -> Generator[None]:
        """Has the role for as long as the block runs, where the database is shared by machines.

        Raises TakenError, "{taken} by NAME OF A MACHINE: {remedy}", if another process has it.
        """
        with self._database.exclusive(name) as got:
            if got is False:
                holder = self._database.waiting(lambda: self._holder(name))
                raise TakenError(f"{taken} by {holder}: {remedy}")
            if got:
                self._database.epochs[name] = self._database.waiting(lambda: self._take(name))
            try:
                yield
            finally:
                self._database.epochs.pop(name, None)

    def _holder(self, name: str) -> str:
        with self._database.read() as connection:
            found = connection.execute(sa.select(_R.holder).where(_R.name == name))
            return found.scalar() or "another process"

    def _take(self, name: str) -> int:
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        with self._database.write() as connection:
            known = connection.execute(sa.select(_R.epoch).where(_R.name == name)).scalar()
            epoch = (known or 0) + 1
            values = {"epoch": epoch, "holder": holder, "since": self._database.now()}
            row = self._database.insert(t.roles).values(name=name, **values)
            connection.execute(row.on_conflict_do_update(index_elements=["name"], set_=values))
        return epoch
