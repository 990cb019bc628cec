"""What a killed learner needs to continue: the version it made last and its training state.

The order of every update is: adapter folder, checkpoint, then the store. So if the
store does not know a checkpoint's version, its batch was trained but not settled yet.
"""
# pyright: basic

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from learner.adapters import disk_error, sync
from learner.folders import CHECKPOINT_FILE, checkpoint_path, checkpoints
from nextstate import sealed_files
from nextstate.errors import LearnerError, SealError
from nextstate.records import PolicyVersion, VersionState


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The newest version with what made it."""

    version: PolicyVersion
    batch: str
    """The name under which its samples were leased."""
    training: Mapping[str, Any]
    """`Snapshot.training` after the update."""
    decided: int = 0
    """How often people had chosen a version when the update began."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, epoch: int | None = None) -> None:
    """Replaces the folder's checkpoint in one step; raises DiskError when that fails.

    Of a learner with an `epoch` it replaces those of older ones only.
    """
    path = checkpoint_path(folder, epoch)
    v = checkpoint.version
    body = {
        "version": {
            "lineage": v.lineage,
            "number": v.number,
            "parent": v.parent,
            "path": v.path,
            "sha256": v.sha256,
            "samples": v.samples,
            "metrics": dict(v.metrics),
        },
        "batch": checkpoint.batch,
        "training": checkpoint.training,
        "decided": checkpoint.decided,
    }
    draft = folder / f".{path.name}.draft"
    try:
        if sealed_files.is_encrypted(draft):
            memory = io.BytesIO()
            torch.save(body, memory)
            sealed_files.write(draft, memory.getvalue(), CHECKPOINT_FILE)
        else:
            with draft.open("wb") as file:
                torch.save(body, file)
        draft.chmod(0o600)
        sync(draft)
        draft.replace(path)
        for other, file in checkpoints(folder).items():
            if file != path and (epoch is None or other < epoch):
                file.unlink(missing_ok=True)
        sync(folder)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
        draft.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where nothing was trained yet."""
    found = checkpoints(folder)
    if not found:
        return None
    path = found[max(found)]
    try:
        # Loading weights only: a checkpoint can hold no code.
        file = io.BytesIO(sealed_files.read(path)) if sealed_files.is_sealed(path) else path
        body = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SealError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise LearnerError(
            f"{path} cannot be read: {error}; delete it to go on with the newest version's "
            "weights and a fresh optimizer"
        ) from error
    version = PolicyVersion(**body["version"], state=VersionState.CANDIDATE)
    if version.lineage != folder.name:  # a sealed file is known by its own name alone
        raise LearnerError(f"{path} is that of lineage {version.lineage!r}: delete it to go on")
    return Checkpoint(version, body["batch"], body["training"], body["decided"])
