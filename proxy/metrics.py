"""The proxy's counts in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from proxy.recorder import RecorderCounts
from proxy.relay import RelayCounts
from proxy.server import Connections
from proxy.versions import Versions

UNRECORDED = "nextstate_requests_unrecorded_total"


def counts_of(
    relay: RelayCounts, recorder: RecorderCounts, versions: Versions, connections: Connections
) -> dict[str, int]:
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
        "nextstate_requests_running": sum(versions.running.values()),
        **{f'{UNRECORDED}{{reason="{reason}"}}': n for reason, n in relay.unrecorded.items()},
        "nextstate_connections": len(connections.opened),
        "nextstate_connections_limit": connections.limit,
        "nextstate_connections_refused_total": connections.refused,
        "nextstate_out_of_files_total": connections.exhausted,
    }


def exposition(counts: Mapping[str, int], versions: Versions, stored: Mapping[str, int]) -> str:
    """The page under /metrics."""
    values = {**counts, "nextstate_engine_up": int(versions.up)}
    lines: list[str] = []
    for family, members in groupby(sorted(values), lambda name: name.partition("{")[0]):
        lines.append(f"# TYPE {family} {_kind(family)}\n")
        lines += [f"{name} {values[name]}\n" for name in members]
    lines.append("# TYPE nextstate_serving_version gauge\n")
    for lineage in versions.serving:
        number = versions.serves(lineage).number
        lines.append(f'nextstate_serving_version{{lineage="{lineage}"}} {number}\n')
    lines.append("# TYPE nextstate_stored gauge\n")
    for key, count in sorted(stored.items()):
        area, _, state = key.partition("/")
        lines.append(f'nextstate_stored{{record="{area}",state="{state}"}} {count}\n')
    return "".join(lines)


def _kind(name: str) -> str:
    return "counter" if name.endswith("_total") else "gauge"
