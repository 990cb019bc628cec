"""What the watch has seen of a version, what it could see by now, and what it would do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from learner.means import mean_over_groups
from learner.watch import LEVEL, LOOKS, TURNS, beside, chain_of, split
from nextstate.records import Json, JudgedTurn, PolicyVersion
from nextstate.store import Store

_LATER = max(LOOKS, key=lambda look: LOOKS[look])
"""About so many later turns are shown: at this number the watch tests most closely."""
_SURE = 0.01


def serving_watch(store: Store, lineage: str) -> Json | None:
    """What the watch sees of what serves, with the versions before it that served lately.

    None if there is nothing before it.
    """
    versions = store.versions.all(lineage)
    chain = chain_of(versions, store.versions.serving(lineage).number)
    turns = store.versions.judged_turns(lineage, TURNS)
    suspects = chain[1:]
    if not suspects:
        return None
    later = {suspect: len(split(chain, turns, suspect)[1]) for suspect in suspects}
    return _seen(chain, turns, min(suspects, key=lambda number: abs(later[number] - _LATER)))


def version_watch(store: Store, version: PolicyVersion) -> Json | None:
    """What the watch sees of one version and of those trained from it; None for the base."""
    versions = store.versions.all(version.lineage)
    chain = chain_of(versions, store.versions.serving(version.lineage).number)
    if version.number not in chain:
        chain = chain_of(versions, version.number)
    if version.number == chain[0]:
        return None
    return _seen(chain, store.versions.judged_turns(version.lineage, TURNS), version.number)


def watch_text(found: Json | None) -> str:
    """The same in plain words."""
    if found is None:
        return "nothing to compare: no version before it"
    text = f"since version {found['since']}: {found['turns']} judged turns"
    if not found["comparable"]:
        text += ", none in a session that an earlier version served too, so nothing to compare"
    else:
        text += (
            f", {found['comparable']} of them in sessions that earlier versions served too; in "
            f"these the score changed by {found['change']:+.2f} ± {found['error']:.2f}"
        )
        if found["visible"] is not None:
            text += f"; by now a fall by {found['visible']:.2f} would be found in 4 of 5 cases"
    text += f"; a clear fall in the same sessions puts version {found['before']} back into service"
    if found["other_sessions"] is not None:
        old, new = found["other_sessions"]
        text += (
            f". In other sessions the score went from {old:.2f} to {new:.2f}: harder questions or "
            f"a worse version, which nobody can tell apart; `nextstate rollback {found['before']}` "
            "shows which"
        )
    return text


def _seen(chain: Sequence[int], turns: Sequence[JudgedTurn], suspect: int) -> Json:
    found = beside(chain, turns, suspect)
    closest = LEVEL * LOOKS[_LATER]
    visible = found.visible(closest)
    return {
        "since": suspect,
        "before": chain[chain.index(suspect) - 1],
        "turns": found.turns,
        "comparable": found.comparable,
        "change": round(found.change, 4),
        "error": round(found.error, 4) if math.isfinite(found.error) else None,
        "visible": round(visible, 4) if 0 < visible <= 2 else None,
        "other_sessions": _elsewhere(*split(chain, turns, suspect)),
    }


def _elsewhere(
    earlier: Sequence[JudgedTurn], later: Sequence[JudgedTurn]
) -> tuple[float, float] | None:
    """The mean scores of sessions on one side only, before and after, if they clearly fell."""
    old, new = {turn.session for turn in earlier}, {turn.session for turn in later}
    judges = {turn.judge for turn in earlier} & {turn.judge for turn in later}
    earlier = [turn for turn in earlier if turn.judge in judges]
    later = [turn for turn in later if turn.judge in judges]
    before = mean_over_groups((t.session, t.score) for t in earlier if t.session not in new)
    after = mean_over_groups((t.session, t.score) for t in later if t.session not in old)
    if before is None or after is None or after.upper(_SURE) >= before.lower(_SURE):
        return None
    return round(before.value, 4), round(after.value, 4)
