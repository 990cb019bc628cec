"""Which leased samples may train, and why the others must not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

Parents = Mapping[int, int | None]
"""Each version's parent by its number; the base has none."""


def policy_lag(parents: Parents, current: int, version: int) -> int:
    """Updates between the version that made a sample and the one that trains.

    A version that was rolled back counts from where its chain leaves the current one's.

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
    """The reason for which a sample of that many tokens must not train, or None."""
    if lag > max_lag:
        return f"lag {lag} over the limit of {max_lag}"
    if tokens > max_tokens:
        return f"{tokens} tokens over the limit of {max_tokens}"
    return None


def is_due(
    ready: int, waited_s: float, *, batch_size: int, min_batch: int, max_wait_s: float
) -> bool:
    """Whether an update starts with `ready` samples: a full batch, or enough that have waited.

    `waited_s` is since there were `min_batch` of them; `max_wait_s` 0 waits for a full batch.
    """
    return ready >= batch_size or (ready >= min_batch and 0 < max_wait_s <= waited_s)


def is_held_out(lineage: str, session: str, share: float) -> bool:
    """Whether a session is one of the `share` that never trains; always the same ones.

    Chosen by session, for its later turns carry the earlier ones in their prompts.
    """
    name = f"{lineage}\0{session}".encode()
    place = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
    return place < share * 2**64


def _chain(parents: Parents, number: int) -> list[int]:
    chain = [number]
    while (parent := parents.get(chain[-1])) is not None:
        chain.append(parent)
    return chain
