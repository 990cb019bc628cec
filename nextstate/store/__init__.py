"""Where the stages meet: every record, and the work that is leased from them.

The only room with SQL. All methods are synchronous and safe to call from several threads and
processes; asynchronous callers use `asyncio.to_thread`. Work is leased with an expiry and settled,
never deleted when it is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nextstate.config import StoreConfig
from nextstate.errors import StoreError
from nextstate.private_files import make_state_folder
from nextstate.store.counts import SHOWN, read_counts
from nextstate.store.database import Database, Dialect
from nextstate.store.episodes import Episodes
from nextstate.store.forgetting import Forgetting
from nextstate.store.groups import Groups
from nextstate.store.judging import Judging
from nextstate.store.keys import Keys
from nextstate.store.ledger import Ledger
from nextstate.store.lookup import Lookup
from nextstate.store.migrations import is_current, migrate
from nextstate.store.recording import Recording
from nextstate.store.roles import Roles
from nextstate.store.sqlite import SQLite, database_file
from nextstate.store.texts import Known
from nextstate.store.training import Training
from nextstate.store.turns import Turns
from nextstate.store.verifying import Verifying
from nextstate.store.versions import Versions
from nextstate.store.waiting import Patience
from nextstate.store.workers import Workers


class Store:
    """The database of one state folder, with the queries of each customer.

    A query is one transaction. While the database is locked or its disk is full, it is tried again
    until `patience` ends with a WaitError. Every other failure is a StoreError.
    """

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float] | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.dir = config.path
        self.config = replace(config, dir=str(self.dir))
        """With this another process opens the same store, whatever its working directory."""
        self.database = Database(_dialect(config.url, self.dir), clock, patience)
        try:
            self.database.waiting(self._open)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"[store] dir = {config.dir!r} cannot hold the store: {error}; "
                "name a folder that you may write to"
            ) from error
        self.turns = Turns(self.database)
        self.judging = Judging(self.database)
        self.training = Training(self.database)
        self.versions = Versions(self.database)
        self.episodes = Episodes(self.database)
        self.groups = Groups(self.database)
        self.workers = Workers(self.database)
        self.keys = Keys(self.database)
        self.lookup = Lookup(self.database)
        self.forgetting = Forgetting(self.database)
        self.verifying = Verifying(self.database)
        self.ledger = Ledger(self.database)
        self.roles = Roles(self.database)
        self._known = Known()

    def _open(self) -> None:
        make_state_folder(self.dir)
        self.database.open()
        try:
            self._bring_up()
        except BaseException:
            self.database.close()
            raise

    def _bring_up(self) -> None:
        with self.database.read() as connection:
            if is_current(connection):
                return
        with self.database.write() as connection:
            try:
                migrate(connection)
            except StoreError as error:
                raise StoreError(f"{self.database.name}: {error}") from error

    def close(self) -> None:
        """Closes every connection."""
        self.database.close()

    @contextmanager
    def recording(self) -> Generator[Recording]:
        """One transaction in which turns are linked and added: all of them are kept or none.

        It does not wait: a store that is locked or full is a WaitError at once.
        """
        with self.database.cursor(write=True) as cursor:
            recording = Recording(cursor, self._known)
            yield recording
            recording.close()

    def counts(self) -> dict[str, int]:
        """How many records there are of each kind and state, under `area/what` names."""

        def read() -> dict[str, int]:
            with self.database.read() as connection:
                return {f"{a}/{key}": n for a in SHOWN for key, n in read_counts(connection, a)}

        return {"turns/trainable": 0} | self.database.waiting(read)

    def checkpoint(self) -> None:
        """Moves what was committed into the database's own file, if that is a lot by now."""
        self.database.waiting(self.database.checkpoint)

    def compact(self) -> None:
        """Writes the database anew, so that nothing that was deleted is left in its files.

        Everybody else waits meanwhile. It needs as much room again as the database has.
        """
        self.database.waiting(self.database.compact)


def _dialect(url: str, folder: Path) -> Dialect:
    """The database that `[store] url` names. Raises StoreError."""
    if not url.startswith(("postgresql:", "postgres:")):
        return SQLite(database_file(url, folder))
    try:
        from nextstate.store.postgresql import PostgreSQL
    except ImportError as error:
        raise StoreError(
            f"[store] url names a PostgreSQL database, and its driver is missing ({error}): "
            '`pip install "nextstate[postgres]"`, or `make postgres` in a clone'
        ) from error
    return PostgreSQL(url)
