"""Files of an encrypted state folder: adapters, checkpoints, pictures and trained judges.

A file whose content may tell what people said is read and written here. Its name is authenticated
with it. The folder's key is known once its store is open (`use`); a folder without encryption has
plain files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from nextstate.errors import SealError

_MAGIC = b"nextstate sealed 1\n"
MOST_MORE = 100
"""Bytes by which a sealed file is longer at most."""
_PATTERNS = (
    "versions/*/v*/adapter_model.safetensors",
    "judge/v*/adapter_model.safetensors",
    "warm-up/*/adapter_model.safetensors",
    "learner/*/checkpoint.pt",
    "pictures/*/*",
    "ledger.head",
)
"""Which files of a state folder are sealed."""


class Vault(Protocol):
    """What seals: `nextstate.store.vault.Vault`."""

    has_key: bool

    def seal(self, place: bytes, value: bytes) -> bytes: ...

    def open(self, place: bytes, sealed: bytes) -> bytes: ...


_vaults: dict[Path, Vault | None] = {}
"""By the real path of the state folder."""


def use(folder: Path, vault: Vault | None) -> None:
    """Lets files in a state folder be sealed and opened by this process; None: they are plain."""
    _vaults[folder.resolve()] = vault


def write(path: Path, data: bytes, name: str | None = None) -> None:
    """Writes a file, sealed if its folder is encrypted; `name` is the one that it gets later.

    Raises OSError and SealError.
    """
    vault = _vault_of(path)
    named = path if name is None else path.with_name(name)
    path.write_bytes(data if vault is None else _sealed(vault, named, data))


def read(path: Path) -> bytes:
    """A file's content, opened if it is sealed. Raises OSError and SealError."""
    return opened(path, path.read_bytes())


def opened(path: Path, data: bytes) -> bytes:
    """The content of a file from its bytes.

    Raises SealError, also for a plain file in the place of one that an encrypted folder seals.
    """
    vault = _vault_of(path)
    if not data.startswith(_MAGIC):
        if _must_be_sealed(path):
            raise SealError(
                f"{path} is not encrypted, but its folder is: somebody has put it there; delete it"
            )
        return data
    if vault is None:
        raise SealError(f"{path} is encrypted, and the store that it belongs to is not open")
    return _opened(vault, path, data)


def root_of(path: Path) -> Path:
    """The state folder that a file lies in, if its store is open; else the file's own folder."""
    real = path.resolve()
    return next((folder for folder in real.parents if folder in _vaults), real.parent)


def may_write(path: Path) -> bool:
    """Whether this process can keep a file there: not without the key of an encrypted folder."""
    vault = _vault_of(path)
    return vault is None or vault.has_key


def is_encrypted(path: Path) -> bool:
    """Whether files are sealed where `path` is, as far as this process knows."""
    return _vault_of(path) is not None


def is_sealed(path: Path) -> bool:
    """Whether a file is encrypted, or has to be: then `read` says it is not. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC or _must_be_sealed(path)


def change_files(folder: Path, source: Vault | None, target: Vault | None) -> None:
    """Changes every such file of a state folder; those that are changed already stay."""
    for path in sealable(folder):
        data = path.read_bytes()
        if not data.startswith(_MAGIC):
            if target is None:
                continue
        elif target is not None and _is_of(target, path, data):
            continue
        elif source is not None:
            data = _opened(source, path, data)
        draft = path.with_name(f".{path.name}.draft")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data if target is None else _sealed(target, path, data))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)


def sealable(folder: Path) -> Iterator[Path]:
    """The files of a state folder that are sealed when it is encrypted."""
    for pattern in _PATTERNS:
        yield from (p for p in sorted(folder.glob(pattern)) if p.is_file() and not p.is_symlink())


def _must_be_sealed(path: Path) -> bool:
    if _vault_of(path) is None:
        return False
    real = path.resolve()
    root = next(folder for folder in real.parents if folder in _vaults)
    return any(fnmatch(str(real.relative_to(root)), pattern) for pattern in _PATTERNS)


def _vault_of(path: Path) -> Vault | None:
    real = path.resolve()
    return next((_vaults[folder] for folder in real.parents if folder in _vaults), None)


def _place(path: Path) -> bytes:
    return b"file " + path.name.encode()


def _sealed(vault: Vault, path: Path, data: bytes) -> bytes:
    return _MAGIC + vault.seal(_place(path), data)


def _opened(vault: Vault, path: Path, data: bytes) -> bytes:
    try:
        return vault.open(_place(path), data[len(_MAGIC) :])
    except SealError:
        raise SealError(
            f"{path} was changed since it was encrypted, or belongs to another state folder"
        ) from None


def _is_of(vault: Vault, path: Path, data: bytes) -> bool:
    try:
        _opened(vault, path, data)
    except SealError:
        return False
    return True
