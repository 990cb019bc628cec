"""Which adapters are deleted to make room: old ones that nothing needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nextstate.records import PolicyVersion, VersionState

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
