"""How long a candidate waits for its exam, and what comes of it.

A candidate of a lineage that learns in environments plays held-out tasks before it serves, beside
its parent. Who holds the lineage's exams plays them, through the proxy and pinned to each version,
and keeps the counts in the store (`nextstate/store/examiners.py`). The lineage takes no batch
meanwhile; other lineages go on. If nobody begins the exam, or it takes too long, the candidate
serves without the rest of it, and says so. Without a holder it serves at once, as a candidate of a
lineage that learns from people alone does; an exam that its holder has left is waited for briefly.
Everything is in the store, so a learner that was killed finds the exam where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from learner.gate import exam_objection
from nextstate.exams import FAILED, MISSED, Exam
from nextstate.records import PolicyVersion
from nextstate.store import Store

log = logging.getLogger(__name__)

BEGIN_S = 60.0
"""How long a candidate waits for its exam to begin: a rollout looks every second.

Also how long it waits for another holder of one that has begun."""
LONGEST_S = 900.0
"""How long it waits for the end."""


class Examining:
    """The exams of one lineage's candidates."""

    def __init__(
        self,
        store: Store,
        lineage: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        configured: bool = True,
    ) -> None:
        """`configured`: `[rollout]` holds the lineage's exams, whether it runs just now or not."""
        self._store = store
        self._lineage = lineage
        self._configured = configured
        self._clock = clock
        self._waits: tuple[int, float] | None = None
        """The candidate that waits, and since when."""
        self._alone: float | None = None
        """Since when nobody holds its exam that has begun."""

    def waits(self, candidate: PolicyVersion) -> str | None:
        """What the candidate waits for; None once it is to be decided on."""
        holder = self._store.examiners.holder(self._lineage)
        exam = Exam.of(candidate.metrics)
        if holder is None and not (self._configured or exam.planned):
            return None
        now = self._clock()
        if self._waits is None or self._waits[0] != candidate.number:
            self._waits, self._alone = (candidate.number, now), None
        waited_s = now - self._waits[1]
        if holder is not None or self._configured:
            self._alone = None
        elif self._alone is None:
            self._alone = now
        left = self._alone is not None and now - self._alone > BEGIN_S
        over = exam.is_over or MISSED in candidate.metrics or left
        if over or waited_s > (LONGEST_S if exam.planned else BEGIN_S):
            return None
        what = f"version {candidate.number} takes its exam before it serves"
        if exam.planned:
            plays = "nobody plays it now" if holder is None else f"{holder} plays it"
            most_s = LONGEST_S if self._alone is None else BEGIN_S
            return f"{what}: {exam}; {plays}; it is waited for {most_s / 60:g} min at most"
        begins = holder or "nextstate rollout"
        return f"{what}: `{begins}` has not begun it; {BEGIN_S:g} s are waited"

    def objection(self, candidate: PolicyVersion) -> str | None:
        """Why a candidate that need not wait any more must not serve; None: it may.

        Notes in the store that an exam was missed, or failed.
        """
        awaited, self._waits = self._waits is not None, None
        exam = Exam.of(candidate.metrics)
        reason = exam_objection(exam)
        where = f"lineage={self._lineage} version={candidate.number}"
        if reason is not None:
            self._store.versions.note(self._lineage, candidate.number, {FAILED: 1.0})
        elif not exam.is_over and (awaited or exam.planned or self._configured):
            self._store.versions.note(self._lineage, candidate.number, {MISSED: 1.0})
            log.warning("it serves without its whole exam %s: %s", where, exam)
        elif exam.is_over:
            log.info("exam passed %s: %s", where, exam)
        return reason
