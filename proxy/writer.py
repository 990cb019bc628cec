"""The writer: a process that takes finished exchanges from a proxy and commits them as turns.

    python -P -m proxy.writer FD

FD is the control socket. Each message on it is a pickled `Feed` with the file descriptor of a
stream socket, on which exchanges come as frames. What has come whole is committed in one
transaction, and a byte for each exchange goes back in the order in which they came. The proxy may
send an exchange again that an earlier writer did not answer for; its turn is kept once.

When the other ends are closed the process finishes what it has received whole, and ends. Nothing
else ends it but SIGKILL: the proxy drains before it closes.
"""

from __future__ import annotations

import gc
import logging
import pickle
import selectors
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from nextstate import logs
from nextstate.config import StoreConfig
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.private_files import only_for_owner
from nextstate.store.recording import Recording
from nextstate.store.sqlite import is_passing
from nextstate.store.store import Store
from nextstate.store.waiting import Patience
from proxy.exchange import Exchange, Read, amend_exchange, read_exchange, record_exchange

log = logging.getLogger(__name__)

FRAME = struct.Struct("<I?")
"""Before each pickled exchange: its bytes, and whether an earlier writer may have kept it."""
LOST, KEPT, READY, AMENDED, WAITING = range(5)
"""What the writer says: READY once before all, WAITING when the store does not take what has come,
the others of each exchange."""
LONGEST_FEED = 65_536
_BYTES_AT_ONCE = 1 << 20
_MOST_AT_ONCE = 256
"""Exchanges in one transaction; all that wait there wait for its end."""
_Delivered: TypeAlias = tuple[Exchange | None, bool]
"""(what was sent, None if it cannot be read; whether an earlier writer may have kept it)."""


@dataclass(frozen=True, slots=True)
class Feed:
    """Where the exchanges of one connection go."""

    store: StoreConfig
    profile: str
    """The agent profile's name."""


class Connection:
    """One recorder's exchanges on their way into its store."""

    def __init__(self, source: socket.socket, feed: Feed) -> None:
        self._source = source
        self._feed = feed
        self._received = bytearray()
        self._patience = Patience()
        self._opened: tuple[Store, AgentProfile] | None = None
        self._say(READY)

    def serve(self) -> bool:
        """Writes all that waits and answers; False once nothing more can come."""
        batch: list[_Delivered] = []
        more = True
        while len(batch) < _MOST_AT_ONCE:
            try:
                data = self._source.recv(_BYTES_AT_ONCE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            if not data:
                more = False
                break
            self._received += data
            batch += self._whole()
        if batch:
            self._say(*self._keep(batch))
        return more

    def close(self) -> None:
        """Gives the socket and the store back."""
        self._source.close()
        if self._opened is not None:
            self._opened[0].close()

    def _whole(self) -> list[_Delivered]:
        """What has come whole; a part of a frame stays for the next time."""
        found: list[_Delivered] = []
        start, received = 0, self._received
        while len(received) >= start + FRAME.size:
            size, again = FRAME.unpack_from(received, start)
            body = start + FRAME.size
            if len(received) < body + size:
                break
            start = body + size
            found.append((_exchange(received[body:start]), again))
        del received[:start]
        return found

    def _keep(self, batch: list[_Delivered]) -> list[int]:
        """Writes a batch, once the store lets it; says of each exchange what became of it.

        A lock or a full disk passes: the batch waits for it, and so does what comes after.
        """
        waits = False
        while True:
            try:
                store, profile = self._open()
                read = [None if one is None else read_exchange(one, profile) for one, _ in batch]
                with store.recording() as recording:
                    return [
                        _record(recording, profile, one, again)
                        for one, (_, again) in zip(read, batch, strict=True)
                    ]
            except Exception as error:
                if is_passing(error):
                    if not waits:
                        self._say(WAITING)
                    waits = True
                    self._patience.pause(error, f"a batch of {len(batch)} turns")
                    continue
                if len(batch) > 1:  # one bad turn must not take the others with it
                    return [answer for one in batch for answer in self._keep([one])]
                exchange, _ = batch[0]
                log.exception("turn=%s could not be recorded", exchange and exchange.turn_id)
                return [LOST]

    def _open(self) -> tuple[Store, AgentProfile]:
        if self._opened is None:
            profile: AgentProfile = load_plugin("agents", self._feed.profile, None)
            self._opened = Store(self._feed.store), profile
        return self._opened

    def _say(self, *answers: int) -> None:
        with suppress(ConnectionError):  # the proxy is gone; what it had sent is kept all the same
            self._source.sendall(bytes(answers))


def _exchange(pickled: bytearray) -> Exchange | None:
    try:
        return pickle.loads(pickled)
    except Exception:
        log.exception("an exchange cannot be read: was NextState changed while the proxy ran?")
        return None


def _record(recording: Recording, profile: AgentProfile, read: Read | None, again: bool) -> int:
    if read is None:
        return LOST
    exchange = read.exchange
    if exchange.amends and recording.holds(exchange.turn_id):
        amend_exchange(recording, read)
        return AMENDED
    if not (again and recording.holds(exchange.turn_id)):
        record_exchange(recording, exchange, profile, read)
    return KEPT


def serve(control: socket.socket) -> None:
    """Takes connections from the control socket and serves them until all are closed."""
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                connection: Connection | None = key.data
                if connection is not None:
                    if not connection.serve():
                        selector.unregister(key.fileobj)
                        connection.close()
                    continue
                feed, descriptors, _, _ = socket.recv_fds(control, LONGEST_FEED, 1)
                if not descriptors:
                    selector.unregister(control)
                    control.close()
                    continue
                source = socket.socket(fileno=descriptors[0])
                selector.register(
                    source, selectors.EVENT_READ, Connection(source, pickle.loads(feed))
                )


def main() -> None:
    """Serves until the proxy is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the proxy's, which drains first
        signal.signal(number, signal.SIG_IGN)
    only_for_owner()
    logs.to_stderr()
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
