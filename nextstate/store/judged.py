"""The newest judged turns of a lineage, by which the watch and the gate compare versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from nextstate.store import schema as t
from nextstate.store.shares import OWNER

_LOOKED_THROUGH = 16
"""Samples that are looked through for each turn that is wanted: most may be steps of episodes."""
_OF_OTHERS = 4
"""Turns that are read of a client that is limited, for each that is wanted: a flood is thinned."""


def newest_judged(lineage: str, limit: int) -> sa.Select[Any, Any, Any, Any, Any, Any, Any]:
    """The judged turns among so many samples that `limit` of them are likely, newest first."""
    s, v, every = t.samples.c, t.verdicts.c, t.samples.alias().c
    oldest = sa.select(every.seq).where(every.lineage == lineage).order_by(every.seq.desc())
    oldest = oldest.limit(1).offset(max(0, _LOOKED_THROUGH * limit - 1)).scalar_subquery()
    ours = s.lineage == lineage, s.policy_version.is_not(None), t.turns.c.episode.is_(None)
    return (
        sa.select(
            *(t.turns.c.session, s.policy_version, s.score, v.judge),
            *(s.seq, s.client, v.created_at),
        )
        .join_from(t.samples, t.turns, s.turn == t.turns.c.id)
        .join(t.verdicts, v.turn == s.turn)
        .where(*ours, s.seq >= sa.func.coalesce(oldest, 0))
        .order_by(s.seq.desc())
    )


def thinned(rows: Sequence[Any], limit: int) -> list[Any]:
    """Without what one client gives beyond its most."""
    given: Counter[str] = Counter()
    kept: list[Any] = []
    for row in rows:
        given[row.client] += 1
        if given[row.client] <= (limit if row.client == OWNER else _OF_OTHERS * limit):
            kept.append(row)
    return kept
