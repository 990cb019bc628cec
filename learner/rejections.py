"""How long a lineage waits after the gate has rejected several candidates in a row.

A rejected candidate takes its batch with it, because the same batch would fail again. Where many in
a row fail, the batches are not the cause: a setting is wrong, and every further try only loses
samples. So the tries become rare, and ready samples wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import takewhile

from nextstate.records import PolicyVersion, VersionState

MANY_REJECTIONS = 3
"""This many in a row are no accident; after each further one the lineage pauses."""
PAUSE_S = 600.0
"""The first pause; each further pause is twice as long."""
LONGEST_PAUSE_S = 6 * 3600.0


class RejectionPause:
    """Counts rejections in a row; see the module."""

    def __init__(self, rejections: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """After `rejections` earlier ones the next try comes at once, and pauses if it fails."""
        self._rejections = rejections
        self._clock = clock
        self._until = 0.0

    def rejected(self) -> tuple[int, float]:
        """Counts one more; returns the number in a row and the seconds of the pause."""
        self._rejections += 1
        further = self._rejections - MANY_REJECTIONS
        if further <= 0:
            return self._rejections, 0.0
        pause_s = min(PAUSE_S * 2 ** min(further - 1, 30), LONGEST_PAUSE_S)
        self._until = self._clock() + pause_s
        return self._rejections, pause_s

    def is_over(self) -> bool:
        """True if an update may begin."""
        return self._clock() >= self._until


def rejected_in_a_row(versions: Sequence[PolicyVersion]) -> int:
    """How many of the newest versions the gate has rejected in a row; oldest version first.

    A version that served before it was rejected has an adapter and does not count.
    """
    newest_first = reversed(versions)
    by_gate = takewhile(lambda v: v.state is VersionState.REJECTED and v.path is None, newest_first)
    return sum(1 for _ in by_gate)
