"""The handle on the writer process: started when it is first needed, and again when it has ended.

It has a session of its own, so that what ends the proxy's process group (Ctrl-C, the supervisor)
leaves it to write what it has received. It ends when the proxy's ends of its sockets are closed,
however the proxy came to close them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import subprocess
import sys
from typing import Self

from proxy.writer import Feed

log = logging.getLogger(__name__)

_SEND_BUFFER_BYTES = 4 << 20
"""What a killed proxy may leave to its writer; less where the kernel's net.core.wmem_max is."""
_END_S = 10.0
"""How long `close` waits for the process."""


class WriterProcess:
    """One writer process for all recorders of this process; used from one thread at a time."""

    def __init__(self) -> None:
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._ending: list[subprocess.Popen[bytes]] = []
        """Earlier ones that were not seen to be gone: nobody waits for them, they may hang."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    @property
    def pid(self) -> int | None:
        """Of the process; None before it was first needed."""
        return None if self._running is None else self._running[0].pid

    def connect(self, feed: Feed) -> socket.socket:
        """A stream socket to a writer that serves `feed`. Raises OSError when none can start."""
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        message = pickle.dumps(feed)
        with theirs:
            try:
                if self._running is None:
                    self._running = _start()
                try:
                    socket.send_fds(self._running[1], [message], [theirs.fileno()])
                except ConnectionError:  # it has ended
                    self._let_go()
                    self._running = _start()
                    socket.send_fds(self._running[1], [message], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours

    def close(self) -> None:
        """Lets the process end, and waits for it; close the connections first."""
        self._let_go()
        for process in self._ending:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                log.warning("the writer still waits for the store; it ends once it has written")

    def _let_go(self) -> None:
        if self._running is not None:
            (process, control), self._running = self._running, None
            control.close()
            self._ending.append(process)
        self._ending = [process for process in self._ending if process.poll() is None]


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "proxy.writer", str(theirs.fileno())],
                # What is imported here is imported there: plugins too, from wherever they come.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
    log.debug("the writer runs as process %d", process.pid)
    return process, ours
