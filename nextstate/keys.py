"""The proxy's keys: how one is made and kept, what it may do, and which keys are too weak.

A key of ours is 256 random bits, so nobody can find it by trying, and its hash at rest is a fast
one: SHA-256. A slow hash, as for passwords, would only make each request slower.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from nextstate.config import secret
from nextstate.errors import ConfigError, RecordError

BEGINNING = "ns-"
"""So that a scanner for secrets, and a person, knows a key of ours."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_DRAWN = re.compile(r"(?:ns-)?[0-9a-f]{32,128}|ns-[\w-]{43}", re.ASCII)
"""As `openssl rand -hex 32` writes it, or we do."""
_SHORTEST, _LEAST_BITS = 20, 64
_EXAMPLES = (
    *("changeme", "yourkey", "yourapikey", "yoursecret", "apikeyhere", "insertkey", "example"),
    *("placeholder", "password", "passwort", "replaceme", "secretkey", "supersecret", "xxxxx"),
)
"""What keys in documentation hold, without what is no letter or digit."""
_PROVIDERS = ("skproj", "skant", "skor", "sknextstate", "sktest")
"""How providers' keys and examples of them begin. One of those must not be shared with a proxy."""


class Scope(StrEnum):
    """What a key may do."""

    CHAT = "chat"
    """Ask the model."""
    FEEDBACK = "feedback"
    """Say how good a turn was."""
    READ = "read"
    """Look at the web page and the metrics."""
    ADMIN = "admin"
    """Everything, also what changes things on the web page."""
    EPISODES = "episodes"
    """Open, reward, read and close episodes."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the store keeps it. Raises RecordError."""

    name: str
    hash: bytes
    """What `hashed` says of it."""
    scopes: frozenset[Scope]
    lineage: str | None
    """The only lineage that it reaches; None: what everybody reaches who has no lineage's key."""
    created_at: float
    used_at: float | None = None
    """Its last use, to a minute."""
    revoked_at: float | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RecordError(
                f"name = {self.name!r:.80}: expected 1 to 40 small letters, digits, '.', '-' or '_'"
            )
        if not self.scopes:
            raise RecordError(f"the key {self.name!r} has no scope: expected {', '.join(Scope)}")


def new_key() -> str:
    """A new key."""
    return BEGINNING + secrets.token_urlsafe(32)


def hashed(key: str) -> bytes:
    """The hash under which a key is kept and found, 32 bytes."""
    # A header need not be UTF-8: aiohttp keeps other bytes as surrogates.
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def key_hash(key: str) -> str:
    """The hash under which an episode's key is kept, 40 hexadecimal digits of `hashed`."""
    return hashed(key).hex()[:40]


def key_of_nodes(key: str) -> str:
    """The key for other machines that play episodes, made of one that may do everything.

    The proxy makes it too, so nobody has to keep it; nothing leads back to `key`.
    """
    return BEGINNING + hmac.new(key.encode(), b"nodes", hashlib.sha256).hexdigest()


def weakness(key: str) -> str | None:
    """Why a key that a person chose could be guessed, without the key itself; None if it is good.

    >>> weakness("changeme"), weakness(new_key())
    ('it has 8 characters, expected 20 or more', None)
    """
    if len(key) < _SHORTEST:
        return f"it has {len(key)} characters, expected {_SHORTEST} or more"
    letters = "".join(filter(str.isalnum, key.lower()))
    if any(example in letters for example in _EXAMPLES):
        return "it looks like an example out of a documentation"
    if letters.startswith(_PROVIDERS):
        return "it looks like a provider's key, or like an example of one"
    if key in (key + key)[1:-1]:
        return "it repeats itself"
    steps = [ord(a) - ord(b) for a, b in pairwise(key)]
    bits = min(_bits(key), _bits(steps))
    if bits < _LEAST_BITS:
        return f"its characters are worth about {bits:.0f} bits, expected {_LEAST_BITS} or more"
    return None


def is_drawn(key: str) -> bool:
    """Whether a key has the form of one that a program drew, with at least 128 random bits.

    >>> is_drawn("0f1c8a7be24d95613c7e0f1c8a7be24d"), is_drawn("correct horse battery staple 1")
    (True, False)
    """
    return _DRAWN.fullmatch(key) is not None


def chosen_key(variable: str, where: str) -> str | None:
    """The key in the environment variable that configuration key `where` names, or None.

    Raises ConfigError if it is not set or is weak.
    """
    key = secret(variable, where)
    if key is not None and (why := weakness(key)) is not None:
        raise ConfigError(
            f"{where} = {variable!r}: the key in {variable} could be guessed: {why}. Export the "
            "output of `openssl rand -hex 32` there, or use `nextstate keys create NAME`"
        )
    return key


def _bits(values: Sequence[object]) -> float:
    """The entropy of so many values as seldom as these are."""
    counts = Counter(values).values()
    return -sum(count * math.log2(count / len(values)) for count in counts)
