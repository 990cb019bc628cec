"""The one place of everything that people and models wrote: each distinct text is stored once.

Whatever has words in it goes through this module. Other tables refer to a text by its hash.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import sqlalchemy as sa
import zstandard

from nextstate.store import schema as t

HASH_BYTES = 16
Row: TypeAlias = sa.Row[*tuple[Any, ...]]
Texts: TypeAlias = Mapping[bytes, bytes]
"""Stored texts under their hashes."""
_IN_ONE_QUERY = 500


def content_hash(text: bytes) -> bytes:
    """The 16-byte name under which a text is stored."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


def hashes(packed: bytes) -> Iterable[bytes]:
    """The hashes in a column that holds one after the other."""
    return (packed[i : i + HASH_BYTES] for i in range(0, len(packed), HASH_BYTES))


def get(connection: sa.Connection, keys: Iterable[bytes]) -> dict[bytes, bytes]:
    """The texts under `keys`, in few queries."""
    wanted = list(dict.fromkeys(keys))
    found: dict[bytes, bytes] = {}
    c = t.messages.c
    for start in range(0, len(wanted), _IN_ONE_QUERY):
        some = wanted[start : start + _IN_ONE_QUERY]
        rows = connection.execute(sa.select(t.messages).where(c.hash.in_(some))).all()
        of_base = {row.base for row in rows if row.base is not None}
        bases = get(connection, of_base) if of_base else {}
        for row in rows:
            base = None if row.base is None else bases[row.base]
            found[row.hash] = decompress(row.body, base)
    return found


def put(connection: sa.Connection, text: bytes) -> bytes:
    """Stores a text once and returns its hash."""
    key = content_hash(text)
    known = sa.select(t.messages.c.hash).where(t.messages.c.hash == key)
    if connection.execute(known).first() is None:
        connection.execute(sa.insert(t.messages).values(hash=key, body=compress(text)))
    return key


class _Zstd(threading.local):
    """Contexts that cost more to make than a small text to compress; each thread has its own."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=3)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def compress(text: bytes, base: bytes | None = None) -> bytes:
    """`text` as it is stored; compressed against `base` if there is one."""
    if base is None:
        return _zstd.compressor.compress(text)
    return zstandard.ZstdCompressor(level=3, dict_data=_dictionary(base)).compress(text)


def decompress(stored: bytes, base: bytes | None = None) -> bytes:
    """The way back from `compress`."""
    if base is None:
        return _zstd.decompressor.decompress(stored)
    return zstandard.ZstdDecompressor(dict_data=_dictionary(base)).decompress(stored)


def _dictionary(base: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
