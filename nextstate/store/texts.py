"""The one place of everything that people and models wrote: each distinct text is stored once.

Messages, replies, tool lists, prompts as token ids, next states, hints and comments go through
`put`, `get` and `release`; other tables hold their hashes. A text counts its uses, and the last
`release` deletes it. What else quotes a conversation lies in the row of its turn, compressed by
`compress`: the token ids of the reply and `sampling`, which may hold stop words. Reasons and logs
quote nobody (nextstate/error_text.py).

What uses a text:

- a turn, unless the turn that it continues (`turns.parent`) uses it too. So a message that is sent
  again with each request is counted once a conversation, and counting costs the same at any length;
- a next state, a verdict, a person's feedback, an episode: each row that holds its hash;
- a text that is compressed against it (`texts.base`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sqlalchemy as sa
import zstandard

from nextstate.store import schema as t
from nextstate.store.database import Cursor
from nextstate.store.vault import Vault, seal, unseal, vault_of

HASH_BYTES = 16
Row: TypeAlias = sa.Row[*tuple[Any, ...]]
Texts: TypeAlias = Mapping[bytes, bytes]
"""Stored texts under their hashes."""
_IN_ONE_QUERY = 500
_LONG_BYTES, _BEGINNING_BYTES = 4096, 256
_HASHED_BYTES = 200
"""Of memory for a remembered hash, besides the text."""


def content_hash(text: bytes) -> bytes:
    """The 16-byte name under which a text is stored."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


def hashes(packed: bytes) -> Iterable[bytes]:
    """The hashes in a column that holds one after the other."""
    return (packed[i : i + HASH_BYTES] for i in range(0, len(packed), HASH_BYTES))


def get(connection: sa.Connection, keys: Iterable[bytes | None]) -> dict[bytes, bytes]:
    """The texts under `keys`, in few queries; None stands for no text."""
    wanted = list(dict.fromkeys(key for key in keys if key is not None))
    found: dict[bytes, bytes] = {}
    c, vault = t.texts.c, vault_of(connection.dialect)
    for start in range(0, len(wanted), _IN_ONE_QUERY):
        some = wanted[start : start + _IN_ONE_QUERY]
        query = sa.select(c.hash, c.base, c.stored).where(c.hash.in_(some))
        rows = connection.execute(query).all()
        of_base = {row.base for row in rows if row.base is not None}
        bases = get(connection, of_base) if of_base else {}
        for row in rows:
            base = None if row.base is None else bases[row.base]
            found[row.hash] = unpacked(vault, row.hash, row.stored, row.base, base)
    return found


def one(cursor: Cursor, key: bytes) -> bytes:
    """The text under `key`, which has to be there."""
    text = one_within(cursor, key, None)
    assert text is not None
    return text


def one_within(cursor: Cursor, key: bytes, most: int | None) -> bytes | None:
    """The same; None if it has more than `most` bytes."""
    cursor.settle()
    row = cursor.first(_ONE, key=key)
    assert row is not None
    packed = [(packed_place(key, row.base), row.stored)]
    if row.base is not None:
        packed.insert(0, (packed_place(row.base, None), row.of_base))
    text = None
    for place, stored in packed:
        if most is not None and len(stored) > most:
            return None
        opened = unseal(cursor.vault, place, stored)
        if most is not None and zstandard.frame_content_size(opened) > most:
            return None
        text = decompress(opened, text)
    return text


def put(connection: sa.Connection, text: bytes) -> bytes:
    """Stores a text, or counts one more use of it; returns its hash."""
    return Writer(cursor_of(connection), Known()).put(text)


def use(connection: sa.Connection, keys: Iterable[bytes]) -> None:
    """Counts one more use of each of some stored texts."""
    wanted, c = list(keys), t.texts.c
    for start in range(0, len(wanted), _IN_ONE_QUERY):
        some = c.hash.in_(wanted[start : start + _IN_ONE_QUERY])
        connection.execute(sa.update(t.texts).where(some).values(uses=c.uses + 1))


def release(connection: sa.Connection, keys: Iterable[bytes | None]) -> None:
    """Counts one use less of each text, and deletes those that nothing uses any more."""
    writer = Writer(cursor_of(connection), Known())
    for key in keys:
        if key is not None:
            writer.release(key)


def cursor_of(connection: sa.Connection) -> Cursor:
    """A cursor in the connection's own transaction."""
    return Cursor(connection.connection.cursor(), connection.dialect)


@dataclass(slots=True)
class Known:
    """What a process believes to be stored. It need not be true: it only saves work."""

    most_hashes: int = 4096
    most_bases: int = 32
    most_base_bytes: int = 8 << 20
    hashes: dict[bytes, bool] = field(default_factory=dict[bytes, bool])
    """The most recently used come last."""
    bases: dict[bytes, tuple[bytes, bytes]] = field(
        default_factory=dict[bytes, tuple[bytes, bytes]]
    )
    """(hash, text) of a long text, by how it begins: others that begin so may be much like it."""
    most_hashed_bytes: int = 4 << 20
    hashed: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    """The hashes of texts that may come again. The most recently used come last."""
    hashed_bytes: int = 0
    """Of memory for `hashed`, about."""
    packed: dict[tuple[bytes, bytes | None], bytes] = field(
        default_factory=dict[tuple[bytes, bytes | None], bytes]
    )
    """Texts of the next batch, compressed before its lock, by their hash and that of their base."""

    def has(self, key: bytes) -> bool:
        """True if this text is believed to be stored."""
        known = self.hashes.pop(key, False)
        if known:
            self.hashes[key] = True
        return known

    def add(self, key: bytes) -> None:
        """Notes a stored text and forgets the least recently used."""
        self.hashes[key] = True
        if len(self.hashes) > self.most_hashes:
            self.hashes.pop(next(iter(self.hashes)), None)

    def hash_of(self, text: bytes) -> bytes:
        """`content_hash` of a text that may come again: tools, settings, the start of a prompt.

        Agents send these with each request.
        """
        found = self.hashed.pop(text, None)
        if found is None:
            found = content_hash(text)
            self.hashed_bytes += len(text) + _HASHED_BYTES
        self.hashed[text] = found
        while self.hashed_bytes > self.most_hashed_bytes:
            oldest = next(iter(self.hashed))
            del self.hashed[oldest]
            self.hashed_bytes -= len(oldest) + _HASHED_BYTES
        return found

    def pack(self, key: bytes, text: bytes) -> None:
        """Compresses a text ahead of the transaction that will store it, if it seems to be new."""
        if key not in self.hashes and (key, None) not in self.packed:
            self.packed[key, None] = compress(text)
            if (base := self.base_of(key, text)) is not None:
                self.packed[key, base[0]] = compress(text, base[1])

    def base_of(self, key: bytes, text: bytes) -> tuple[bytes, bytes] | None:
        """(hash, text) of what a long text may be much like."""
        base = self.bases.get(text[:_BEGINNING_BYTES]) if len(text) >= _LONG_BYTES else None
        return base if base and base[0] != key else None

    def compressed(self, key: bytes, text: bytes, base: tuple[bytes, bytes] | None = None) -> bytes:
        """A text as it is stored, against its base if there is one."""
        found = self.packed.get((key, base and base[0]))
        return compress(text, base and base[1]) if found is None else found

    def add_base(self, key: bytes, text: bytes) -> None:
        """Notes a long text to compress others against, and forgets the oldest."""
        self.bases[text[:_BEGINNING_BYTES]] = key, text
        size = sum(len(text) for _, text in self.bases.values())
        while len(self.bases) > self.most_bases or size > self.most_base_bytes:
            _, oldest = self.bases.pop(next(iter(self.bases)))
            size -= len(oldest)


_C, _THIS = t.texts.c, t.texts.c.hash == sa.bindparam("key")
_USE = sa.update(t.texts).where(_THIS).values(uses=_C.uses + sa.bindparam("more"))
_ADD = sa.text(
    "INSERT INTO texts (hash, uses, base, stored) VALUES (:hash, :more, :base, :stored) "
    "ON CONFLICT (hash) DO UPDATE SET uses = texts.uses + :more"
).bindparams(sa.bindparam("hash", type_=_C.hash.type), sa.bindparam("base", type_=_C.base.type))
_FIND = sa.select(_C.uses, _C.base).where(_THIS).with_for_update()
_LEAVE = sa.update(t.texts).where(_THIS).values(uses=_C.uses - 1)
_DELETE = sa.delete(t.texts).where(_THIS)
_BASE = t.texts.alias("base_text")
_ONE = (
    sa.select(_C.stored, _C.base, _BASE.c.stored.label("of_base"))
    .outerjoin(_BASE, _C.base == _BASE.c.hash)
    .where(_THIS)
)


class Writer:
    """Stores and releases texts in one transaction; `close` it before the commit."""

    def __init__(self, cursor: Cursor, known: Known) -> None:
        self._cursor = cursor
        self._known = known
        self._uncounted: dict[bytes, tuple[int, bytes]] = {}
        """(new uses, text) of texts that are believed to be stored: several turns use one text."""

    def put(self, text: bytes, key: bytes | None = None) -> bytes:
        """Stores a text, or counts one more use of it; returns its hash, `key` where known.

        The use of a known text is counted by `close`.
        """
        key = key or content_hash(text)
        if self._known.has(key):
            self._uncounted[key] = self._uncounted.get(key, (0, text))[0] + 1, text
        else:
            self._add(key, text, 1)
        return key

    def close(self) -> None:
        """Counts what `put` has left uncounted."""
        if not self._uncounted:
            return
        rows = [{"key": key, "more": uses} for key, (uses, _) in self._uncounted.items()]
        self._cursor.settle()  # what this transaction added is found, too
        if self._cursor.run_many(_USE, rows) < len(rows):
            for key, (uses, text) in self._uncounted.items():
                if self._cursor.first(_FIND, key=key) is None:  # it was not known rightly
                    self._add(key, text, uses)
        self._uncounted.clear()

    def release(self, key: bytes) -> None:
        """Counts one use less of a text, and deletes it if nothing uses it any more."""
        self._cursor.settle()
        row = self._cursor.first(_FIND, key=key)
        if row is None:
            return
        if row.uses > 1:
            self._cursor.send(_LEAVE, key=key)
            return
        self._cursor.send(_DELETE, key=key)
        if row.base is not None:
            self.release(row.base)

    def _add(self, key: bytes, text: bytes, uses: int) -> None:
        is_long = len(text) >= _LONG_BYTES
        if not (is_long and self._use(key, uses)):
            stored, base = self._compressed(key, text)
            stored = seal(self._cursor.vault, packed_place(key, base), stored)
            self._cursor.later(_ADD, hash=key, more=uses, base=base, stored=stored)
        self._known.add(key)

    def _use(self, key: bytes, uses: int = 1) -> bool:
        """Counts more uses; False if there is no such text."""
        self._cursor.settle()
        return self._cursor.run(_USE, key=key, more=uses) > 0

    def _compressed(self, key: bytes, text: bytes) -> tuple[bytes, bytes | None]:
        """(the text compressed, the hash of the text that it was compressed against)."""
        plain = self._known.compressed(key, text)
        if len(text) < _LONG_BYTES:
            return plain, None
        if (base := self._known.base_of(key, text)) is not None:
            against = self._known.compressed(key, text, base)
            if 2 * len(against) < len(plain) and self._use(base[0]):
                return against, base[0]
        self._known.add_base(key, text)
        return plain, None


def packed_place(key: bytes, base: bytes | None) -> bytes:
    """What binds a sealed text to its row: the hashes of it and of its base."""
    return b"texts " + key + (base or b"")


def packed(connection: sa.Connection, key: bytes, text: bytes) -> bytes:
    """A text as it is stored under its hash, without a base."""
    return seal(vault_of(connection.dialect), packed_place(key, None), compress(text))


def delete_base(connection: sa.Connection, base: bytes, against: Sequence[bytes]) -> None:
    """Deletes a text that nothing uses but those compressed `against` it: they stand alone then."""
    c = t.texts.c
    for key, text in get(connection, against).items():
        alone = {"base": None, "stored": packed(connection, key, text)}
        connection.execute(sa.update(t.texts).where(c.hash == key).values(**alone))
    connection.execute(sa.delete(t.texts).where(c.hash == base))


def unpacked(
    vault: Vault | None,
    key: bytes,
    stored: bytes,
    base_key: bytes | None = None,
    base: bytes | None = None,
) -> bytes:
    """The text that is stored under a hash; `base` is the text that it was compressed against."""
    return decompress(unseal(vault, packed_place(key, base_key), stored), base)


class _Zstd(threading.local):
    """Contexts that cost more to make than a small text to compress; each thread has its own."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=3)
        self.quick_compressor = zstandard.ZstdCompressor(level=-1)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def compress_numbers(packed: bytes) -> bytes:
    """What `compress` returns, with less effort: numbers seldom repeat."""
    return _zstd.quick_compressor.compress(packed)


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
