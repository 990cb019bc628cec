"""A candidate's exam: what it and its parent solve of the same held-out tasks.

A rollout plays the tasks, or a program by the API of episodes, and the counts are kept among the
metrics of the candidate; the learner reads them there and decides (`learner/gate.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

_PREFIX = "exam/"
MISSED, FAILED = "exam/missed", "exam/failed"
"""Metrics of a version that serves though nobody has examined it, and of one that has failed."""


@dataclass(frozen=True, slots=True)
class Exam:
    """The counts of one exam so far."""

    planned: int = 0
    """Tasks that it shall have; 0: nobody has begun."""
    tasks: int = 0
    """Tasks that both versions have played."""
    solved: int = 0
    """By the candidate, as the two below."""
    gained: int = 0
    """Tasks that only the candidate solved."""
    lost: int = 0
    """Tasks that only its parent solved."""

    @staticmethod
    def of(metrics: Mapping[str, float]) -> Exam:
        """The exam in a version's metrics."""
        names = [field.name for field in fields(Exam)]
        return Exam(**{name: int(metrics.get(_PREFIX + name, 0)) for name in names})

    def metrics(self) -> dict[str, float]:
        """Numbers with `exam/what` names."""
        return {_PREFIX + name: float(value) for name, value in asdict(self).items()}

    @staticmethod
    def of_pairs(planned: int, pairs: Sequence[tuple[bool, bool]]) -> Exam:
        """An exam whose tasks the candidate and its parent solved, or not: a pair for each."""
        return Exam(
            planned=planned,
            tasks=len(pairs),
            solved=sum(solved for solved, _ in pairs),
            gained=pairs.count((True, False)),
            lost=pairs.count((False, True)),
        )

    @property
    def is_over(self) -> bool:
        """Whether both versions have played all tasks."""
        return 0 < self.planned <= self.tasks

    @property
    def by_parent(self) -> int:
        """Tasks that the parent solved."""
        return self.solved - self.gained + self.lost

    def __str__(self) -> str:
        """
        >>> str(Exam(planned=32, tasks=20, solved=12, gained=3, lost=1))
        'it solves 12 and its parent 10 of 20 held-out tasks (32 are planned)'
        """
        more = "" if self.is_over else f" ({self.planned} are planned)"
        told = f"it solves {self.solved} and its parent {self.by_parent} of {self.tasks}"
        return f"{told} held-out tasks{more}"
