"""The configuration and the state folder of a demo: written anew, and only over a demo's own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.report import record_files
from nextstate.app.settings import Settings
from nextstate.engine.process import free_port
from nextstate.errors import StartError
from nextstate.private_files import make_folder
from nextstate.process_lock import ProcessLock
from nextstate.store.sqlite import FILE, is_open

_HEAD = "# Written by `nextstate demo`"
_MARK = ".made-by-nextstate-demo"
"""This file marks a state folder that a demo made: the next demo may delete it."""
_CONFIG = """\
{head}; `nextstate turns --config {file}` and the like read what it recorded.
[store]
dir = {state}

[engine]
model = {policy}
served_model_name = {model}
dtype = "{dtype}"
max_model_len = 1024
args = ["--enforce-eager", "--max-num-seqs", "32"]
# Compiling takes longer than this whole demo; the cache of a small model needs no more than 1 GB.
env = {{ TORCHDYNAMO_DISABLE = "1", VLLM_CPU_KVCACHE_SPACE = "1" }}

[proxy]
port = {port}

[judge]
kind = "{judge}"

[learner]
{learner}
"""


@dataclass(frozen=True, slots=True)
class Served:
    """A model and how it learns."""

    model: Path
    served_name: str
    dtype: str
    judge: str
    """`[judge] kind`."""
    learner: Mapping[str, bool | int | float | str]
    """Keys of `[learner]`."""


def write_configuration(out: Path, served: Served) -> Settings:
    """Writes a demo's configuration and reads it back; deletes an earlier demo's records.

    Raises StartError instead of deleting or overwriting what no demo made.
    """
    state, file = out / "state", out / "nextstate.toml"
    ours = _is_demos(file)
    for path in (file, *record_files(out)):
        if path.is_symlink() or (not ours and path.exists()):
            raise _not_ours(path)
    _forget(state)
    make_folder(state)
    (state / _MARK).touch()
    file.write_text(
        encoding="utf-8",
        data=_CONFIG.format(
            head=_HEAD,
            file=_quoted(file),
            state=_quoted(state),
            policy=_quoted(served.model),
            model=json.dumps(served.served_name),
            dtype=served.dtype,
            port=free_port(),
            judge=served.judge,
            learner="\n".join(
                f"{key} = {json.dumps(value)}" for key, value in served.learner.items()
            ),
        ),
    )
    return Settings.read(file)


def _is_demos(file: Path) -> bool:
    """True if a demo wrote this configuration."""
    return file.is_file() and file.read_bytes().startswith(_HEAD.encode())


def _quoted(path: Path) -> str:
    """The path as a TOML string. Raises StartError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise StartError(f"--out {str(path)!r} is not valid Unicode: name another folder") from None
    return json.dumps(str(path), ensure_ascii=False)


def _forget(state: Path) -> None:
    """Deletes an earlier demo's state folder, unless it is in use."""
    if not os.path.lexists(state):
        return
    mark = state / _MARK
    if state.is_symlink() or mark.is_symlink() or not mark.is_file():
        raise _not_ours(state)
    taken, remedy = f"{state} is in use", "end it, or name another folder with --out"
    with ProcessLock(state / "lock", taken, remedy):
        if is_open(state / FILE):  # a stage that runs alone holds no lock
            raise StartError(f"{taken} by a `nextstate` process: {remedy}")
        shutil.rmtree(state)


def _not_ours(path: Path) -> StartError:
    return StartError(
        f"{path} was not made by `nextstate demo`, which would replace it: name another folder "
        "with --out, or remove it yourself"
    )
