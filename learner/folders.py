"""Where the files of the learner lie, and their deletion; without torch, which loads for 10 s."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from nextstate.errors import LearnerError

CHECKPOINT_FILE = "checkpoint.pt"


def version_path(state_dir: Path, lineage: str, number: int) -> Path:
    """A version's folder; raises LearnerError for a lineage whose name cannot be a folder."""
    return lineage_folder(state_dir / "versions", lineage) / f"v{number:06d}"


def lineage_folder(parent: Path, lineage: str) -> Path:
    """The lineage's own folder in `parent`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", lineage):
        raise LearnerError(
            f"lineage {lineage!r} cannot name a folder: use letters, digits, dots, - and _"
        )
    return parent / lineage


def remove_adapter(path: Path) -> None:
    """Deletes a version's folder, also what was left of it; a failure leaves the rest of it."""
    shutil.rmtree(path, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Deletes the folder's checkpoint: its training state comes from what shall be forgotten."""
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
