"""Runs within a sandbox: a port of the loopback leads to a Unix socket, then a program begins.

python3 -c BRIDGE PORT SOCKET PROGRAM ARGUMENT…
"""

import socket
import subprocess
import sys
import threading
from contextlib import suppress


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Sends on what comes, until it ends."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def serve(server: socket.socket, path: str) -> None:
    """Connects each client of the port with the socket."""
    while True:
        client, _ = server.accept()
        model = socket.socket(socket.AF_UNIX)
        try:
            model.connect(path)
        except OSError:
            client.close()
            continue
        for pair in ((client, model), (model, client)):
            threading.Thread(target=pump, args=pair, daemon=True).start()


def main(port: str, path: str, *program: str) -> int:
    """Returns the program's exit code, as bash tells it."""
    server = socket.create_server(("127.0.0.1", int(port)))
    threading.Thread(target=serve, args=(server, path), daemon=True).start()
    code = subprocess.call(program)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
