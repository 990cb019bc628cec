"""Rules: which samples may train, when an update is due, which sessions are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

HELD_BACK_S = 3600.0
"""A full batch that the shares make smaller (`nextstate/store/shares.py`) waits so long to be full
again."""
Parents = Mapping[int, int | None]
"""Each version's parent by its number; the base has none."""


def policy_lag(parents: Parents, current: int, version: int) -> int:
    """Updates between the version that made a sample and the one that trains.

    For a version that was rolled back, the path goes through the last common ancestor.

    >>> policy_lag({0: None, 1: 0, 2: 1, 3: 1}, current=3, version=1)
    1
    >>> policy_lag({0: None, 1: 0, 2: 1, 3: 1}, current=3, version=2)
    2
    """
    ours = _chain(parents, current)
    for above, ancestor in enumerate(_chain(parents, version)):
        if ancestor in ours:
            return above + ours.index(ancestor)
    return len(ours)


def unfit(tokens: int, lag: int, *, max_lag: int, max_tokens: int) -> str | None:
    """Why a sample with this many tokens must not train, or None."""
    if lag > max_lag:
        return f"lag {lag} over the limit of {max_lag}"
    if tokens > max_tokens:
        return f"{tokens} tokens over the limit of {max_tokens}"
    return None


def is_due(
    ready: int, waited_s: float, *, batch_size: int, min_batch: int, max_wait_s: float
) -> bool:
    """True if an update starts with `ready` samples: a full batch, or enough that have waited.

    `waited_s` counts from when `min_batch` were ready. With `max_wait_s` 0 only a full batch
    starts an update.
    """
    return ready >= batch_size or (ready >= min_batch and 0 < max_wait_s <= waited_s)


def longest_wait_s(ready: int, given: int, *, batch_size: int, max_wait_s: float) -> float:
    """How long an update waits for a full batch; 0: without end.

    `ready` samples wait, of which the shares let `given` train.

    >>> longest_wait_s(20, 5, batch_size=16, max_wait_s=0.0)
    3600.0
    >>> longest_wait_s(5, 5, batch_size=16, max_wait_s=0.0)
    0.0
    """
    return max_wait_s or (HELD_BACK_S if ready >= batch_size > given else 0.0)


def is_held_out(lineage: str, session: str, share: float, key: bytes) -> bool:
    """True if the session is in the fraction `share` that never trains; always the same ones.

    Whole sessions are chosen, because later turns carry the earlier ones in their prompts. Clients
    name their sessions: without the secret `key` they cannot tell which ones are chosen.
    """
    name = f"{lineage}\0{session}".encode()
    place = int.from_bytes(
        hashlib.blake2b(name, key=key, person=b"held out", digest_size=8).digest()
    )
    return place < share * 2**64


def _chain(parents: Parents, number: int) -> list[int]:
    chain = [number]
    while (parent := parents.get(chain[-1])) is not None:
        chain.append(parent)
    return chain
