"""A lock on a file that one process holds at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from nextstate.errors import StartError


class ProcessLock:
    """An exclusive lock for as long as the block runs; it ends with its process."""

    def __init__(
        self, path: Path, taken: str, remedy: str, error: type[StartError] = StartError
    ) -> None:
        """The error if it is held: "{taken} by process N: {remedy}"."""
        self._error = error
        self._path = path
        self._taken = taken
        self._remedy = remedy

    def __enter__(self) -> None:
        """Raises an error that names the other process, and StartError for a link."""
        if self._path.is_symlink():
            raise StartError(f"{self._path} is a link, and a lock is written to: remove it")
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise self._error(f"{self._taken} by process {holder}: {self._remedy}") from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        self._file.close()
