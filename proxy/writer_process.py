"""Starts the writer process of a recorder, and waits for its end.

The process has a session of its own: what ends the proxy's process group (Ctrl-C, the supervisor)
leaves it alone, so that it commits what has arrived. It ends when the proxy's end of its socket is
closed, for whatever reason.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping

from nextstate.config import StoreConfig
from nextstate.redaction import NOTHING, Redactor

log = logging.getLogger(__name__)

_SEND_BUFFER_BYTES = 4 << 20
"""How much of what a proxy sent outlives it; the kernel's net.core.wmem_max may lower it."""
_END_S = 10.0


class WriterProcess:
    """The writer of one recorder: started again when it has ended."""

    def __init__(
        self,
        redactor: Redactor = NOTHING,
        env: Mapping[str, str] | None = None,
        hosts: Collection[str] = (),
    ) -> None:
        """`env` are its variables; None: this process's own. `hosts` it may reach."""
        self.redactor = redactor
        """What keeps secrets from the store."""
        self._env = os.environ if env is None else env
        self._hosts = tuple(hosts)
        self.processes: list[subprocess.Popen[bytes]] = []
        """Those that may still run, the newest last."""

    def start(self, store: StoreConfig, profile: str) -> socket.socket:
        """Starts a writer and returns the socket to it. Raises OSError."""
        self.processes = [process for process in self.processes if process.poll() is None]
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "proxy.writer", str(theirs.fileno())],
                    # The writer finds what the proxy finds: plugins may be anywhere.
                    env={**self._env, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
                self.processes.append(process)
                assert process.stdin is not None
                with process.stdin:
                    pickle.dump((store, profile, self.redactor, self._hosts), process.stdin)
            except OSError:
                ours.close()
                raise
        log.debug("the writer runs as process %d", process.pid)
        return ours

    def close(self) -> None:
        """Waits for the writer's end, at most 10 s; close the socket first."""
        for process in self.processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                log.warning("the writer still waits for the store; it ends once it has committed")
