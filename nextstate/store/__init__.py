"""Where the stages meet: every record, and the work that is leased from them.

The only room with SQL. All methods are synchronous and safe to call from several threads and
processes; asynchronous callers use `asyncio.to_thread`. Work is leased with an expiry and settled,
never deleted when it is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from sqlalchemy import make_url

from nextstate import sealed_files
from nextstate.config import StoreConfig
from nextstate.errors import StoreError
from nextstate.private_files import make_state_folder
from nextstate.store.counts import SHOWN, read_counts
from nextstate.store.database import Database, Dialect
from nextstate.store.encryption import Encryption, exclusive_encryption, unlock
from nextstate.store.episodes import Episodes
from nextstate.store.forgetting import Forgetting
from nextstate.store.groups import Groups
from nextstate.store.judging import Judging
from nextstate.store.keys import Keys
from nextstate.store.ledger import Head, Ledger
from nextstate.store.lookup import Lookup
from nextstate.store.migrations import NotWholeError, is_current, migrate
from nextstate.store.recording import Content, Parts, Recording, prepared
from nextstate.store.retention import Retention
from nextstate.store.reviewing import Reviewing
from nextstate.store.roles import Roles
from nextstate.store.sqlite import SQLite, database_file
from nextstate.store.texts import Known
from nextstate.store.training import Training
from nextstate.store.turns import Turns
from nextstate.store.vault import seal_with
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
        *,
        with_key: bool = True,
    ) -> None:
        """Without `with_key`, the key of an encrypted store is not looked for.

        Then reading or writing what is sealed is a SealError: for a process that needs no texts.
        """
        self.dir = config.path
        self.config = replace(config, dir=str(self.dir))
        """With this another process opens the same store, whatever its working directory."""
        self._with_key = with_key
        self._head = Head(self.dir)
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
        self.retention = Retention(self.database)
        self.reviewing = Reviewing(self.database)
        self.training = Training(self.database)
        self.versions = Versions(self.database)
        self.episodes = Episodes(self.database)
        self.groups = Groups(self.database)
        self.workers = Workers(self.database)
        self.keys = Keys(self.database)
        self.lookup = Lookup(self.database)
        self.forgetting = Forgetting(self.database)
        self.verifying = Verifying(self.database)
        self.ledger = Ledger(self.database, self._head)
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
        try:
            with self.database.read() as connection:
                current = is_current(connection)
            if not current:
                with self.database.write() as connection:
                    try:
                        migrate(connection)
                    except NotWholeError:
                        raise
                    except StoreError as error:
                        raise StoreError(f"{self.database.name}: {error}") from error
        except NotWholeError as error:
            raise self.database.damaged(str(error)) from error
        with self.database.read() as connection:
            self.vault = unlock(connection, self.dir, self._with_key)
        sealed_files.use(self.dir, self.vault)
        if self.vault is not None:
            seal_with(self.database.engine, self.vault)
        self.database.appended = partial(self._head.note, self.database)

    def close(self) -> None:
        """Closes every connection."""
        self.database.close()

    @staticmethod
    @contextmanager
    def encryption(config: StoreConfig) -> Generator[Encryption]:
        """Opens a store that no process uses, to change how it is encrypted.

        Raises StartError if one does, and StoreError for one that is not in a file.
        """
        if config.url.startswith("postgres"):
            host = make_url(config.url).host or "this machine"
            raise StoreError(
                f"[store] url names a server ({host}), and only a store in a file can be encrypted "
                "by us: encrypt the disks of the server and of [store] dir, and reach it by TLS; "
                "`nextstate store copy` moves it into a file"
            )
        make_state_folder(config.path)
        database = Database(SQLite(database_file(config.url, config.path)), patience=Patience(0.0))
        with exclusive_encryption(database, config.path) as encryption:
            yield encryption

    @contextmanager
    def recording(self) -> Generator[Recording]:
        """One transaction in which turns are linked and added: all of them are kept or none.

        It does not wait: a store that is locked or full is a WaitError at once.
        """
        with self.database.cursor(write=True) as cursor:
            recording = Recording(cursor, self._known)
            yield recording
            recording.close()
        self._known.packed.clear()  # once it is committed: a batch that has to wait is tried again

    def prepare(self, turns: Iterable[tuple[Content, Sequence[bytes]]]) -> list[Parts]:
        """The parts of turns, each with the hashes of its messages, for the next `recording`.

        What can be done without a lock is done. Only one thread may prepare and record.
        """
        self._known.packed.clear()
        return [prepared(turn, self._known, hashes) for turn, hashes in turns]

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
            '`pip install "psycopg[binary]"`, or `make env` in a clone'
        ) from error
    return PostgreSQL(url)
