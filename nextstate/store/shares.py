"""Chooses the samples of a batch, so that no single session decides a version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

LOOKED_AT = 256
"""Waiting samples that are read for each place in a batch: one session may have flooded them."""


def fair_share(waiting: Iterable[tuple[str, str]], limit: int) -> list[str]:
    """The turns of a batch, chosen from (turn, session) of the waiting samples, the best first.

    No session gives more than half of `limit` while another session waits; if the others have too
    few, the batch is smaller. A session that waits alone may fill the batch.

    >>> fair_share([("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c")], 4)
    ['a1', 'a2', 'b1', 'c1']
    >>> fair_share([("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")], 4)
    ['a1', 'a2', 'b1']
    >>> fair_share([("a1", "a"), ("a2", "a"), ("a3", "a")], 4)
    ['a1', 'a2', 'a3']
    """
    most = max(1, limit // 2)
    chosen: list[str] = []
    over: list[str] = []
    given: Counter[str] = Counter()
    for turn, session in waiting:
        if given[session] >= most:
            over.append(turn)
            continue
        given[session] += 1
        chosen.append(turn)
        if len(chosen) == limit:
            return chosen
    alone = len(given) == 1
    return chosen + over[: limit - len(chosen)] if alone else chosen
