"""Folders and files that only their owner can read: the one place that creates them.

Processes run with the umask 077 (`only_for_owner`), so everything that they and their children
create is private. Files that others can already read are closed, with a line in the log.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nextstate.errors import StoreError

log = logging.getLogger(__name__)

_FOLDER, _FILE = 0o700, 0o600
_OTHERS = 0o077
_DATABASE = "nextstate.sqlite3"
_OWN = frozenset(
    (
        *("children.json", "engine", "engine.json", "engines", "episodes.key", "judge", "learner"),
        "ledger.head",
        *("lock", "logins", "logs", "pictures", "proxy.key", "retention.json", "rollout"),
        *("versions", "warm-up"),
    )
)
"""What a state folder may hold without a database, which may be on a server."""


def only_for_owner() -> None:
    """Makes the future files of this process and its children private."""
    os.umask(_OTHERS)


def make_folder(path: Path) -> None:
    """Makes a private folder and its missing parents; an existing folder is not changed."""
    for folder in (*reversed(path.parents), path):
        # Not `parents=True`: it makes the parents with the default mode.
        if not folder.is_dir():
            folder.mkdir(_FOLDER, exist_ok=True)


def make_file(path: Path) -> None:
    """Makes an empty private file, or makes an existing one private. Raises StoreError."""
    path.touch(_FILE)
    if not path.is_file():
        raise StoreError(f"{path} is not a file: move it away")
    _close(path.resolve())


def replace_file(path: Path, text: str) -> None:
    """Writes a private file in one step: who reads it finds the old text or all of the new one.

    Raises OSError.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _FILE), "w") as opened:
        opened.write(text)
    draft.replace(path)


def secret_of(file: Path, size: int = 32) -> bytes:
    """The random bytes in a private file, which is made if it is missing. Raises OSError."""
    if not file.exists():
        made = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
        with os.fdopen(os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _FILE), "wb") as out:
            out.write(secrets.token_bytes(size))
        try:
            os.link(made, file)  # whole, and of the first process only
        except FileExistsError:
            pass
        finally:
            made.unlink()
    return file.read_bytes()


def make_state_folder(path: Path) -> None:
    """Makes the state folder, or makes an existing one private with everything in it.

    Raises StoreError for a folder of another user, for one with other content than a state, and for
    one that was open to others and has something of another user in it.
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
    path.resolve().chmod(_FOLDER)  # nobody can add anything from now on
    try:
        for one in _everything(path):
            with suppress(FileNotFoundError):  # a running process may have removed it
                _check_owner(path, one, status.st_uid)
    except BaseException:
        path.resolve().chmod(stat.S_IMODE(status.st_mode))
        raise
    log.warning("%s was open to others (mode %o) and is closed", path, stat.S_IMODE(status.st_mode))
    for one in _everything(path):
        with suppress(FileNotFoundError):
            _close(one)


def _everything(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        yield from (Path(folder, name) for name in (*folders, *files))


def _check_owner(folder: Path, path: Path, owner: int) -> None:
    """Raises StoreError for what another user left in a folder that was open."""
    found = path.lstat().st_uid
    if found not in (owner, os.geteuid(), 0):
        raise StoreError(
            f"[store] dir = {str(folder)!r} was open to others, and {str(path)!r} in it belongs to "
            f"user {found}: move it away, or name another folder as [store] dir"
        )


def _close(path: Path) -> None:
    """Takes all rights away from others; a symbolic link is not changed."""
    mode = stat.S_IMODE(path.lstat().st_mode)
    if path.is_symlink() or not mode & _OTHERS:
        return
    path.chmod(mode & ~_OTHERS)
    log.warning("%s was open to others (mode %o) and is closed", path, mode)
