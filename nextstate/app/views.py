"""Turns and policy versions as commands show them: as JSON rows and as text."""

from __future__ import annotations

from collections.abc import Sequence

from nextstate.records import Feedback, Json, NextState, PolicyVersion, Turn, Verdict
from nextstate.wire import one_line

_COLUMNS = (
    ("score", "score/mean", "{:+.2f}"),
    ("step KL", "step/kl", "{:.4f}"),
    ("KL to base", "gate/kl_base", "{:.3f}"),
    ("held-out", "gate/rank", "{:+.4f}"),
)
"""Heading, metric and format. The score is between -1 and 1, the others are nats a token."""
_UNKNOWN = "·"
_HINT_CHARS = 100


def turn_row(
    turn: Turn, states: Sequence[NextState], verdict: Verdict | None, feedback: Feedback | None
) -> Json:
    """One object of `nextstate turns --json`."""
    return {
        "turn": turn.id,
        "session": turn.session,
        "index": turn.index,
        "episode": turn.episode,
        "step": turn.step,
        "kind": turn.kind,
        "lineage": turn.lineage,
        "version": turn.policy_version,
        "engine": turn.engine,
        "trainable": turn.trainable,
        "reason": turn.untrainable,
        "next_state": [{"source": state.source, "text": state.text} for state in states],
        "verdict": verdict
        and {
            "score": verdict.score,
            "votes": verdict.votes,
            "hint": verdict.hint,
            "judge": verdict.judge,
        },
        "feedback": feedback and {"score": feedback.score, "comment": feedback.comment},
    }


def version_row(version: PolicyVersion) -> Json:
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


def trained_rows(trained: Sequence[tuple[str, Verdict | None]]) -> list[Json]:
    """The turns that a version was trained on, as objects."""
    return [{"turn": turn, "score": v and v.score, "hint": v and v.hint} for turn, v in trained]


def version_table(versions: Sequence[PolicyVersion]) -> str:
    """A line for each version; below it the reason why it was rejected or retired."""
    headings = ["lineage", "number", "state", "parent", "samples", *(c[0] for c in _COLUMNS)]
    table = [headings]
    for v in versions:
        parent = _UNKNOWN if v.parent is None else str(v.parent)
        measured = [_metric(v, name, text) for _, name, text in _COLUMNS]
        table.append([v.lineage, str(v.number), v.state.value, parent, str(v.samples), *measured])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines: list[str] = []
    for row, version in zip(table, (None, *versions), strict=True):
        lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
        if version is not None and version.reason is not None:
            lines.append(f"    {version.reason}")
    return "\n".join(lines)


def version_card(
    version: PolicyVersion, trained: Sequence[tuple[str, Verdict | None]], watch: str, judge: str
) -> str:
    """Everything about one version: its origin, its measurements and the turns it trained on.

    `watch` is what is seen of the turns that it served, `judge` what the verdicts are worth.
    """
    lines = [
        f"version {version.number} of {version.lineage}: {version.state.value}",
        *([] if version.reason is None else [f"reason   {version.reason}"]),
        f"parent   {_UNKNOWN if version.parent is None else version.parent}",
        f"adapter  {version.path or ('deleted to make room' if version.sha256 else _UNKNOWN)}",
        f"sha256   {version.sha256 or _UNKNOWN}",
        f"judge    {judge}",
        f"watch    {watch}",
        "metrics",
        *(f"  {name:24} {value:.6g}" for name, value in sorted(version.metrics.items())),
        f"turns    {len(trained)}",
    ]
    for turn, verdict in trained:
        hint = one_line((verdict.hint or "")[:_HINT_CHARS]) if verdict else ""
        score = f"{verdict.score:+d}" if verdict else f" {_UNKNOWN}"
        lines.append(f"  {turn}  {score}  {hint}".rstrip())
    return "\n".join(lines)


def _metric(version: PolicyVersion, name: str, text: str) -> str:
    value = version.metrics.get(name)
    return _UNKNOWN if value is None else text.format(value)
