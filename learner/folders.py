"""Where the files of the learner lie, and their deletion; without torch, which loads for 10 s."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from nextstate.errors import LearnerError, StartError
from nextstate.process_lock import ProcessLock

CHECKPOINT_FILE = "checkpoint.pt"


def version_path(state_dir: Path, lineage: str, number: int, epoch: int | None = None) -> Path:
    """A version's folder; raises LearnerError for a lineage whose name cannot be a folder.

    `epoch` is that of the learner which makes it (nextstate/store/roles.py): one that was cut off
    and replaced cannot write over the next one's files.
    """
    name = f"v{number:06d}" if epoch is None else f"v{number:06d}-e{epoch}"
    return lineage_folder(state_dir / "versions", lineage) / name


def checkpoint_path(folder: Path, epoch: int | None = None) -> Path:
    """A learner's checkpoint in its lineage's folder; `epoch` as above."""
    return folder / (CHECKPOINT_FILE if epoch is None else f"checkpoint-e{epoch}.pt")


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints that lie in a lineage's folder, by epoch, the newest last; 0: without one."""
    found = {0: folder / CHECKPOINT_FILE}
    for file in folder.glob("checkpoint-e*.pt"):
        if number := re.fullmatch(r"checkpoint-e(\d+)\.pt", file.name):
            found[int(number[1])] = file
    return {epoch: file for epoch, file in sorted(found.items()) if file.exists()}


def lineage_folder(parent: Path, lineage: str) -> Path:
    """The lineage's own folder in `parent`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", lineage):
        raise LearnerError(
            f"lineage {lineage!r} cannot name a folder: use letters, digits, dots, - and _"
        )
    return parent / lineage


def of_every_epoch(path: Path) -> list[Path]:
    """Those of a version's folders that are there; with an epoch in `path` that one only."""
    return [one for one in (path, *path.parent.glob(f"{path.name}-e*")) if one.exists()]


def remove_adapter(path: Path) -> None:
    """Deletes a version's folder, also what was left of it; a failure leaves the rest of it.

    Without an epoch in `path`, that of every epoch.
    """
    for folder in of_every_epoch(path):
        shutil.rmtree(folder, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Deletes the folder's checkpoints: their training state is of what is or must be forgotten."""
    for file in checkpoints(folder).values():
        file.unlink(missing_ok=True)


def remove_drafts(state_dir: Path) -> None:
    """Deletes what learners and trainings of judges had half written when they were killed.

    The caller holds the judges' lock. A lineage that is being trained keeps its drafts.
    """
    for draft in (state_dir / "judge").glob(".*.draft"):
        remove_adapter(draft)
    for folder in (state_dir / "learner").glob("*/"):
        with suppress(StartError), ProcessLock(folder / "lock", "it is trained", "wait for it"):
            for draft in (state_dir / "versions" / folder.name).glob(".v*.draft"):
                remove_adapter(draft)
            for draft in folder.glob(".checkpoint*.draft"):
                draft.unlink()
