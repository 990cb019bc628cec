"""Another program's settings file: replaced at once, with a copy of what was there before.

The copy lies beside the file. Its name has the hash of what was written, so `undo` finds the copy
of exactly the file that it sees, and knows if somebody has changed the file since.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nextstate.errors import ConfigError
from nextstate.private_files import make_folder

_MOST_BYTES = 4 << 20
_COPY = "before-nextstate"
_NO_FILE = "no-file-before-nextstate"


@dataclass(frozen=True, slots=True)
class Found:
    """A settings file as it is."""

    path: Path
    """Where its bytes are: links are followed."""
    data: bytes | None
    """None if there is no such file."""

    @property
    def text(self) -> str:
        """Its text; empty if there is no file. Raises ConfigError if it is not UTF-8."""
        try:
            return (self.data or b"").decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self.path}: byte {error.start} is not UTF-8; nothing was changed. Save the file "
                "as UTF-8, or name another with --file"
            ) from None


def find(path: Path) -> Found:
    """Reads the file. Raises ConfigError for something else than a small regular file."""
    try:
        real = path.expanduser().resolve()
        if not real.exists():
            return Found(real, None)
        status = real.stat()
    except (RuntimeError, OSError, ValueError) as error:  # a circle of links, a folder in the way
        raise ConfigError(f"{path} cannot be read: {error}; name another with --file") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
        raise ConfigError(
            f"{real} is not a file of up to {_MOST_BYTES >> 20} MiB; name the agent's settings "
            "file with --file"
        )
    return Found(real, real.read_bytes())


def readers(found: Found) -> int:
    """The mode of a file that others than its owner may read or write; 0 of any other."""
    mode = stat.S_IMODE(found.path.stat().st_mode) if found.path.exists() else 0
    return mode if mode & 0o077 else 0


def make_private(found: Found) -> None:
    """Takes the file from everybody but its owner. `undo` restores its mode."""
    found.path.chmod(stat.S_IMODE(found.path.stat().st_mode) & 0o700)


def write(found: Found, data: bytes, *, private: bool = False) -> Path:
    """Replaces the file and returns the copy of what was there before.

    It keeps its mode, or with `private` loses what others may; the copy has the first one's mode.
    If the file is as an earlier call left it, the copy that was made then is kept as the one
    before. Raises ConfigError if the file has changed since `found` was read.
    """
    earlier = _copy_for(found)
    before = earlier.read_bytes() if earlier else found.data
    absent = _NO_FILE in earlier.name if earlier else found.data is None
    try:
        make_folder(found.path.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{found.path}: {error}; name another file with --file") from None
    copy = _copy_name(found.path, data, absent)
    _replace(copy, before or b"", like=earlier or found.path)
    if find(found.path).data != found.data:
        copy.unlink()
        raise ConfigError(f"{found.path} was changed by another program just now: try again")
    _replace(found.path, data, like=found.path, private=private)
    if earlier is not None and earlier != copy:
        earlier.unlink()
    return copy


def undo(found: Found) -> Path | None:
    """Puts back what was there before. Raises ConfigError if that is not known, or changed.

    Returns the copy of an earlier call that was never undone: what is back has its changes then.
    """
    copy = _copy_for(found)
    if copy is None:
        copies = _copies(found.path)
        if not copies:
            raise ConfigError(f"{found.path} was not changed by `nextstate connect`")
        raise ConfigError(
            f"{found.path} has changed since `nextstate connect` wrote it, so it stays as it is; "
            f"what was there before is in {_newest(copies)}"
        )
    if _NO_FILE in copy.name:
        found.path.unlink()
    else:
        _replace(found.path, copy.read_bytes(), like=copy)
    copy.unlink()
    left = _copies(found.path)
    return _newest(left) if left else None


def _copies(path: Path) -> list[Path]:
    return [
        entry
        for entry in path.parent.glob("*")
        if entry.name.startswith(f"{path.name}.") and _COPY in entry.name
    ]


def _newest(copies: list[Path]) -> Path:
    return max(copies, key=lambda copy: copy.stat().st_mtime_ns)


def _copy_for(found: Found) -> Path | None:
    """The copy that was made when the file got its present content."""
    if found.data is None:
        return None
    names = (_copy_name(found.path, found.data, absent) for absent in (False, True))
    return next((name for name in names if name.is_file()), None)


def _copy_name(path: Path, written: bytes, absent: bool) -> Path:
    kind = _NO_FILE if absent else _COPY
    return path.with_name(f"{path.name}.{kind}-{hashlib.sha256(written).hexdigest()[:16]}")


def _replace(path: Path, data: bytes, like: Path, *, private: bool = False) -> None:
    """Writes the file in one step, with mode and owner of `like`; private if there is no such."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            with suppress(FileNotFoundError):
                status = like.stat()
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    os.chown(name, status.st_uid, status.st_gid)
                os.chmod(name, stat.S_IMODE(status.st_mode) & (0o700 if private else 0o7777))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
