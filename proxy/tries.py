"""How often each address may send wrong keys, and who is not slowed down by others' tries."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable
from functools import lru_cache

_MOST_SEEN = 1024


class Tries:
    """How often each address may still send a wrong key: a bucket that refills.

    Nobody waits: a further try is refused at once, right or wrong. A key that the address sent
    before is never refused here, because its answer tells nothing new: nobody can lock out an agent
    by guessing on its machine, and an agent with a wrong key is told so each time.
    """

    AT_ONCE, REFILL_S, MOST_ADDRESSES = 5, 10.0, 1024

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}
        """(what was left, when), by address; the one that failed longest ago comes first."""
        self._right: dict[tuple[str, bytes], None] = {}
        """(address, hash of the key) that were right, the one used longest ago first."""
        self._wrong: dict[tuple[str, bytes], None] = {}

    def wait_s(self, address: str, sent: bytes = b"") -> int:
        """0 if the address may send a key now; else the seconds to wait.

        `sent` is the hash of the key that it has sent.
        """
        one = _network(address), sent
        if one in self._right or one in self._wrong:
            return 0
        left = self._now(one[0])
        return 0 if left >= 1 else math.ceil((1 - left) * self.REFILL_S)

    def failed(self, address: str, sent: bytes = b"") -> None:
        """Counts a wrong key, of which `sent` is the hash. The same one again counts once."""
        network = _network(address)
        if sent:
            if (network, sent) in self._wrong:
                return
            _remember(self._wrong, (network, sent))
        left = self._now(network)
        self._left.pop(network, None)
        self._left[network] = left - 1, self._clock()
        if len(self._left) > self.MOST_ADDRESSES:
            del self._left[next(iter(self._left))]

    def succeeded(self, address: str, sent: bytes) -> None:
        """Remembers that a key of this address was right."""
        _remember(self._right, (_network(address), sent))

    def _now(self, network: str) -> float:
        left, since = self._left.get(network, (float(self.AT_ONCE), 0.0))
        return min(self.AT_ONCE, left + (self._clock() - since) / self.REFILL_S)


def _remember(seen: dict[tuple[str, bytes], None], one: tuple[str, bytes]) -> None:
    seen.pop(one, None)
    seen[one] = None
    if len(seen) > _MOST_SEEN:
        del seen[next(iter(seen))]


@lru_cache(maxsize=_MOST_SEEN)
def _network(address: str) -> str:
    """What one sender has: an IPv4 address, or the first half of an IPv6 address.

    >>> _network("192.0.2.7"), _network("2001:db8::1"), _network("")
    ('192.0.2.7', '2001:db8::', '')
    """
    if ":" not in address:
        return address
    try:
        whole = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if whole.ipv4_mapped is not None:
        return str(whole.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(whole) >> 64 << 64))
