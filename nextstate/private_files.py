"""Folders and files that only their owner may look into: the one place that makes them.

Processes run with the umask 077 (`only_for_owner`), so that whatever they and their children make
is private from the start. What an earlier program left open is closed, with a line in the log.
"""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from nextstate.errors import StoreError

log = logging.getLogger(__name__)

_FOLDER, _FILE = 0o700, 0o600
_OTHERS = 0o077
_DATABASE = "nextstate.sqlite3"
_OWN = frozenset({"engine", "engine.json", "lock", "logs"})
"""What else a state folder may hold that was never used."""


def only_for_owner() -> None:
    """Keeps everyone else out of the files that this process and its children will make."""
    os.umask(_OTHERS)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing; one that is there stays as it is."""
    for folder in (*reversed(path.parents), path):
        # Not `parents=True`: it makes the parents with the default mode.
        if not folder.is_dir():
            folder.mkdir(_FOLDER, exist_ok=True)


def make_file(path: Path) -> None:
    """Makes an empty file, or closes one that others may read. Raises StoreError."""
    path.touch(_FILE)
    if not path.is_file():
        raise StoreError(f"{path} is not a file: move it away")
    _close(path)


def make_state_folder(path: Path) -> None:
    """Makes the state folder, or closes one that is open to others, with all that it holds.

    Raises StoreError for a folder that is not ours to close: another user's, or one that holds
    other things than a state.
    """
    if not path.is_dir():
        make_folder(path)
    status = path.stat()
    if os.geteuid() not in (status.st_uid, 0):
        raise StoreError(
            f"[store] dir = {str(path)!r} belongs to user {status.st_uid}: name a folder of your "
            "own as [store] dir, for example one inside of it"
        )
    if not status.st_mode & _OTHERS:
        return
    names = {entry.name for entry in os.scandir(path)}
    ours = _DATABASE in names or names <= _OWN
    if status.st_mode & stat.S_ISVTX or not ours:
        raise StoreError(
            f"[store] dir = {str(path)!r} is open to others (mode {stat.S_IMODE(status.st_mode):o})"
            " and holds other things: name a folder of its own, for example "
            f"{str(path / 'nextstate')!r}"
        )
    _close(path.resolve())
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # a running process may have removed it
                _close(Path(folder, name))


def _close(path: Path) -> None:
    """Takes all rights away from others; a link is left alone."""
    mode = stat.S_IMODE(path.lstat().st_mode)
    if path.is_symlink() or not mode & _OTHERS:
        return
    path.chmod(mode & ~_OTHERS)
    log.warning("%s was open to others (mode %o) and is closed", path, mode)
