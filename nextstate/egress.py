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

log = logging.getLogger(__name__)

_LOOK_UPS = frozenset(("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"))
_NAMED_BACK = "socket.getnameinfo"
_SENDS = frozenset(("socket.connect", "socket.sendto", "socket.sendmsg"))
_MOST_ADDRESSES = 4096
_UNDER_LOCALHOST = ".localhost"


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
    """Refuses from now on every host but this machine and `hosts`: names or addresses."""
    is_new = _allowed.hosts is None
    _allowed.hosts = frozenset(map(_plain, hosts))
    if is_new:
        sys.addaudithook(_hook)
        known = socket.getaddrinfo

        def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
            return remember(host, known(as_looked_up(host), *args, **kwargs))

        socket.getaddrinfo = getaddrinfo


def allowed_hosts() -> frozenset[str] | None:
    """What the guard of this process lets through beside this machine; None without a guard."""
    return _allowed.hosts


def check(host: object) -> None:
    """Raises EgressError for a host that must not be reached, or whose name not be looked up."""
    if _allowed.hosts is None or host is None:
        return
    name = _plain(host)
    here = is_here(name) and not name.endswith(_UNDER_LOCALHOST)
    if here or name in _allowed.hosts or name in _allowed.addresses:
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


def as_looked_up(host: Any) -> Any:
    """`localhost` for a name under it, which a name server might be asked for; else `host`."""
    return "localhost" if host is not None and _plain(host).endswith(_UNDER_LOCALHOST) else host


def remember(host: object, found: Collection[Any]) -> Collection[Any]:
    """Allows the addresses that a look-up of an allowed host has found; returns `found`."""
    if host is not None and _plain(host) in (_allowed.hosts or ()):
        for _, _, _, _, address in found:
            if len(_allowed.addresses) >= _MOST_ADDRESSES:
                del _allowed.addresses[next(iter(_allowed.addresses))]
            _allowed.addresses[_plain(address[0])] = None
    return found


@lru_cache(maxsize=256)
def is_here(name: str) -> bool:
    """True for a name or address of this machine, written as `_plain` writes it."""
    if name in ("", "localhost") or name.endswith(_UNDER_LOCALHOST):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or address.is_unspecified


def _plain(host: object) -> str:
    """A host as it is compared: in small letters, without a last dot, brackets and a scope.

    Only an address has a scope: a name with a `%` in it is looked up as it stands.
    """
    text = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
    name = text.strip().strip("[]").rstrip(".").lower()
    address, scope, _ = name.partition("%")
    return address if scope and ":" in address else name


def _hook(event: str, given: tuple[Any, ...]) -> None:
    if event in _LOOK_UPS:
        check(given[0])
    elif event == _NAMED_BACK:
        check_address(given[0])
    elif event in _SENDS and given[0].family in (socket.AF_INET, socket.AF_INET6):
        check_address(given[1])
