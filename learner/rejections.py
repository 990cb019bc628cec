"""When a lineage pauses because the gate rejects what it makes.

A rejected candidate's samples are dropped, because the same batch would fail again. Where several
in a row fail, the batches are not the cause: a setting is wrong, or the gate is. So the lineage
pauses, the samples of all of them are ready again, and a person decides how to go on. The pause
follows from the versions in the store, so it outlasts the learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from nextstate.records import PolicyVersion, VersionState

MANY_REJECTIONS = 3
"""After this many in a row a lineage pauses."""


def rejected_in_a_row(versions: Sequence[PolicyVersion], after: int) -> list[int]:
    """The numbers of the newest versions, as far as the gate has rejected them, oldest first.

    `versions` are in order. Those up to number `after` do not count: a person has decided since. A
    version that served before it was rejected has an adapter and ends the row.
    """

    def by_gate(version: PolicyVersion) -> bool:
        rejected = version.state is VersionState.REJECTED and version.sha256 is None
        return rejected and version.number > after

    return [version.number for version in takewhile(by_gate, reversed(versions))][::-1]


def pause_notice(lineage: str, numbers: Sequence[int], reason: str | None) -> str:
    """What happened and what a person can do."""
    return (
        f"paused: the gate rejected versions {', '.join(map(str, numbers))} in a row; their "
        f"samples are kept and wait; the last reason: {reason}. Lower [learner] step_kl "
        "and start again; or go on from an earlier version: `nextstate "
        f"rollback NUMBER --lineage {lineage}`; or try once more: `nextstate resume --lineage "
        f"{lineage}` ends the pause"
    )
