"""Who may contribute how much to a version, so that nobody decides it alone.

Each limit counts only where somebody competes: a person who is alone never meets one.

- A client (a key without the scope `admin`) gives at most a quarter of a version, and at most twice
  an even share where more than eight wait. Fewer than four clients give even shares, unless one of
  them is the owner (a key that may do everything, or nobody needs one), who is not limited. Others
  are those who wait and those who gave something to the last versions of a day. What is too much
  waits until others give something or a day has passed.
- A session gives at most half while another one of its client waits, so a batch may be smaller.
- A session, an hour, and what only tools or the environment said get at most a quarter as long as
  something else fills the batch. What is then left over fills it up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from nextstate.records import Source

LOOKED_AT = 256
"""Waiting samples that are read for each place in a batch: one session may have flooded them."""
SHARE = 0.25
"""Of a version."""
REMEMBERED_S, REMEMBERED = 86_400.0, 16
"""Clients that gave something to so many of the newest versions, made in this time, compete."""
OWNER = ""
"""The client that is not limited."""
_LOOK_AHEAD = 4
_MACHINES = (Source.TOOL, Source.ENVIRONMENT)


class Waiting(NamedTuple):
    """A sample that waits."""

    turn: str
    session: str
    source: str | None = None
    """Of what it was judged by."""
    hour: int = 0
    """Hours from 1970 to its verdict."""


def fair_share(waiting: Iterable[Waiting], limit: int) -> list[str]:
    """The turns of a batch, chosen from the waiting samples of a client, the best first.

    >>> a, b = [Waiting(f"a{n}", "a") for n in range(3)], [Waiting("b0", "b")]
    >>> fair_share([*a, *b], 4), fair_share(a, 4)
    (['a0', 'a1', 'b0'], ['a0', 'a1', 'a2'])
    """
    quarter, half = max(1, int(limit * SHARE)), max(1, limit // 2)
    ranked: list[tuple[int, int, str]] = []
    over: list[str] = []
    of_session: Counter[str] = Counter()
    given: Counter[object] = Counter()
    best = 0
    for place, (turn, session, source, hour) in enumerate(waiting):
        if of_session[session] >= half:
            over.append(turn)
            continue
        kinds: list[object] = [("hour", hour), *([source] if source in _MACHINES else [])]
        rank = 0 if all(given[kind] < quarter for kind in kinds) else 1
        if of_session[session] >= quarter:
            rank = 2
        of_session[session] += 1
        if rank == 0:
            given.update(kinds)
            best += 1
        ranked.append((rank, place, turn))
        if best == limit or len(ranked) >= _LOOK_AHEAD * limit:
            break
    chosen = [
        turn for _, turn in sorted((place, turn) for _, place, turn in sorted(ranked)[:limit])
    ]
    alone = len(of_session) == 1
    return chosen + over[: limit - len(chosen)] if alone else chosen


def allotted(available: Mapping[str, int], known: Collection[str], limit: int) -> dict[str, int]:
    """How many of their samples the clients give to a batch of at most `limit`, as many as may be.

    `known` are the clients that gave something lately.

    >>> allotted({"": 2, "key bob": 90}, (), 16), allotted({"key bob": 90}, (), 16)
    ({'': 2}, {'key bob': 16})
    >>> allotted({"key bob": 90}, {"key eve"}, 16), allotted({"key bob": 90, "key eve": 3}, (), 16)
    ({}, {'key bob': 3, 'key eve': 3})
    """
    share = share_of(available, known)
    for size in range(min(limit, sum(available.values())), 0, -1):
        most = {
            client: count if client == OWNER else min(count, int(share * size + 1e-9))
            for client, count in available.items()
        }
        if sum(most.values()) >= size:
            return _in_turn(most, size)
    return {}


def beside_others(clients: Sequence[str], recent: Collection[str]) -> list[int]:
    """The places of what counts in a sequence: at no time more of a client than its share so far.

    `recent` are the clients that gave something lately. What is left out depends on nothing but who
    came when.

    >>> beside_others(["eve", "eve", "", "", "", "eve", "eve"], {"", "eve"})
    [2, 3, 4, 5]
    >>> beside_others(["eve", "eve", "eve"], {"eve"})
    [0, 1, 2]
    """
    share, one = share_of(dict.fromkeys(recent, 1), ()), int(OWNER in recent)
    given: Counter[str] = Counter()
    kept: list[int] = []
    for place, client in enumerate(clients):
        if client == OWNER or given[client] + one <= share * (len(kept) + one):
            given[client] += 1
            kept.append(place)
    return kept


def share_of(available: Mapping[str, int], known: Collection[str]) -> float:
    """The share of a version that each client but the owner may give."""
    waiting = {client for client, count in available.items() if count}
    everybody = {*known, *waiting}
    most = min(SHARE, 2 / max(1, len(waiting)))
    return most if OWNER in everybody else max(most, 1 / max(1, len(everybody)))


def _in_turn(most: Mapping[str, int], size: int) -> dict[str, int]:
    """So many in all, one of each client after the other, and of none more than `most`."""
    given: Counter[str] = Counter()
    while given.total() < size:
        for client in sorted(most):
            if given[client] < most[client] and given.total() < size:
                given[client] += 1
    return dict(given)
