"""Which of the samples that wait make a batch, so that no one session decides a version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

LOOKED_AT = 256
"""So many that wait are looked at for each sample of a batch: one session may have flooded them."""


def fair_share(waiting: Iterable[tuple[str, str]], limit: int) -> list[str]:
    """The turns of a batch, from (turn, session) of those that wait, the best first.

    No session gives more than half of `limit` while another has one that waits: the batch is
    smaller if the others have too few. One session alone gives all of it.

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
