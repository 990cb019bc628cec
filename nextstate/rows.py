"""Records as database rows: packing, compression, and the way back."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import orjson
import sqlalchemy as sa
import zstandard

from nextstate import schema as t
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

HASH_BYTES = 16
Row: TypeAlias = sa.Row[*tuple[Any, ...]]


def content_hash(body: bytes) -> bytes:
    """The 16-byte name under which a message's JSON bytes are stored."""
    return hashlib.blake2b(body, digest_size=HASH_BYTES).digest()


def sample_of(row: Row) -> Sample:
    return Sample(
        turn=row.id,
        session=row.session,
        policy_version=row.policy_version,
        prompt_ids=unpack_ids(row.prompt_ids) or (),
        completion_ids=unpack_ids(row.completion_ids) or (),
        behaviour_logprobs=unpack_floats(row.behaviour_logprobs) or (),
        score=row.score,
        hinted_prompt_ids=unpack_ids(row.hinted_prompt_ids),
    )


def turn_of(connection: sa.Connection, row: Row) -> Turn:
    request: Json = {"messages": [load_json(connection, key) for key in hashes(row.messages)]}
    request.update(orjson.loads(decompress(row.rest)))
    if "tools" in request:
        request["tools"] = load_json(connection, bytes.fromhex(request["tools"]))
    return Turn(
        id=row.id,
        session=row.session,
        index=row.idx,
        kind=TurnKind(row.kind),
        lineage=row.lineage,
        policy_version=row.policy_version,
        client_model=row.client_model,
        request=request,
        reply=load_json(connection, row.reply),
        finish_reason=row.finish_reason,
        prompt_ids=unpack_ids(row.prompt_ids),
        completion_ids=unpack_ids(row.completion_ids),
        behaviour_logprobs=unpack_floats(row.behaviour_logprobs),
        sampling=orjson.loads(row.sampling),
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


def verdict_of(row: Row) -> Verdict:
    return Verdict(
        turn=row.turn,
        votes=tuple(orjson.loads(row.votes)),
        score=row.score,
        judge=row.judge,
        hint=row.hint,
        hinted_prompt_ids=unpack_ids(row.hinted_prompt_ids),
    )


def version_of(row: Row) -> PolicyVersion:
    return PolicyVersion(
        lineage=row.lineage,
        number=row.number,
        parent=row.parent,
        path=row.path,
        sha256=row.sha256,
        samples=row.samples,
        state=VersionState(row.state),
        metrics=orjson.loads(row.metrics),
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
    }


def load_json(connection: sa.Connection, key: bytes) -> Any:
    query = sa.select(t.messages.c.body).where(t.messages.c.hash == key)
    return orjson.loads(decompress(connection.execute(query).scalar_one()))


def hashes(packed: bytes) -> Iterable[bytes]:
    return (packed[i : i + HASH_BYTES] for i in range(0, len(packed), HASH_BYTES))


def dump(value: Any) -> str:
    return orjson.dumps(value).decode()


def compress(body: bytes) -> bytes:
    # A compressor is not safe to share between threads and costs microseconds to make.
    return zstandard.ZstdCompressor(level=3).compress(body)


def decompress(body: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(body)


def pack_ids(ids: Sequence[int] | None) -> bytes | None:
    return None if ids is None else compress(array("I", ids).tobytes())


def unpack_ids(packed: bytes | None) -> tuple[int, ...] | None:
    return None if packed is None else tuple(array("I", decompress(packed)))


def pack_floats(values: Sequence[float] | None) -> bytes | None:
    # 64-bit: the store holds the very numbers that the engine returned.
    return None if values is None else compress(array("d", values).tobytes())


def unpack_floats(packed: bytes | None) -> tuple[float, ...] | None:
    return None if packed is None else tuple(array("d", decompress(packed)))
