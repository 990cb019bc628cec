"""When each part of an update ran: what `benchmarks.timed` prints, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

READY = "ready"
STEP, GATE, ADAPTER, CHECKPOINT = "step", "gate", "adapter saved", "checkpoint saved"
REGISTERED, LOADED, PROBED, FLIP = "registered", "loaded", "probed", "flip"
UPDATE = (STEP, GATE, ADAPTER, CHECKPOINT, REGISTERED, LOADED, PROBED, FLIP)
"""The parts of an update in their order. After the step the new weights exist."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One part of an update; times are those of `time.perf_counter`, alike in all processes."""

    part: str
    began: float
    ended: float
    version: int | None = None
    """Only of a flip."""


def update_of(marks: Sequence[Mark], first: str = STEP) -> list[Mark]:
    """The marks from the last `first` on: a step whose version was rejected is left out."""
    begin = max(at for at, mark in enumerate(marks) if mark.part == first)
    return list(marks[begin:])


def shares(update: Sequence[Mark]) -> dict[str, float]:
    """Seconds of each part after the first, counted from the end of the one before it.

    So they add up to the time from the first part's end to the last one's.
    """
    found: dict[str, float] = {}
    for before, mark in pairwise(update):
        found[mark.part] = found.get(mark.part, 0.0) + mark.ended - before.ended
    return found
