"""Why a lineage does not train now, in a file that the learner leaves for `nextstate status`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_LONGEST = 2000


def write_training_status(state_dir: Path, lineage: str, text: str | None) -> None:
    """Says why the lineage does not train; None: it does. A failure is logged and no more."""
    file = _file(state_dir, lineage)
    try:
        if text is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(text[:_LONGEST])
    except OSError as error:
        log.warning("`nextstate status` does not show lineage=%s: %s", lineage, error)


def read_training_status(state_dir: Path, lineages: Sequence[str]) -> dict[str, str]:
    """By lineage: why it does not train; those are absent that do, or wait for samples."""
    found: dict[str, str] = {}
    for lineage in lineages:
        with contextlib.suppress(OSError):
            found[lineage] = _file(state_dir, lineage).read_text(errors="replace")
    return found


def _file(state_dir: Path, lineage: str) -> Path:
    return state_dir / "learner" / lineage / "notice"
