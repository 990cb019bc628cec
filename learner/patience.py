"""How long a lineage waits after the gate has rejected one candidate after another.

A rejected candidate takes its batch with it, as that one would fail again. Where many in a row fail
it is not the batch: a setting is wrong, and every further try only loses samples. So the tries
become rare, and what is ready waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import takewhile

from nextstate.records import PolicyVersion, VersionState

MANY_REJECTIONS = 3
"""So many in a row are no chance; after each further one the lineage pauses."""
PAUSE_S = 600.0
"""The first pause; each one after it is twice as long."""
LONGEST_PAUSE_S = 6 * 3600.0


class Patience:
    """Counts rejections in a row; see the module."""

    def __init__(self, rejections: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """`rejections` were there before: the next try comes at once, and pauses if it fails."""
        self._rejections = rejections
        self._clock = clock
        self._until = 0.0

    def rejected(self) -> tuple[int, float]:
        """Counts one more; returns how many they are, and for how many seconds training pauses."""
        self._rejections += 1
        further = self._rejections - MANY_REJECTIONS
        if further <= 0:
            return self._rejections, 0.0
        pause_s = min(PAUSE_S * 2 ** min(further - 1, 30), LONGEST_PAUSE_S)
        self._until = self._clock() + pause_s
        return self._rejections, pause_s

    def waits(self) -> bool:
        """Whether no update may begin now."""
        return self._clock() < self._until


def rejected_in_a_row(versions: Sequence[PolicyVersion]) -> int:
    """How many of the newest of a lineage's versions the gate has rejected, oldest version first.

    A version that served before it was rejected has an adapter and does not count.
    """
    newest_first = reversed(versions)
    by_gate = takewhile(lambda v: v.state is VersionState.REJECTED and v.path is None, newest_first)
    return sum(1 for _ in by_gate)
