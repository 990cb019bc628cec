"""Runs a command on a network of its own, where every packet that leaves it is noted.

    unshare --user --map-root-user --net --mount python -m tests.whole.alone LOG COMMAND …

There is the loopback, and one way out that leads nowhere: a name that is looked up and a connection
that is tried are seen there, whatever program or library makes them. Who looks up a name asks a
resolver that is out there, whichever this machine has.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

_ALONE = ("unshare", "--user", "--map-root-user", "--net", "--mount")
_SETUP = (
    "link set lo up",
    "link add out type veth peer name nowhere",
    "link set nowhere up",
    "link set out arp off up",
    "address add 192.0.2.1/24 dev out",
    "route add default dev out",
)
RESOLVER = "198.51.100.53"
_RESOLVERS = Path("/etc/resolv.conf")
_PACKET_OUTGOING = 4
_IPV4, _IPV6 = 0x0800, 0x86DD
_NEIGHBOUR_PROTOCOLS = (0, 58)
"""What the kernel says by itself on a new interface: hop-by-hop options and ICMPv6."""


def alone(log: Path) -> list[str]:
    """What to put before a command so that `log` gets its packets; empty without namespaces.

    The command has to run in the folder of the tests, or with it in PYTHONPATH.
    """
    if subprocess.run([*_ALONE, "ip", "link"], capture_output=True, check=False).returncode:
        return []
    log.touch()
    return [*_ALONE, sys.executable, "-P", "-m", "tests.whole.alone", str(log)]


def main(log: Path, command: list[str]) -> int:
    """Returns the command's exit code."""
    for line in _SETUP:
        subprocess.run(["ip", *line.split()], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as resolvers:
        resolvers.write(f"nameserver {RESOLVER}\noptions timeout:1 attempts:1\n")
        resolvers.flush()
        subprocess.run(["mount", "--bind", resolvers.name, _RESOLVERS.resolve()], check=True)
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
    listener.bind(("out", 0x0003))
    listener.settimeout(0.2)
    ended = threading.Event()

    def note() -> None:
        with log.open("a", buffering=1) as file:
            while not ended.is_set():
                try:
                    packet, (_, protocol, kind, *_) = listener.recvfrom(1 << 16)
                except TimeoutError:
                    continue
                if kind == _PACKET_OUTGOING and (text := _described(protocol, packet)):
                    file.write(text + "\n")

    noting = threading.Thread(target=note)
    noting.start()
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        ended.set()
        noting.join()


def _described(protocol: int, packet: bytes) -> str | None:
    if protocol == _IPV4:
        to, kind, payload = socket.inet_ntop(socket.AF_INET, packet[16:20]), packet[9], packet[20:]
    elif protocol == _IPV6:
        to, kind, payload = socket.inet_ntop(socket.AF_INET6, packet[24:40]), packet[6], packet[40:]
        if kind in _NEIGHBOUR_PROTOCOLS:
            return None
    else:
        return None
    return f"protocol {kind} to {to} port {struct.unpack('>H', payload[2:4])[0]}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
