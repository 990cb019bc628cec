"""Which adapters are deleted to make room: old ones that nothing needs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from learner.folders import remove_adapter, version_path
from learner.watch import TURNS, returns_to
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store

log = logging.getLogger(__name__)

_NEEDED = (VersionState.SERVING, VersionState.CANDIDATE)


def prunable(
    versions: Sequence[PolicyVersion],
    current: int,
    wanted: Collection[int],
    in_use: Collection[str],
    keep: int,
) -> list[PolicyVersion]:
    """The versions whose adapters may be deleted, oldest first; `versions` are in order.

    Kept are the newest `keep`, those `wanted`: what a person has put into service and what the
    watch may return to, what serves or waits to serve, `current`, from which the next update
    starts, the parents of these, and the adapters that requests use (`in_use`, by name).
    """
    written = [version for version in versions if version.path is not None]
    needed = {version.number for version in written[-keep:]} | {current, *wanted}
    needed |= {version.number for version in written if version.state in _NEEDED}
    needed |= {v.parent for v in versions if v.number in needed and v.state in _NEEDED}
    needed |= {version.parent for version in versions if version.number == current}
    return [v for v in written if v.number not in needed and v.adapter_name not in in_use]


def prune(store: Store, lineage: str, current: int, watched: bool, keep: int) -> None:
    """Deletes adapters that nothing needs: first noted in the store, so none of them serves."""
    stored = store.versions
    in_use = {name for names, _ in store.workers.others("") for name in names}
    versions, decisions = stored.all(lineage), stored.decisions(lineage)
    wanted = decisions.pinned
    if watched:
        chain = stored.chain(lineage, stored.serving(lineage).number, TURNS)
        wanted |= returns_to(chain, stored.judged_turns(lineage, TURNS), decisions.after)
    for version in prunable(versions, current, wanted, in_use, keep):
        if stored.forget_adapter(lineage, version.number):
            log.info("adapter deleted lineage=%s version=%d", lineage, version.number)
    for version in stored.all(lineage):
        if version.path is None and version.sha256 is not None:
            remove_adapter(version_path(store.dir, lineage, version.number))
