"""Whose key a request carries and what it may do, known without a look into the store.

Each worker holds the keys in memory and looks for changes every `Intervals.keys_s`, so a revoked
key stops within two seconds. A request that is under way goes on to its end.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from nextstate.keys import Key, Scope, hashed, is_drawn, key_of_nodes
from nextstate.records import MAIN_LINEAGE
from nextstate.store.keys import Keys as StoredKeys
from proxy.lineages import Lineages

_EVERYTHING = frozenset(Scope)
_OF_NODES = frozenset((Scope.CHAT, Scope.EPISODES))
_NOTED_S = 60.0
"""The last use of a key is written again only after this long."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request may do."""

    who: str
    """One name for each key, and for all who have none."""
    lineage: str
    """What it reaches; `main` also reaches the lineages without a key of their own."""
    scopes: frozenset[Scope] = _EVERYTHING
    hash: bytes = field(default=b"", repr=False)
    stored: str | None = None
    """The name of a key of the store."""
    limited: bool = True
    """Whether its requests are counted."""
    chosen: bool = False
    """Whether a person may have chosen the key, or the one that it is made of, so that somebody may
    guess it."""

    @property
    def sign(self) -> str | None:
        """Tells this key from others, also from one that takes its name later; None: no key.

        Of a key that a person chose it has two bytes of the hash: too few to try words with.
        """
        size = 2 if self.chosen else 8
        return f"{self.who}:{self.hash[:size].hex()}" if self.hash else None

    @property
    def client(self) -> str:
        """Whom shares and reviews count it as; empty: who may do everything is never limited."""
        return "" if self.may(Scope.ADMIN) else self.who

    def may(self, scope: Scope | None) -> bool:
        """Whether it includes a scope; None: what needs no key."""
        return scope is None or scope in self.scopes or Scope.ADMIN in self.scopes


GRANT: web.RequestKey[Grant] = web.RequestKey("grant", Grant)
"""What a request may do; it is missing where none is needed and no key was sent."""
ANYBODY = Grant(MAIN_LINEAGE, MAIN_LINEAGE, limited=False)
"""A program of this machine, as long as there is no key."""


class Keys:
    """The keys of one proxy worker: the configuration's, the store's, and our own commands'."""

    def __init__(
        self,
        lineages: Lineages,
        stored: StoredKeys | None = None,
        own: str | None = None,
        clock: Callable[[], float] = time.time,
        *,
        closed: bool = False,
    ) -> None:
        """`own` is the key of the commands of this machine; `closed`: nobody gets in without."""
        self.lineages = lineages
        self._stored = stored
        self._clock = clock
        self._configured = tuple(_configured(lineages, own))
        self._grants = self._configured
        self._closed = closed
        self._any = False
        """Whether the store has a key, also a revoked one."""
        self._used: dict[str, float] = {}
        self._noted: dict[str, float] = {}
        self.refresh()

    @property
    def needed(self) -> bool:
        """Whether a request without a lineage's key needs another one."""
        return self._closed or self._any or self.lineages.main_key is not None

    @property
    def apart(self) -> bool:
        """Whether there are clients that must not learn about each other's lineages."""
        bound = any(grant.lineage != MAIN_LINEAGE for grant in self._grants)
        return bound or self.lineages.apart

    def find(self, sent: bytes) -> Grant | None:
        """What the key may do that `hashed` made this of; None for a wrong one.

        It takes the same time for each of them.
        """
        found = None
        for grant in self._grants:
            if hmac.compare_digest(grant.hash, sent):
                found = grant
        if found is not None and found.stored is not None:
            self._used[found.stored] = self._clock()
        return found

    def named(self, who: str) -> Grant | None:
        """What the key of this name may do now; None if there is none."""
        return next((grant for grant in self._grants if grant.who == who), None)

    def in_force(self, sign: str | None) -> bool:
        """Whether the key with this sign is one now; None: whether none is needed."""
        if sign is None:
            return not self.needed
        return any(grant.sign == sign for grant in self._grants)

    def refresh(self) -> None:
        """Looks into the store for changes, and notes there what was used. Raises StoreError."""
        if self._stored is None:
            return
        found = self._stored.all()
        self._any = bool(found)
        in_force = [_granted(key) for key in found if key.revoked_at is None]
        # A lineage that the configuration does not name any more cannot be reached.
        known = [grant for grant in in_force if grant.lineage in self.lineages.names]
        self._grants = (*self._configured, *known)
        due = {
            name: at
            for name, at in list(self._used.items())
            if at >= self._noted.get(name, 0.0) + _NOTED_S
        }
        if due:
            self._stored.used(due)
            self._noted |= due


def sent_key(headers: Mapping[str, str]) -> str:
    """The key that a request carries; empty if none."""
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    return bearer if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _granted(key: Key) -> Grant:
    who, lineage = f"key {key.name}", key.lineage or MAIN_LINEAGE
    return Grant(who, lineage, key.scopes, key.hash, key.name)


def _configured(lineages: Lineages, own: str | None) -> Iterator[Grant]:
    """The keys that the environment gives: each may do everything in its lineage."""
    theirs = ((name, access.key) for name, access in lineages.access.items())
    for name, key in ((MAIN_LINEAGE, lineages.main_key), *theirs):
        if key is not None:
            yield Grant(name, name, hash=hashed(key), chosen=not is_drawn(key))
    if own is not None:
        yield Grant("this machine's commands", MAIN_LINEAGE, hash=hashed(own), limited=False)
    for key in filter(None, (own, lineages.main_key)):
        nodes = hashed(key_of_nodes(key))
        chosen = not is_drawn(key)
        who = "the rollout's nodes"
        yield Grant(who, MAIN_LINEAGE, _OF_NODES, nodes, limited=False, chosen=chosen)
