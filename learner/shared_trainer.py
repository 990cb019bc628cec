"""One trainer that several lineages use in turn.

The base is in memory once. A lineage's weights and optimizer state are in the trainer while the
lineage trains, and wait as a snapshot on the CPU while another one does.
"""

from __future__ import annotations

from collections.abc import Sequence

from learner.trainer import PolicyTrainer
from learner.weights import Snapshot


class SharedTrainer:
    """Gives a lineage the trainer with the lineage's own state in it.

    A lineage that asks for the first time starts from the state in which the trainer was built.
    """

    def __init__(self, trainer: PolicyTrainer, lineages: Sequence[str]) -> None:
        self._trainer = trainer
        self._holder = lineages[0] if len(lineages) == 1 else None
        """The lineage whose state the trainer holds; a single lineage always holds it."""
        self._waiting: dict[str, Snapshot] = {}
        self._fresh: Snapshot | None = None

    def of(self, lineage: str) -> PolicyTrainer:
        """The trainer, which holds this lineage's state from now on."""
        if lineage != self._holder:
            if self._fresh is None:
                self._fresh = self._trainer.snapshot()
            if self._holder is not None:
                self._waiting[self._holder] = self._trainer.snapshot()
            self._trainer.restore(self._waiting.pop(lineage, self._fresh))
            self._holder = lineage
        return self._trainer

    def forget(self, lineage: str) -> None:
        """Forgets the lineage's state."""
        self._waiting.pop(lineage, None)
        if self._holder == lineage:
            self._holder = None
