"""A writer in a thread of the test's process: the real one takes half a second to start."""

from __future__ import annotations

import socket
from threading import Thread

from nextstate.config import StoreConfig
from nextstate.redaction import NOTHING, Redactor
from proxy.writer import Writer
from proxy.writer_process import WriterProcess

END_S = 10.0


class WriterThread(WriterProcess):
    """For one recorder, as long as the test does not kill its writer."""

    def __init__(self, redactor: Redactor = NOTHING) -> None:
        super().__init__(redactor)
        self._threads: list[Thread] = []

    def start(self, store: StoreConfig, profile: str) -> socket.socket:
        ours, theirs = socket.socketpair()

        def run() -> None:
            with theirs:
                Writer(theirs, store, profile, self.redactor).run()

        self._threads.append(Thread(target=run, daemon=True))
        self._threads[-1].start()
        return ours

    def close(self) -> None:
        for thread in self._threads:
            thread.join(END_S)
