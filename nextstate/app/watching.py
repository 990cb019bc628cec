"""What the watch has seen of a version, what it could see by now, and what it would do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from learner.means import mean_over_groups
from learner.watch import LOOKS, OLD, TURNS, beside, chain_of, last_look, later_turns, split
from nextstate.records import BASE_VERSION, Json, JudgedTurn, PolicyVersion
from nextstate.store import Store

_CLOSEST = max(LOOKS, key=lambda look: LOOKS[look])
"""About so many later turns are shown: at this number the watch tests most closely."""
_LAST = max(LOOKS)
_SURE = 0.01


def serving_watch(store: Store, lineage: str) -> Json | None:
    """What the watch, which is on, sees of what serves, with the versions that served lately.

    None if there is nothing before it.
    """
    versions = store.versions.all(lineage)
    chain = chain_of(versions, store.versions.serving(lineage).number)
    if len(chain) < 2:
        return None
    turns = store.versions.judged_turns(lineage, TURNS)
    after = store.versions.decisions(lineage).after
    suspects = [*later_turns(chain, turns, after)] or chain[1:]
    later = {suspect: len(split(chain, turns, suspect)[1]) for suspect in suspects}
    shown = min(suspects, key=lambda number: abs(later[number] - _CLOSEST))
    why_not = _why_not(later[shown], accepted=shown <= after)
    return _seen(chain, turns, shown, _returns_to(versions, chain, shown), why_not)


def version_watch(store: Store, version: PolicyVersion, on: bool) -> Json | None:
    """What is seen of one version and of those trained from it; None for the base.

    `on`: whether the watch is, `[learner] watch`.
    """
    versions = store.versions.all(version.lineage)
    chain = chain_of(versions, store.versions.serving(version.lineage).number)
    serves = version.number in chain
    if not serves:
        chain = chain_of(versions, version.number)
    if version.number == chain[0]:
        return None
    turns = store.versions.judged_turns(version.lineage, TURNS)
    later = len(split(chain, turns, version.number)[1])
    accepted = version.number <= store.versions.decisions(version.lineage).after
    why_not = _why_not(later, accepted=accepted, serves=serves, on=on)
    returns_to = _returns_to(versions, chain, version.number)
    return _seen(chain, turns, version.number, returns_to, why_not)


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
    text += f"; {_next(found)}"
    if found["other_sessions"] is not None:
        old, new = found["other_sessions"]
        text += (
            f". In other sessions the score went from {old:.2f} to {new:.2f}: harder questions or "
            f"a worse version, which nobody can tell apart; `nextstate rollback {found['before']}` "
            "shows which"
        )
    return text


def _next(found: Json) -> str:
    """What would withdraw the version, or why nothing will."""
    if found["why_not"] is not None:
        return f"the watch does not withdraw it: {found['why_not']}"
    back = f"puts version {found['before']} back into service"
    if found["look"] is None:
        first = f"the first look is at {found['next_look']} judged turns"
        return f"{first}: a clear fall in the same sessions {back}"
    seen = f"the look at {found['look']} judged turns "
    if found["visible"] is None:
        seen += "could not have found any fall"
    else:
        seen += f"would have found a fall by {found['visible']:.2f} in 4 of 5 cases"
    if found["next_look"] is None:
        return f"{seen}; it was the last, so now only a fall that later versions show too {back}"
    fall = "such a fall" if found["visible"] else "a clear fall"
    return (
        f"{seen}; the next is at {found['next_look']}: {fall} in the same sessions, or a smaller "
        f"one that lasts, {back}"
    )


def _why_not(later: int, *, accepted: bool, serves: bool = True, on: bool = True) -> str | None:
    """Why nothing withdraws a version with so many later turns; None if a fall would."""
    if not on:
        return "[learner] watch = false"
    if not serves:
        return "neither it nor a version trained from it serves"
    if accepted:
        return "a person has chosen a version, or resumed training, since it was made"
    if later > OLD:
        return f"it has passed all looks, the last at {_LAST} turns"
    return None


def _returns_to(versions: Sequence[PolicyVersion], chain: Sequence[int], suspect: int) -> int:
    """The nearest ancestor that can still serve: adapters are deleted."""
    kept = {version.number for version in versions if version.can_serve} | {BASE_VERSION}
    return next(n for n in reversed(chain[: chain.index(suspect)]) if n in kept)


def _seen(
    chain: Sequence[int],
    turns: Sequence[JudgedTurn],
    suspect: int,
    returns_to: int,
    why_not: str | None,
) -> Json:
    found, both = beside(chain, turns, suspect), split(chain, turns, suspect)
    look = last_look(*both)
    visible = look.visible if look else math.inf
    return {
        "since": suspect,
        "before": returns_to,
        "turns": found.turns,
        "comparable": found.comparable,
        "change": round(found.change, 4),
        "error": round(found.error, 4) if math.isfinite(found.error) else None,
        "look": look.turns if look else None,
        "reference": look.reference if look else None,
        "level": look.level if look else None,
        "visible": visible if visible <= 2 else None,
        "next_look": min((n for n in LOOKS if n > found.turns), default=None),
        "why_not": why_not,
        "other_sessions": _elsewhere(*both),
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
