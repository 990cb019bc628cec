"""uvloop whose connections pass `nextstate.egress`: it makes them without Python's sockets."""

from __future__ import annotations

import socket
from typing import Any

import uvloop

from nextstate.egress import as_looked_up, check, check_address, remember


class GuardedLoop(uvloop.Loop):
    """A loop that reaches allowed hosts only, once there is a guard."""

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """A connection to an allowed host. Raises EgressError."""
        host = as_looked_up(host)
        check(host)
        return await super().create_connection(protocol_factory, host, *args, **kwargs)

    async def create_datagram_endpoint(
        self, protocol_factory: Any, local_addr: Any = None, remote_addr: Any = None, **kwargs: Any
    ) -> Any:
        """A datagram socket to an allowed host; without one there is none. Raises EgressError."""
        check("a datagram's receiver" if remote_addr is None else remote_addr[0])
        return await super().create_datagram_endpoint(
            protocol_factory, local_addr, remote_addr, **kwargs
        )

    async def getaddrinfo(self, host: Any, *args: Any, **kwargs: Any) -> Any:
        """The addresses of an allowed host. Raises EgressError."""
        host = as_looked_up(host)
        check(host)
        return remember(host, await super().getaddrinfo(host, *args, **kwargs))

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> Any:
        """The name of an allowed host's address. Raises EgressError."""
        check_address(sockaddr)
        return await super().getnameinfo(sockaddr, flags)

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """Connects a socket to an allowed host. Raises EgressError."""
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            check_address(address)
        await super().sock_connect(sock, address)
