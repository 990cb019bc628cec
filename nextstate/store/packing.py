"""Token ids, log-probs and JSON values as bytes of a row, and back."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any

from nextstate.store.texts import Texts, compress, compress_numbers, decompress, hashes
from nextstate.wire import write_json

_SHORTEST_RUN, _LONGEST_RUN = 128, 2048


def dump(value: Any) -> str:
    """A JSON value as text."""
    return write_json(value).decode()


def id_runs(ids: Sequence[int]) -> list[bytes]:
    """Token ids cut into runs of 128 to 2048, whose bounds depend on nearby ids only.

    A prompt that repeats an earlier one with a change in the middle shares all other runs with it,
    and a run is stored once. A bound follows an id whose lowest byte is 0: one id in 256.
    """
    packed = _packed_ids(ids)
    lowest, size = packed[::4], len(ids)
    runs: list[bytes] = []
    start = 0
    while start < size:
        longest = min(start + _LONGEST_RUN, size)
        end = lowest.find(0, start + _SHORTEST_RUN - 1, longest) + 1 or longest
        runs.append(_in_planes(packed[4 * start : 4 * end]))
        start = end
    return runs


def join_runs(packed: bytes | None, texts: Texts) -> tuple[int, ...] | None:
    """Token ids from the hashes of their runs; None stays None."""
    if packed is None:
        return None
    return tuple(array("I", b"".join(_interleaved(texts[key]) for key in hashes(packed))))


def pack_ids(ids: Sequence[int] | None) -> bytes | None:
    """Token ids as the bytes of one column."""
    return None if ids is None else compress(_in_planes(_packed_ids(ids)))


def unpack_ids(packed: bytes | None) -> tuple[int, ...] | None:
    """The way back from `pack_ids`."""
    return None if packed is None else tuple(array("I", _interleaved(decompress(packed))))


def _packed_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f"{len(ids)}I", *ids)


def _in_planes(ids: bytes) -> bytes:
    """The lowest bytes of all ids, then the next ones, …: the high ones are nearly all alike."""
    return ids[::4] + ids[1::4] + ids[2::4] + ids[3::4]


def _interleaved(planes: bytes) -> bytes:
    size = len(planes) // 4
    ids = bytearray(len(planes))
    for byte in range(4):
        ids[byte::4] = planes[byte * size : (byte + 1) * size]
    return bytes(ids)


def pack_floats(values: Sequence[float] | None) -> bytes | None:
    """Exactly the numbers that the engine returned: in 32 bits each where they fit."""
    if values is None:
        return None
    try:
        packed = struct.pack(f"{len(values)}f", *values)
    except OverflowError:  # beyond 32 bits
        packed = b""
    if struct.unpack(f"{len(packed) // 4}f", packed) == tuple(values):
        return compress_numbers(b"f" + packed)
    return compress_numbers(b"d" + struct.pack(f"{len(values)}d", *values))


def unpack_floats(packed: bytes | None) -> tuple[float, ...] | None:
    """The way back from `pack_floats`."""
    if packed is None:
        return None
    kept = decompress(packed)
    return tuple(array(chr(kept[0]), kept[1:]))
