"""What `nextstate status` and the page say of exams: the last one, and who holds them."""

from __future__ import annotations

from collections.abc import Iterable

from nextstate.app.settings import Settings
from nextstate.exams import FAILED, MISSED, Exam
from nextstate.records import PolicyVersion
from nextstate.store import Store

_EXAMS_SHOWN = 5
"""The last exam is looked for among so many of the newest versions."""
NO_HOLDER = (
    "nobody holds them now, so candidates serve without one: `nextstate rollout` with tasks does, "
    "and POST /v1/exams"
)


def exams(settings: Settings, store: Store, lineages: Iterable[str]) -> dict[str, str]:
    """By lineage, of those that are asked for: what came of the last exam, and who holds its exams.

    Also that nobody does, where it has learned in environments.
    """
    found: dict[str, str] = {}
    learns = {name for name, _ in store.groups.environments()}
    configured = settings.rollout.lineage if settings.rollout.environment else None
    for name in lineages:
        texts = [exam_text(version) for version in store.versions.newest(name, _EXAMS_SHOWN)]
        told = [*filter(None, reversed(texts))][:1]
        if (holder := store.examiners.holder(name)) is not None:
            told.append(f"{holder} holds them")
        elif name in learns and name != configured and not settings.learner.trains_all:
            told.append(NO_HOLDER)
        if told:
            found[name] = "; ".join(told)
    return found


def exam_text(version: PolicyVersion) -> str:
    """What came of a version's exam; "" if it took none."""
    exam, which = Exam.of(version.metrics), f"version {version.number}"
    if FAILED in version.metrics:
        return f"{which} failed: {exam}"
    if MISSED in version.metrics:
        return f"{which} serves without its whole exam: {exam}; did `nextstate rollout` run?"
    return f"{which}: {exam}" if exam.planned else ""
