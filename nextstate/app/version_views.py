"""Policy versions as text and as rows: what each is, what changed, and which turns did it."""

from __future__ import annotations

from collections.abc import Sequence

from nextstate.records import Json, PolicyVersion, Verdict
from nextstate.wire import one_line

_COLUMNS = (
    ("score", "score/mean", "{:+.2f}"),
    ("step KL", "step/kl", "{:.4f}"),
    ("KL to base", "gate/kl_base", "{:.3f}"),
    ("held-out", "gate/rank", "{:+.4f}"),
)
"""Heading, metric and format of the metrics that matter; nats a token but for the score."""
_UNKNOWN = "·"
_LONGEST = 100


def row(version: PolicyVersion) -> Json:
    """One object of `nextstate versions --json`."""
    return {
        "lineage": version.lineage,
        "number": version.number,
        "state": version.state,
        "parent": version.parent,
        "samples": version.samples,
        "path": version.path,
        "sha256": version.sha256,
        "metrics": dict(version.metrics),
        "reason": version.reason,
    }


def turn_rows(used: Sequence[tuple[str, Verdict]]) -> list[Json]:
    """The turns of an update as objects."""
    return [{"turn": turn, "score": v.score, "hint": v.hint} for turn, v in used]


def table(versions: Sequence[PolicyVersion]) -> str:
    """A line for each version, and under it why it was rejected or retired."""
    headings = ["lineage", "number", "state", "parent", "samples", *(c[0] for c in _COLUMNS)]
    lines = [headings]
    for v in versions:
        parent = _UNKNOWN if v.parent is None else str(v.parent)
        measured = [_metric(v, name, text) for _, name, text in _COLUMNS]
        lines.append([v.lineage, str(v.number), v.state.value, parent, str(v.samples), *measured])
    widths = [max(len(line[at]) for line in lines) for at in range(len(headings))]
    printed = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    found = [printed[0].rstrip()]
    for text, version in zip(printed[1:], versions, strict=True):
        found.append(text.rstrip())
        if version.reason is not None:
            found.append(f"    {version.reason}")
    return "\n".join(found)


def card(version: PolicyVersion, used: Sequence[tuple[str, Verdict]]) -> str:
    """Everything about one version: where it comes from, how it was checked, what trained it."""
    lines = [
        f"version {version.number} of {version.lineage}: {version.state.value}",
        *([] if version.reason is None else [f"reason   {version.reason}"]),
        f"parent   {_UNKNOWN if version.parent is None else version.parent}",
        f"adapter  {version.path or _UNKNOWN}",
        f"sha256   {version.sha256 or _UNKNOWN}",
        "metrics",
        *(f"  {name:24} {value:.6g}" for name, value in sorted(version.metrics.items())),
        f"turns    {len(used)}",
    ]
    for turn, verdict in used:
        hint = one_line((verdict.hint or "")[:_LONGEST])
        lines.append(f"  {turn}  {verdict.score:+d}  {hint}".rstrip())
    return "\n".join(lines)


def _metric(version: PolicyVersion, name: str, text: str) -> str:
    value = version.metrics.get(name)
    return _UNKNOWN if value is None else text.format(value)
