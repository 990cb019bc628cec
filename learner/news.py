"""Whether a lineage has to be looked at again: a look is a dozen questions to the store.

A store in a file answers them in no time. For one on a server that is asked all day by a learner
without work, one statement says that nothing has changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from nextstate.store import Store

_LOOK_S = 30.0
"""A lineage is looked at after so long in any case: a batch may be due because of its age."""


class News:
    """What was known of the store at the last look."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._known: object = None
        self._look_at = 0.0

    def none(self) -> bool:
        """True if a look would find what the last one found; else one must follow."""
        if not self._store.database.tells_changes:
            return False
        found, now = self._store.training.news(), self._clock()
        if found == self._known and now < self._look_at:
            return True
        self._known, self._look_at = found, now + _LOOK_S
        return False

    def forget(self) -> None:
        """The next look is due at once."""
        self._known = None
