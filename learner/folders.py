"""Where the files of the learner lie, and their deletion; without torch, which loads for 10 s."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from nextstate.errors import LearnerError, StartError
from nextstate.process_lock import ProcessLock

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


def remove_drafts(state_dir: Path) -> None:
    """Deletes what learners and trainings of judges had half written when they were killed.

    The caller holds the judges' lock. A lineage that is being trained keeps its drafts.
    """
    for draft in (state_dir / "judge").glob(".v*.draft"):
        remove_adapter(draft)
    for folder in (state_dir / "learner").glob("*/"):
        with suppress(StartError), ProcessLock(folder / "lock", "it is trained", "wait for it"):
            for draft in (state_dir / "versions" / folder.name).glob(".v*.draft"):
                remove_adapter(draft)
            (folder / f".{CHECKPOINT_FILE}.draft").unlink(missing_ok=True)
