"""The writer: a process that commits finished exchanges as turns.

    python -P -m proxy.writer FD

FD is a stream socket to the proxy's recorder. Standard input holds a pickled (`StoreConfig`, name
of the agent profile, `Redactor`, hosts that may be reached). The recorder sends pickled exchanges,
each after its length. The writer commits all that have arrived in one transaction, and answers each
with one byte, in the order of arrival. The recorder may send an exchange again that an earlier
writer did not answer: its turn is stored once.

When the proxy closes its end, or is killed, the writer commits what has arrived whole, and ends. It
ignores SIGINT and SIGTERM: the proxy gets them too, and closes its end once all is committed.
"""

from __future__ import annotations

import gc
import logging
import pickle
import signal
import socket
import struct
import sys
from contextlib import suppress
from enum import IntEnum

from nextstate import logs
from nextstate.config import StoreConfig
from nextstate.egress import guard
from nextstate.errors import WaitError
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.private_files import only_for_owner
from nextstate.records import Turn
from nextstate.redaction import NOTHING, Redactor
from nextstate.redaction.names import HiddenNames
from nextstate.store import Store
from nextstate.store.recording import Recording
from nextstate.store.waiting import Patience
from nextstate.tracing import tracing
from proxy.exchange import (
    Exchange,
    Read,
    amend_exchange,
    look_ahead,
    prepared,
    read_exchange,
    record,
)
from proxy.linking.history import RememberedMessages
from proxy.redacting import Known

log = logging.getLogger(__name__)

LENGTH = struct.Struct("<I")
"""Precedes each exchange: its size in bytes."""
_RECEIVE_BYTES = 1 << 20
_MAX_BATCH = 256
"""Exchanges in one transaction. Their replies all wait for its commit."""
_OBJECTS_BETWEEN_COLLECTIONS = 50_000
"""For the garbage collector: exchanges hold many objects and no cycles."""


class Answer(IntEnum):
    """What the writer tells the recorder, in one byte."""

    READY = 0
    """The writer runs; sent once, before all others."""
    BLOCKED = 1
    """The store is locked or its disk is full: what has arrived waits."""
    KEPT = 2
    """An exchange is stored as a turn."""
    AMENDED = 3
    """The stored turn of an exchange is marked as one that its client did not see end."""
    LOST = 4
    """An exchange cannot be stored; the log says why."""


class Writer:
    """One recorder's exchanges on their way into its store."""

    def __init__(
        self,
        source: socket.socket,
        config: StoreConfig,
        profile: str,
        redactor: Redactor = NOTHING,
    ) -> None:
        self._source = source
        self._config = config
        self._profile_name = profile
        self._received = bytearray()
        self._patience = Patience()
        self._remembered = RememberedMessages(redactor=redactor)
        self._known = Known(redactor, HiddenNames(config.path, redactor))
        self._opened: tuple[Store, AgentProfile] | None = None

    def run(self) -> None:
        """Commits and answers until the recorder's end of the socket is closed."""
        self._answer(Answer.READY)
        while batch := self._receive():
            self._answer(*self._commit(batch))
        if self._opened is not None:
            self._opened[0].close()
        tracing("proxy").close()

    def _receive(self) -> list[bytearray]:
        """All exchanges that have arrived; waits for the first. Empty at the end."""
        batch: list[bytearray] = []
        while len(batch) < _MAX_BATCH:
            try:
                data = self._source.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT if batch else 0)
            except (BlockingIOError, ConnectionError):
                break
            if not data:
                break
            self._received += data
            batch += self._whole()
        return batch

    def _whole(self) -> list[bytearray]:
        """Takes the exchanges that have arrived whole out of what was received."""
        found: list[bytearray] = []
        start, received = 0, self._received
        while len(received) >= (body := start + LENGTH.size):
            end = body + LENGTH.unpack_from(received, start)[0]
            if len(received) < end:
                break
            found.append(received[body:end])
            start = end
        del received[:start]
        return found

    def _commit(self, batch: list[bytearray]) -> list[Answer]:
        """Commits a batch, and returns the answer to each exchange.

        A lock or a full disk passes: the batch waits, and what comes after it too.
        """
        blocked, read = False, None
        while True:
            try:
                store, profile = self._open()
                if read is None:  # once, however often the store is tried
                    exchanges = map(pickle.loads, batch)
                    known = self._remembered, self._known
                    read = [read_exchange(one, profile, *known) for one in exchanges]
                    read = prepared(store, read)
                made: list[Turn] = []
                with store.recording() as recording:
                    look_ahead(recording, read)
                    answers = [_record(recording, one, made) for one in read]
                tracing("proxy").recorded(made)
                return answers
            except WaitError as error:
                if not blocked:
                    self._answer(Answer.BLOCKED)
                blocked = True
                self._patience.pause(error, f"a batch of {len(batch)} turns")
            except Exception:
                if len(batch) == 1:
                    log.exception("an exchange cannot be recorded")
                    return [Answer.LOST]
                # one bad exchange must not take the others with it
                return [answer for one in batch for answer in self._commit([one])]

    def _open(self) -> tuple[Store, AgentProfile]:
        if self._opened is None:
            profile: AgentProfile = load_plugin("agents", self._profile_name, None)
            self._opened = Store(self._config), profile
        return self._opened

    def _answer(self, *answers: Answer) -> None:
        with suppress(ConnectionError):  # the proxy is gone; what it sent is committed all the same
            self._source.sendall(bytes(answers))


def _record(recording: Recording, read: Read, made: list[Turn]) -> Answer:
    """Stores one exchange; a new turn is added to `made`."""
    exchange: Exchange = read.exchange
    stored = recording.holds(exchange.turn_id)
    if stored and exchange.amends:
        amend_exchange(recording, read)
        return Answer.AMENDED
    if not stored:
        made.append(record(recording, read))
    return Answer.KEPT


def spare_collector() -> None:
    """Lets the garbage collector look at little and seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


def main() -> None:
    """Runs a writer until its proxy is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    only_for_owner()
    logs.to_stderr()
    config, profile, redactor, hosts = pickle.load(sys.stdin.buffer)
    guard(hosts)
    spare_collector()
    with socket.socket(fileno=int(sys.argv[1])) as source:
        Writer(source, config, profile, redactor).run()


if __name__ == "__main__":
    main()
