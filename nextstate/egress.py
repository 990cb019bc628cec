"""The one place that every outgoing connection of our processes passes: nothing leaves unasked.

`guard` lets a process look up, and connect to, this machine and the hosts that the configuration
names, whatever library or plugin asks. It stays until the process ends. It sees what goes through
Python's sockets, and in `nextstate/guarded_loop.py` through uvloop's. Code in other languages that
a library brings along is not seen, so tests/whole/test_nothing_leaves.py looks at the network too.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any, cast

from nextstate.errors import NextStateError
from nextstate.offline import go_offline

log = logging.getLogger(__name__)

_LOOK_UPS = frozenset(("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"))
_SENDS = frozenset(("socket.connect", "socket.sendto", "socket.sendmsg"))
_MOST_ADDRESSES = 4096
METRICS_HOST = "api.wandb.ai"
"""Where Weights & Biases lets metrics be sent."""


class EgressError(NextStateError, PermissionError):
    """A process wants to reach a host that the configuration does not name."""


class _Allowed:
    """What the guard of this process lets through."""

    def __init__(self) -> None:
        self.hosts: frozenset[str] | None = None
        """None: there is no guard yet."""
        self.addresses: dict[str, None] = {}
        """What the allowed hosts' names stand for, as look-ups have told."""
        self.told: set[str] = set()
        """Refused hosts that the log has named."""


_allowed = _Allowed()


def guard(hosts: Iterable[str]) -> None:
    """Refuses from now on every host but this machine and `hosts`: names or addresses.

    Libraries that are imported later do not report, whatever the shell says.
    """
    is_new = _allowed.hosts is None
    _allowed.hosts = frozenset(map(_plain, hosts))
    go_offline(sends_metrics=METRICS_HOST in _allowed.hosts)
    if is_new:
        sys.addaudithook(_hook)
        known = socket.getaddrinfo

        def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
            return remember(host, known(host, *args, **kwargs))

        socket.getaddrinfo = getaddrinfo


def allowed_hosts() -> frozenset[str] | None:
    """What the guard of this process lets through beside this machine; None without a guard."""
    return _allowed.hosts


def check(host: object) -> None:
    """Raises EgressError for a host that must not be reached, or whose name not be looked up."""
    if _allowed.hosts is None or host is None:
        return
    name = _plain(host.decode(errors="replace") if isinstance(host, bytes) else str(host))
    if is_here(name) or name in _allowed.hosts or name in _allowed.addresses:
        return
    if name not in _allowed.told and len(_allowed.told) < _MOST_ADDRESSES:
        _allowed.told.add(name)
        log.error("a connection to %.200r was refused: it is not in [privacy] allow_hosts", name)
    raise EgressError(
        f"nothing may be sent to {name!r:.200}: name it in [privacy] allow_hosts to allow it"
    )


def check_address(address: object) -> None:
    """`check` for the address of an internet socket."""
    if isinstance(address, tuple) and address:
        check(cast("tuple[object, ...]", address)[0])


def remember(host: object, found: Collection[Any]) -> Collection[Any]:
    """Allows the addresses that a look-up of an allowed host has found; returns `found`."""
    name = host.decode(errors="replace") if isinstance(host, bytes) else host
    if isinstance(name, str) and _plain(name) in (_allowed.hosts or ()):
        for _, _, _, _, address in found:
            if len(_allowed.addresses) >= _MOST_ADDRESSES:
                del _allowed.addresses[next(iter(_allowed.addresses))]
            _allowed.addresses[_plain(str(address[0]))] = None
    return found


@lru_cache(maxsize=256)
def is_here(name: str) -> bool:
    """True for a name or address of this machine, written as `_plain` writes it.

    Other names below localhost are not: many resolvers ask the network for them.
    """
    if name in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or address.is_unspecified


def _plain(host: str) -> str:
    """A host as it is compared: in small letters, without a last dot, brackets and a scope."""
    name = host.strip().strip("[]").rstrip(".").lower()
    address, _, scope = name.partition("%")
    if scope:  # in a name it is a letter like others
        try:
            return str(ipaddress.IPv6Address(address))
        except ValueError:
            return name
    return name


def _hook(event: str, given: tuple[Any, ...]) -> None:
    if event in _LOOK_UPS:
        check(given[0])
    elif event == "socket.getnameinfo":  # it asks who an address is
        check_address(given[0])
    elif event in _SENDS and given[0].family in (socket.AF_INET, socket.AF_INET6):
        check_address(given[1])
