"""Checks that an adapter's folder still holds what was registered."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nextstate.errors import AdapterError

WEIGHTS_FILE = "adapter_model.safetensors"


def verify_adapter(path: Path, sha256: str) -> None:
    """Raises AdapterError unless the weight file is the one that was registered."""
    try:
        found = file_sha256(path / WEIGHTS_FILE)
    except OSError as error:
        raise AdapterError(f"the adapter in {path} cannot be read: {error}") from error
    if found != sha256:
        raise AdapterError(
            f"the adapter in {path} has changed on disk: SHA-256 {found[:12]}…, expected "
            f"{sha256[:12]}…; return to an earlier version with `nextstate rollback`"
        )


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
