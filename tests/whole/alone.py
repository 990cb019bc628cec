"""Runs a command on a network of its own, where every packet that leaves it is noted.

    unshare --user --map-root-user --net --mount python -m tests.whole.alone LOG COMMAND …

There is the loopback, and one way out that leads nowhere: a name that is looked up and a connection
that is tried are seen there, whatever program or library makes them. Names are asked of a server
beyond it: one on the loopback, as many machines have, would be asked unseen. With WATCH as
`sitecustomize` a Python process also notes what it tries and what `nextstate.egress` refuses.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

WATCH = """
import os, sys

out = open(os.environ["WATCHED"], "a", buffering=1)
out.write("armed\\n")
LOOK_UPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
SENDS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getnameinfo"}


def watch(event, given):
    if event not in LOOK_UPS and event not in SENDS:
        return
    where = given[0] if event in LOOK_UPS or event == "socket.getnameinfo" else given[1]
    host = where[0] if isinstance(where, tuple) else where
    unix = isinstance(where, (str, bytes)) and event in SENDS
    if not unix and host not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", None, ""):
        out.write(f"{event} {where}\\n")


sys.addaudithook(watch)
"""
"""A module that notes look-ups and connections, also refused ones, in the file WATCHED."""
SERVER = "198.51.100.53"
"""Whom names are asked of."""
_ALONE = ("unshare", "--user", "--map-root-user", "--net", "--mount")
_INSTEAD = {
    "/etc/resolv.conf": f"nameserver {SERVER}\noptions attempts:1 timeout:1\n",
    "/etc/nsswitch.conf": "hosts: files dns\n",  # no other process looks names up
}
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
    for file, text in _INSTEAD.items():
        ours = log.with_name(f"{log.name}.{Path(file).name}")
        ours.write_text(text)
        if Path(file).exists():
            subprocess.run(["mount", "--bind", str(ours), file], check=True)
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
