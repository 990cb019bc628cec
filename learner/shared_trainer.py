"""One trainer that several lineages use in turn.

The base is in memory once. A lineage's weights and optimizer state are in the trainer while the
lineage trains, and wait as a snapshot on the CPU while another one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from learner.weights import Snapshot


class Trainer(Protocol):
    """What sharing needs of a trainer."""

    def snapshot(self) -> Snapshot:
        """A copy of everything that the next update depends on."""
        ...

    def restore(self, snapshot: Snapshot, /) -> None:
        """Continues from such a copy."""
        ...


T = TypeVar("T", bound=Trainer)


class SharedTrainer(Generic[T]):
    """Gives a lineage the trainer with the lineage's own state in it.

    A lineage that asks for the first time starts from the state in which the trainer was built.
    """

    def __init__(self, trainer: T, lineages: Sequence[str]) -> None:
        self._trainer = trainer
        self._holder = lineages[0] if len(lineages) == 1 else None
        """The lineage whose state the trainer holds; a single lineage always holds it."""
        self._waiting: dict[str, Snapshot] = {}
        self._fresh: Snapshot | None = None

    def of(self, lineage: str) -> T:
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
