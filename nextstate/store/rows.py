"""Records as database rows: packing, compression, and the way back."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import orjson
import sqlalchemy as sa
import zstandard

from nextstate.records import (
    Json,
    NextState,
    PolicyVersion,
    Sample,
    Source,
    Timings,
    Turn,
    TurnKind,
    Verdict,
    VersionState,
)
from nextstate.store import schema as t
from nextstate.wire import read_json, write_json

HASH_BYTES = 16
Row: TypeAlias = sa.Row[*tuple[Any, ...]]
Bodies: TypeAlias = Mapping[bytes, bytes]
"""What is stored by content, under its hash."""

_SHORTEST_RUN, _LONGEST_RUN = 128, 2048
_IN_ONE_QUERY = 500


def content_hash(body: bytes) -> bytes:
    """The 16-byte name under which a message's JSON bytes are stored."""
    return hashlib.blake2b(body, digest_size=HASH_BYTES).digest()


def id_runs(ids: Sequence[int]) -> list[bytes]:
    """Token ids cut into runs of 128 to 2048 whose bounds depend on the ids near them alone.

    A prompt that repeats an earlier one with something added, dropped or changed in the middle has
    all other runs in common with it, and a run is stored once. A bound follows an id whose lowest
    byte is 0, which one id in 256 is.
    """
    packed = array("I", ids).tobytes()
    lowest, size = packed[::4], len(ids)
    runs: list[bytes] = []
    start = 0
    while start < size:
        longest = min(start + _LONGEST_RUN, size)
        end = lowest.find(0, start + _SHORTEST_RUN - 1, longest) + 1 or longest
        runs.append(_in_planes(packed[4 * start : 4 * end]))
        start = end
    return runs


def sample_of(row: Row, bodies: Bodies, others: Sequence[bytes] = ()) -> Sample:
    return Sample(
        turn=row.id,
        session=row.session,
        policy_version=row.policy_version,
        prompt_ids=join_runs(row.prompt_ids, bodies) or (),
        completion_ids=unpack_ids(row.completion_ids) or (),
        behaviour_logprobs=unpack_floats(row.behaviour_logprobs) or (),
        score=row.score,
        hinted_prompt_ids=join_runs(row.hinted_prompt_ids, bodies),
        other_prompts=tuple(join_runs(runs, bodies) or () for runs in others),
    )


def turn_of(connection: sa.Connection, row: Row) -> Turn:
    keys = [row.rest, row.reply, *hashes(row.messages), *hashes(row.prompt_ids or b"")]
    bodies = load_bodies(connection, keys)
    request: Json = {"messages": [read_json(bodies[key]) for key in hashes(row.messages)]}
    request.update(read_json(bodies[row.rest]))
    if "tools" in request:
        tools = bytes.fromhex(request["tools"])
        request["tools"] = read_json(load_bodies(connection, [tools])[tools])
    return Turn(
        id=row.id,
        session=row.session,
        index=row.idx,
        kind=TurnKind(row.kind),
        lineage=row.lineage,
        policy_version=row.policy_version,
        client_model=row.client_model,
        request=request,
        reply=read_json(bodies[row.reply]),
        finish_reason=row.finish_reason,
        prompt_ids=join_runs(row.prompt_ids, bodies),
        completion_ids=unpack_ids(row.completion_ids),
        behaviour_logprobs=unpack_floats(row.behaviour_logprobs),
        sampling=read_json(row.sampling.encode()),
        timings=Timings(row.started_at, row.first_token_s, row.total_s),
        untrainable=row.untrainable,
        parent=row.parent,
    )


def next_states_of(connection: sa.Connection, turn_id: str) -> tuple[NextState, ...]:
    n = t.next_states.c
    query = sa.select(t.next_states).where(n.turn == turn_id).order_by(n.seq)
    return tuple(
        NextState(row.turn, Source(row.source), decompress(row.text).decode(), row.trust)
        for row in connection.execute(query)
    )


def verdict_of(row: Row, bodies: Bodies) -> Verdict:
    return Verdict(
        turn=row.turn,
        votes=tuple(orjson.loads(row.votes)),
        score=row.score,
        judge=row.judge,
        hint=row.hint,
        hinted_prompt_ids=join_runs(row.hinted_prompt_ids, bodies),
        confidence=row.confidence,
    )


def load_verdict(connection: sa.Connection, turn_id: str) -> Verdict | None:
    query = sa.select(t.verdicts).where(t.verdicts.c.turn == turn_id)
    row = connection.execute(query).first()
    if row is None:
        return None
    return verdict_of(row, load_bodies(connection, hashes(row.hinted_prompt_ids or b"")))


def version_of(row: Row | SimpleNamespace) -> PolicyVersion:
    return PolicyVersion(
        lineage=row.lineage,
        number=row.number,
        parent=row.parent,
        path=row.path,
        sha256=row.sha256,
        samples=row.samples,
        state=VersionState(row.state),
        metrics=orjson.loads(row.metrics),
        reason=row.reason,
    )


def version_row(version: PolicyVersion, now: float) -> dict[str, Any]:
    return {
        "lineage": version.lineage,
        "number": version.number,
        "parent": version.parent,
        "path": version.path,
        "sha256": version.sha256,
        "samples": version.samples,
        "state": version.state,
        "metrics": dump(dict(version.metrics)),
        "created_at": now,
        "reason": version.reason,
    }


def load_bodies(connection: sa.Connection, keys: Iterable[bytes]) -> dict[bytes, bytes]:
    """What is stored under `keys`, in few queries."""
    wanted = list(dict.fromkeys(keys))
    found: dict[bytes, bytes] = {}
    c = t.messages.c
    for start in range(0, len(wanted), _IN_ONE_QUERY):
        some = wanted[start : start + _IN_ONE_QUERY]
        rows = connection.execute(sa.select(t.messages).where(c.hash.in_(some))).all()
        of_base = {row.base for row in rows if row.base is not None}
        bases = load_bodies(connection, of_base) if of_base else {}
        for row in rows:
            base = None if row.base is None else bases[row.base]
            found[row.hash] = decompress(row.body, base)
    return found


def keep_body(connection: sa.Connection, body: bytes) -> bytes:
    """Stores a body once and returns its content hash."""
    key = content_hash(body)
    known = sa.select(t.messages.c.hash).where(t.messages.c.hash == key)
    if connection.execute(known).first() is None:
        connection.execute(sa.insert(t.messages).values(hash=key, body=compress(body)))
    return key


def keep_ids(connection: sa.Connection, ids: Sequence[int]) -> bytes:
    """Stores token ids in runs and returns the runs' hashes, one after the other."""
    return b"".join(keep_body(connection, run) for run in id_runs(ids))


def hashes(packed: bytes) -> Iterable[bytes]:
    return (packed[i : i + HASH_BYTES] for i in range(0, len(packed), HASH_BYTES))


def dump(value: Any) -> str:
    return write_json(value).decode()


class _Zstd(threading.local):
    """Contexts that cost more to make than a small text to compress; each thread has its own."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=3)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def compress(body: bytes, base: bytes | None = None) -> bytes:
    """`body` compressed; against `base` if there is one."""
    if base is None:
        return _zstd.compressor.compress(body)
    return zstandard.ZstdCompressor(level=3, dict_data=_dictionary(base)).compress(body)


def decompress(body: bytes, base: bytes | None = None) -> bytes:
    if base is None:
        return _zstd.decompressor.decompress(body)
    return zstandard.ZstdDecompressor(dict_data=_dictionary(base)).decompress(body)


def _dictionary(base: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def join_runs(packed: bytes | None, bodies: Bodies) -> tuple[int, ...] | None:
    """Token ids from the hashes of their runs; None stays None."""
    if packed is None:
        return None
    return tuple(array("I", b"".join(_interleaved(bodies[key]) for key in hashes(packed))))


def pack_ids(ids: Sequence[int] | None) -> bytes | None:
    return None if ids is None else compress(_in_planes(array("I", ids).tobytes()))


def unpack_ids(packed: bytes | None) -> tuple[int, ...] | None:
    return None if packed is None else tuple(array("I", _interleaved(decompress(packed))))


def _in_planes(ids: bytes) -> bytes:
    """The lowest bytes of all ids, then the next ones, …: the high ones are nearly all alike."""
    return b"".join(ids[byte::4] for byte in range(4))


def _interleaved(planes: bytes) -> bytes:
    size = len(planes) // 4
    ids = bytearray(len(planes))
    for byte in range(4):
        ids[byte::4] = planes[byte * size : (byte + 1) * size]
    return bytes(ids)


def pack_floats(values: Sequence[float] | None) -> bytes | None:
    """The very numbers that the engine returned: in 32 bits where they were 32 bits there."""
    if values is None:
        return None
    exact, short = array("d", values), array("f", values)
    kept = short if array("d", short) == exact else exact
    return compress(kept.typecode.encode() + kept.tobytes())


def unpack_floats(packed: bytes | None) -> tuple[float, ...] | None:
    if packed is None:
        return None
    kept = decompress(packed)
    return tuple(array(chr(kept[0]), kept[1:]))
