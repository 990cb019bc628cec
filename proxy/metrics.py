"""The proxy's counts in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.recorder import RecorderCounts
    from proxy.relay import RelayCounts
    from proxy.replica import Replica
    from proxy.server import Connections
    from proxy.versions import Versions

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
"""The format's content type."""
UNRECORDED = "nextstate_requests_unrecorded_total"
_REASONS = ("body", "content_type", "model", "route", "refused", "recording_off")
"""Why a request is not recorded; each is told from the start on, so that a rise is seen."""
_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the buckets of a time, in seconds."""
_HELP = {
    "nextstate_connections": "Connections of clients that are open.",
    "nextstate_connections_limit": "Connections of clients that may be open.",
    "nextstate_connections_refused_total": "Connections that got a 503 because all were busy.",
    "nextstate_engine_requests_total": "Requests that were sent to an engine.",
    "nextstate_engine_up": "Whether requests are sent to an engine: 1 or 0.",
    "nextstate_first_token_seconds": "Time from a request to the first event of its reply.",
    "nextstate_out_of_files_total": "How often no file was left for a connection.",
    "nextstate_reply_seconds": "Time from a request to the end of its reply.",
    "nextstate_requests_failed_total": "Requests that the engine did not answer.",
    "nextstate_requests_moved_total": "Requests that another engine got because theirs went down.",
    "nextstate_requests_of_episodes_total": "Requests that are steps of episodes.",
    "nextstate_requests_running": "Requests that an engine answers now, or that wait for it.",
    "nextstate_requests_total": "Requests for a reply that becomes a turn.",
    UNRECORDED: "Requests for a reply that no turn holds, by the reason.",
    "nextstate_serving_version": "Number of the policy version that serves a lineage.",
    "nextstate_store_waits_total": "How often the store was locked or its disk full.",
    "nextstate_stored": "Records in the store, by what they are and their state.",
    "nextstate_stored_trainable_turns": "Turns in the store whose tokens are known exactly.",
    "nextstate_streams_cut_total": "Streams that the engine cut or that the client left.",
    "nextstate_turns_lost_total": "Turns that could not be recorded.",
    "nextstate_turns_recorded_late_total": "Turns that were recorded after their reply had ended.",
    "nextstate_turns_recorded_total": "Turns that were recorded.",
    "nextstate_turns_waiting": "Turns that wait for the store.",
}
"""What each family is. The numbers of a record's states add up to the whole."""
_TRAINABLE = "turns/trainable"
"""Of main and side turns: no state beside theirs."""


class Times:
    """A histogram of seconds."""

    __slots__ = ("_buckets", "_sum")

    def __init__(self) -> None:
        self._buckets = [0] * (len(_BOUNDS_S) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._buckets[bisect_left(_BOUNDS_S, seconds)] += 1
        self._sum += seconds

    def counts(self, name: str) -> dict[str, float]:
        """The samples of the family `name`. Those of several histograms are added."""
        below = accumulate(self._buckets)
        bounds = (*map(str, _BOUNDS_S), "+Inf")
        found: dict[str, float] = {
            f'{name}_bucket{{le="{bound}"}}': n for bound, n in zip(bounds, below, strict=True)
        }
        return {**found, f"{name}_sum": round(self._sum, 6), f"{name}_count": sum(self._buckets)}


def counts_of(
    relay: RelayCounts, recorder: RecorderCounts, versions: Versions, connections: Connections
) -> dict[str, float]:
    """What one worker has counted. The counts of several workers are added."""
    return {
        "nextstate_requests_total": relay.requests,
        "nextstate_requests_of_episodes_total": relay.of_episodes,
        "nextstate_requests_failed_total": relay.failed,
        "nextstate_streams_cut_total": relay.cut,
        "nextstate_turns_recorded_total": recorder.recorded,
        "nextstate_turns_recorded_late_total": recorder.late,
        "nextstate_turns_lost_total": recorder.lost,
        "nextstate_turns_waiting": recorder.waiting,
        "nextstate_store_waits_total": recorder.store_waits,
        "nextstate_requests_moved_total": versions.moved,
        **{f"nextstate_requests_running{label(one)}": one.running for one in versions.replicas},
        **{f"nextstate_engine_requests_total{label(one)}": one.sent for one in versions.replicas},
        **{f'{UNRECORDED}{{reason="{reason}"}}': relay.unrecorded[reason] for reason in _REASONS},
        "nextstate_connections": len(connections.opened),
        "nextstate_connections_limit": connections.limit,
        "nextstate_connections_refused_total": connections.refused,
        "nextstate_out_of_files_total": connections.exhausted,
        **relay.first_token.counts("nextstate_first_token_seconds"),
        **relay.reply.counts("nextstate_reply_seconds"),
    }


def label(replica: Replica) -> str:
    """The label that names an engine."""
    return f'{{engine="{replica.name}"}}'


def exposition(counts: Counter[str], versions: Versions, stored: Mapping[str, int]) -> str:
    """The page under /metrics."""
    values: dict[str, float] = dict(counts)
    values |= {f"nextstate_engine_up{label(one)}": int(one.up) for one in versions.replicas}
    for lineage in versions.serving:
        number = versions.serves(lineage).number
        values[f'nextstate_serving_version{{lineage="{lineage}"}}'] = number
    for key, count in stored.items():
        area, _, state = key.partition("/")
        name = f'nextstate_stored{{record="{area}",state="{state}"}}'
        values["nextstate_stored_trainable_turns" if key == _TRAINABLE else name] = count
    lines: list[str] = []
    for family, members in groupby(sorted(values, key=_family), _family):
        lines.append(f"# HELP {family} {_HELP[family]}\n# TYPE {family} {_kind(family)}\n")
        lines += [f"{name} {values[name]}\n" for name in members]
    return "".join(lines)


def _family(name: str) -> str:
    name = name.partition("{")[0]
    if name in _HELP:
        return name
    return name.rpartition("_")[0]  # of a histogram


def _kind(family: str) -> str:
    if family.endswith("_seconds"):
        return "histogram"
    return "counter" if family.endswith("_total") else "gauge"
