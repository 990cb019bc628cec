"""Encryption of what the database holds: values, and the names by which they are found.

A *value* (a text, token ids, log-probs, stop words) is sealed by AES-256-GCM with a nonce of 96
random bits, under a key of its process, which is derived from the data key and 96 other random
bits, and seals at most 2^30 values: so no nonce comes twice. The place of a value is authenticated
with it, so a value that was changed, or moved to another row, is an error when it is read.

A *name* is searched for, so equal ones must stay equal: a keyed permutation, which nobody can
compute or undo without the key, takes the place of a hash. An unkeyed hash of a short text would
let a thief try texts.

Without a key (`vault_of` is None) everything is as if this module were not there.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sa

from nextstate.errors import SealError

KEY_BYTES = 32
"""Of a data key, and of the key that wraps it."""
_SALT_BYTES, _NONCE_BYTES = 12, 12
_FIRST, _SECOND = b"system  ", b"letters "
PREFIX_BYTES = 48
"""Of a sealed key of 32 bytes."""
_MOST_VALUES, _REMEMBERED = 1 << 30, 4096
_HEX = re.compile(r"[0-9a-f]{32}")
_OURS = re.compile(r"session_[0-9a-f]{20}")
_NAME = re.compile(r'"(?:[^"\\]|\\.)*":')
"""The name of a field, as `write_json` writes it."""
_WRAPPING = b"nextstate data key, wrapped 1"
_ATTRIBUTE = "nextstate_vault"


class Vault:
    """Seals and opens with one data key. Any thread may use it. It knows nothing of SQL.

    `open…` raises SealError for what this key has not sealed.
    """

    has_key = True

    def __init__(self, key: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV

        self._gcm, self._wrong = AESGCM, InvalidTag
        self._values = _derived(key, b"values")
        # One block a name, and each name is a hash: blocks repeat only where names are equal.
        self._names = _Blocks(Cipher(algorithms.AES(_derived(key, b"names")), modes.ECB()))
        self._words = AESSIV(_derived(key, b"words", 64))
        self._known = dict[bytes, Any]()
        """Ciphers of values, by their salts."""
        self._known_prefixes = dict[bytes, bytes]()
        self._known_words = dict[str, str](), dict[str, str]()
        self._own: tuple[bytes, Any] | None = None
        """The salt of this process, and what encrypts with its key."""
        self._left = 0

    def seal(self, place: bytes, value: bytes) -> bytes:
        """A value as it is stored: 40 bytes longer."""
        own = self._own
        if own is None or self._left <= 0:  # two threads may both choose one: no harm
            salt = os.urandom(_SALT_BYTES)
            self._own = own = salt, self._gcm(self._key_of(salt)).encrypt
            self._left = _MOST_VALUES
        self._left -= 1
        nonce = os.urandom(_NONCE_BYTES)
        return own[0] + nonce + own[1](nonce, value, place)

    def open(self, place: bytes, sealed: bytes) -> bytes:
        """The way back from `seal`."""
        salt, nonce = sealed[:_SALT_BYTES], sealed[_SALT_BYTES : _SALT_BYTES + _NONCE_BYTES]
        cipher = self._known.get(salt)
        if cipher is None:
            cipher = _remember(self._known, salt, self._gcm(self._key_of(salt)))
        try:
            return cipher.decrypt(nonce, sealed[_SALT_BYTES + _NONCE_BYTES :], place)
        except (self._wrong, ValueError):
            raise SealError(
                "a sealed value was changed or moved since it was stored: `nextstate verify` says "
                "which; put a whole copy of the store in its place"
            ) from None

    def seal_names(self, names: bytes) -> bytes:
        """Names of 16 bytes, joined, as they are stored."""
        return self._names.seal(names)

    def open_names(self, sealed: bytes) -> bytes:
        """The way back from `seal_names`."""
        return self._names.open(sealed)

    def seal_prefix(self, key: bytes) -> bytes:
        """A key of 32 bytes, or its first 16 or 24, so that keys that begin alike still do.

        Of the two parts of 8 bytes stand first what finds them, and then the way back.
        """
        if (known := self._known_prefixes.get(key)) is not None:
            return known  # a turn is looked for by the key that it was stored with
        if len(key) == 32:
            # Four blocks: the first half, each part of the second, and that half itself.
            found = self._names.seal(key[:24] + _FIRST + key[24:] + _SECOND + key[16:])
            sealed = found[:24] + found[32:40] + found[48:]
            return _remember(self._known_prefixes, key, sealed)
        return self._names.seal(key if len(key) == 16 else key + _FIRST)[: len(key)]

    def open_prefix(self, sealed: bytes) -> bytes:
        """The way back from `seal_prefix`, of a whole key."""
        return self._names.open(sealed[:16] + sealed[-16:])

    def seal_word(self, word: str) -> str:
        """A name of any length that a client chose; equal ones stay equal."""
        known = self._known_words[0]
        if (found := known.get(word)) is not None:
            return found
        sealed = self._words.encrypt(word.encode(), None)
        return _remember(known, word, base64.urlsafe_b64encode(sealed).decode())

    def open_word(self, sealed: str) -> str:
        """The way back from `seal_word`."""
        known = self._known_words[1]
        if (found := known.get(sealed)) is not None:
            return found
        try:
            word = self._words.decrypt(base64.urlsafe_b64decode(sealed), None).decode()
        except (self._wrong, ValueError):
            raise SealError(
                "the sealed name of a session was changed since it was stored"
            ) from None
        return _remember(known, sealed, word)

    def _key_of(self, salt: bytes) -> bytes:
        return hashlib.blake2b(salt, key=self._values, digest_size=KEY_BYTES).digest()


class _Blocks(threading.local):
    """What encrypts and decrypts blocks: each thread has its own."""

    def __init__(self, cipher: Any) -> None:
        self.seal: Callable[[bytes], bytes] = cipher.encryptor().update
        self.open: Callable[[bytes], bytes] = cipher.decryptor().update


class NoKey(Vault):
    """The vault of a process that was given no key: whatever it is asked for is a SealError."""

    has_key = False

    def __init__(self) -> None:
        """It has nothing."""

    def __getattr__(self, name: str) -> Any:
        raise SealError(
            "this process has no key to the encrypted store, because it should need no texts: "
            "this is a fault of NextState"
        )


_Key = TypeVar("_Key", bytes, str)
_Value = TypeVar("_Value")


def _remember(where: dict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    """Keeps what is asked for again and again; returns it."""
    if len(where) >= _REMEMBERED:
        where.clear()
    where[key] = value
    return value


def _derived(key: bytes, what: bytes, size: int = KEY_BYTES) -> bytes:
    return hashlib.blake2b(b"nextstate 1 " + what, key=key, digest_size=size).digest()


def wrap(data_key: bytes, key: bytes) -> bytes:
    """A data key as it is stored, sealed with a person's key."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, data_key, _WRAPPING)


def unwrap(wrapped: bytes, key: bytes) -> bytes | None:
    """The data key; None if `key` has not wrapped it."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], _WRAPPING)
    except (InvalidTag, ValueError):
        return None


def seal(vault: Vault | None, place: bytes, value: bytes) -> bytes:
    """A value as it is stored."""
    return value if vault is None else vault.seal(place, value)


def unseal(vault: Vault | None, place: bytes, stored: bytes) -> bytes:
    """The way back from `seal`."""
    return stored if vault is None else vault.open(place, stored)


def seal_column(vault: Vault | None, row: str, column: str, value: bytes | str | None) -> Any:
    """A value as it is stored in a column of a row that has an id; text becomes base64.

    JSON without a text in it (most samplings) says nothing, and stays as it is.
    """
    if vault is None or value is None:
        return value
    if isinstance(value, str) and _is_of_numbers(value):
        return value
    place = f"{column} of {row}".encode()
    if isinstance(value, str):
        return base64.b64encode(vault.seal(place, value.encode())).decode()
    return vault.seal(place, value)


def open_column(vault: Vault | None, row: str, column: str, stored: bytes | str | None) -> Any:
    """The way back from `seal_column`."""
    if vault is None or stored is None:
        return stored
    if isinstance(stored, str) and _is_of_numbers(stored):
        return stored
    place = f"{column} of {row}".encode()
    if isinstance(stored, bytes):
        return vault.open(place, stored)
    try:
        sealed = base64.b64decode(stored, validate=True)
    except ValueError:
        sealed = b""
    return vault.open(place, sealed).decode()


def _is_of_numbers(value: str) -> bool:
    """True for a JSON object without a text in it. What is sealed begins otherwise."""
    return value[:1] == "{" and '"' not in _NAME.sub("", value)


def vault_of(dialect: sa.Dialect) -> Vault | None:
    """What seals the values of an engine; None if they are stored as they are."""
    return getattr(dialect, _ATTRIBUTE, None)


def seal_with(engine: sa.Engine, vault: Vault) -> None:
    """Lets an engine seal everything from now on; call it before it has met a sealed column."""
    setattr(engine.dialect, _ATTRIBUTE, vault)


Way = Callable[[Any], Any]


class SealedType(sa.TypeDecorator[Any]):
    """A column whose values are sealed on the way to the database."""

    impl = sa.LargeBinary
    cache_ok = True

    def ways(self, vault: Vault) -> tuple[Way, Way]:
        """(how a value is sealed, the way back)."""
        raise NotImplementedError

    def bind_processor(self, dialect: sa.Dialect) -> Any:
        """What SQLAlchemy does to a value before the driver gets it."""
        return _both(dialect, self.ways, 0, self.impl_instance.bind_processor(dialect))

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Any:
        """What SQLAlchemy does to a value that the driver returns."""
        inner = self.impl_instance.result_processor(dialect, coltype)
        return _both(dialect, self.ways, 1, inner)


def _both(
    dialect: sa.Dialect, ways: Callable[[Vault], tuple[Way, Way]], way: int, inner: Way | None
) -> Way | None:
    vault = vault_of(dialect)
    if vault is None:
        return inner
    ours = ways(vault)[way]
    order = [ours] if inner is None else [ours, inner] if way == 0 else [inner, ours]

    def process(value: Any) -> Any:
        if value is None:
            return None
        for step in order:
            value = step(value)
        return value

    return process


class Name(SealedType):
    """Hashes of 16 bytes, one or several joined."""

    cache_ok = True  # read from each class itself

    def ways(self, vault: Vault) -> tuple[Way, Way]:
        return vault.seal_names, vault.open_names


class PrefixName(SealedType):
    """A key of 32 bytes of which 16 or 24 are searched for, too."""

    cache_ok = True  # read from each class itself

    def ways(self, vault: Vault) -> tuple[Way, Way]:
        return vault.seal_prefix, vault.open_prefix


class Word(SealedType):
    """A name that a client chose. One that we made tells nothing, and stays as it is."""

    impl = sa.String
    cache_ok = True

    def ways(self, vault: Vault) -> tuple[Way, Way]:
        return _unless_ours(vault.seal_word), _unless_ours(vault.open_word)


class HexName(SealedType):
    """A text that ends in 32 hexadecimal digits, which are sealed. Others stand for themselves."""

    impl = sa.String
    cache_ok = True

    def ways(self, vault: Vault) -> tuple[Way, Way]:
        return _of_digits(vault.seal_names), _of_digits(vault.open_names)


def _unless_ours(way: Callable[[str], str]) -> Way:
    return lambda name: name if _OURS.fullmatch(name) else way(name)


def _of_digits(way: Callable[[bytes], bytes]) -> Way:
    def changed(value: str) -> str:
        if not _HEX.fullmatch(value[-32:]):
            return value
        return value[:-32] + way(bytes.fromhex(value[-32:])).hex()

    return changed
