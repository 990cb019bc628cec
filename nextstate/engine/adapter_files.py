"""Adapters' folders: whether they hold what was registered, and where the engine reads them.

The engine reads plain files. An adapter that is encrypted on the disk is copied, opened, into
memory (a tmpfs) for as long as it is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from nextstate import sealed_files
from nextstate.errors import AdapterError, EngineError, SealError

WEIGHTS_FILE = "adapter_model.safetensors"
MODEL_FILE = "model.safetensors"
"""In the folder of a version that is a whole model."""
CARD_FILE = "card.json"
"""Says where the weights come from, and what is registered of their folder."""
_IN_MEMORY = Path("/dev/shm")
_FOLDER = 0o700
_copying = threading.Lock()
"""Several engines load the same copy at the same time."""


def verify_adapter(path: Path, sha256: str) -> None:
    """Raises AdapterError unless every file is the one that was registered.

    Of a version that was registered before they all counted, that is the weight file alone. Raises
    EngineError if a file cannot be read for now.
    """
    try:
        found = folder_sha256(path)
        weights = path / (MODEL_FILE if is_checkpoint(path) else WEIGHTS_FILE)
        is_same = found == sha256 or file_sha256(weights) == sha256
    except (OSError, SealError) as error:
        raise unreadable(path, f"the adapter in {path} cannot be read: {error}", error) from error
    if not is_same:
        raise AdapterError(
            f"the adapter in {path} has changed on disk: SHA-256 {found[:12]}…, expected "
            f"{sha256[:12]}…; return to an earlier version with `nextstate rollback`"
        )


def unreadable(path: Path, text: str, error: Exception) -> AdapterError | EngineError:
    """What is wrong with a version's folder that could not be read.

    AdapterError says that it is lost, for everybody: the version is rejected. So where only this
    machine may be unable to read it, because a disk fails or is not there, that is an EngineError.
    """
    is_gone = isinstance(error, FileNotFoundError) and os.path.isdir(path.parent)
    if is_gone or not isinstance(error, OSError):
        return AdapterError(text)
    return EngineError(f"{text}; that is tried again: see that this machine has its disk")


def is_checkpoint(path: Path) -> bool:
    """Whether a version's folder holds a whole model."""
    return (path / MODEL_FILE).is_file()


def folder_sha256(folder: Path, *, with_card: bool = False) -> str:
    """What is registered of a version: the SHA-256 of what `sha256sum` prints of its files.

    They are all but hidden ones and the card, in the order of their names, opened if sealed: so a
    file that was added is found too. Raises OSError and SealError.
    """
    without = () if with_card else (CARD_FILE,)
    files = [(name, file) for name, file in _files(folder).items() if name not in without]
    lines = (f"{file_sha256(file)}  {name}\n" for name, file in files)
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, opened if it is sealed, in hexadecimal."""
    if sealed_files.is_sealed(path):
        return hashlib.sha256(sealed_files.read(path)).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def served_folder(path: str) -> str:
    """Where the engine reads the adapter in folder `path`: there, or in memory if it is sealed."""
    folder = Path(path)
    with suppress(OSError):
        if sealed_files.is_sealed(folder / WEIGHTS_FILE):
            root = sealed_files.root_of(folder)
            name = str(folder.resolve().relative_to(root)).replace(os.sep, "-")
            return str(in_memory(root) / name)
    return path


def prepare_served(path: str) -> str:
    """`served_folder`, with the files in it. Raises as `verify_adapter` does."""
    served = served_folder(path)
    if served != path:
        try:
            with _copying:
                _make_private(Path(served).parent)
                if not _is_copy(Path(path), Path(served)):
                    _copy_opened(Path(path), Path(served))
        except (OSError, SealError) as error:
            text = f"the encrypted adapter in {path} cannot be opened in memory, at {served}"
            raise unreadable(Path(path), f"{text}: {error}", error) from error
    return served


def remove_served(served: str) -> None:
    """Deletes an adapter's copy in memory, if it is one."""
    if Path(served).parent.parent == _IN_MEMORY:
        shutil.rmtree(served, ignore_errors=True)


def remove_all_served(state_dir: Path) -> None:
    """Deletes what lies in memory for a state folder."""
    shutil.rmtree(in_memory(state_dir.resolve()), ignore_errors=True)


@contextmanager
def opened_folder(path: Path) -> Generator[Path]:
    """The adapter's folder with plain files; a copy in memory if it is sealed."""
    if is_checkpoint(path) or not sealed_files.is_sealed(path / WEIGHTS_FILE):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="nextstate-", dir=_IN_MEMORY) as folder:
        copy = Path(folder, path.name)
        _copy_opened(path, copy)
        yield copy


def in_memory(root: Path) -> Path:
    """The folder in memory for the adapters of a state folder, named by its real path."""
    name = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    return _IN_MEMORY / f"nextstate-{os.geteuid()}-{name}"


def _make_private(folder: Path) -> None:
    """Makes a folder beside others' ones that only we can read. Raises OSError."""
    with suppress(FileExistsError):
        folder.mkdir(_FOLDER)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise OSError(f"{folder} is another account's")
    folder.chmod(_FOLDER)


def _files(folder: Path) -> dict[str, Path]:
    """A folder's files by their names in it, in order, without hidden ones.

    Raises OSError: FileNotFoundError for what is neither file nor folder, as a link to a folder is.
    """
    found: dict[str, Path] = {}
    for inside, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(inside, name) for name in (*folders, *files) if not name.startswith(".")):
            if file.is_symlink() or not file.is_dir():
                if not stat.S_ISREG(file.stat().st_mode):
                    raise FileNotFoundError(errno.ENOENT, "No such file", str(file))
                found[str(file.relative_to(folder))] = file
    return dict(sorted(found.items()))


def _raise(error: OSError) -> None:
    raise error


def _is_copy(source: Path, target: Path) -> bool:
    """Whether an adapter's files lie opened in `target`: another engine may read them."""
    try:
        files = _files(source).items()
        return all((target / name).read_bytes() == sealed_files.read(file) for name, file in files)
    except FileNotFoundError:
        return False


def _copy_opened(source: Path, target: Path) -> None:
    draft = target.with_name(f".{target.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(_FOLDER)
    try:
        for name, file in _files(source).items():
            data = sealed_files.read(file)
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(draft / name, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as out:
                out.write(data)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    finally:  # what was half written would keep the memory full
        shutil.rmtree(draft, ignore_errors=True)
