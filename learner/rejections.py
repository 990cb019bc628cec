"""When a lineage pauses: because the gate rejects what it makes, or because a person says so.

A rejected candidate's samples are dropped, because the same batch would fail again. Where several
in a row fail, the batches are not the cause: a setting is wrong, or the gate is. So the lineage
pauses, the samples of all of them are ready again, and a person decides how to go on. The pause
follows from the versions and decisions in the store, so it outlasts the learner.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import takewhile

from nextstate.exams import FAILED
from nextstate.records import Decisions, PolicyVersion, VersionState
from nextstate.wire import one_line

MANY_REJECTIONS = 3
"""After this many in a row a lineage pauses."""


def rejected_in_a_row(versions: Sequence[PolicyVersion], after: int) -> list[int]:
    """The numbers of the newest versions, as far as the gate has rejected them, oldest first.

    `versions` are in order. Those up to number `after` do not count: a person has decided since. A
    version that served before it was rejected has an adapter, has not failed an exam, and ends the
    row.
    """

    def by_gate(version: PolicyVersion) -> bool:
        never_served = version.sha256 is None or FAILED in version.metrics
        rejected = version.state is VersionState.REJECTED and never_served
        return rejected and version.number > after

    return [version.number for version in takewhile(by_gate, reversed(versions))][::-1]


def why_paused(lineage: str, newest: Sequence[PolicyVersion], decisions: Decisions) -> str | None:
    """Who paused a lineage and how it goes on; None if it may train.

    `newest` are its newest versions in order, `MANY_REJECTIONS` or more of them.
    """
    if decisions.pause is not None:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(decisions.pause.at))
        return (
            f"paused by {one_line(decisions.pause.by)} since {at}: its samples wait; "
            f"`nextstate resume {lineage}` ends the pause"
        )
    numbers = rejected_in_a_row(newest, decisions.after)
    if len(numbers) < MANY_REJECTIONS:
        return None
    return pause_notice(lineage, numbers, newest[-1].reason)


def pause_notice(lineage: str, numbers: Sequence[int], reason: str | None) -> str:
    """What happened and what a person can do."""
    return (
        f"paused: the gate rejected versions {', '.join(map(str, numbers))} in a row; their "
        f"samples are kept and wait; the last reason: {reason}. Lower [learner] step_kl "
        "and start again; or go on from an earlier version: `nextstate "
        f"rollback NUMBER --lineage {lineage}`; or try once more: `nextstate resume {lineage}` "
        "ends the pause"
    )
