"""Why a lineage does not train now: a file that the learner writes and `nextstate status` reads."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_MAX_CHARS = 2000


def write_training_status(state_dir: Path, lineage: str, problem: str | None) -> None:
    """Writes why the lineage does not train; None if it trains. A failure is only logged."""
    file = _file(state_dir, lineage)
    try:
        if problem is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(problem[:_MAX_CHARS])
    except OSError as error:
        log.warning("`nextstate status` does not show lineage=%s: %s", lineage, error)


def read_training_status(state_dir: Path, lineages: Sequence[str]) -> dict[str, str]:
    """By lineage: why it does not train. Lineages that train or wait for samples are left out."""
    found: dict[str, str] = {}
    for lineage in lineages:
        with contextlib.suppress(OSError):
            found[lineage] = _file(state_dir, lineage).read_text(errors="replace")
    return found


def _file(state_dir: Path, lineage: str) -> Path:
    return state_dir / "learner" / lineage / "problem"
