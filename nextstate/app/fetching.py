"""Downloading a model's files into the local cache: the one place that asks the model hub.

It does so only because a person has named the model on the command line.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from nextstate.errors import StartError

T = TypeVar("T")
_HUB_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_WEIGHTS = ".safetensors"
"""Never pickles (`.bin`), which can run code when they are read."""
_BESIDE = ".json", ".jinja", ".txt", ".model", ".tiktoken"
"""Configuration, tokenizer and chat template."""
_NOT = "*/*", "consolidated*"
"""The same weights once more, in folders or in another format, and what no server reads."""


@dataclass(frozen=True, slots=True)
class Missing:
    """What is still to be downloaded of a model."""

    model: str
    files: Sequence[str]
    size: int
    """In bytes."""


def hub_name(model: str) -> str:
    """`model`, if it can be fetched. Raises StartError if it is a folder or no name."""
    if Path(model).expanduser().exists():
        raise StartError(f"{model!r} is on this machine: nothing to fetch")
    if not _HUB_NAME.fullmatch(model):
        raise StartError(f"{model!r:.200} is not the name of a model: expected OWNER/NAME")
    return model


def missing(model: str) -> Missing:
    """Asks the hub which files a model has; those that are not here. Raises StartError."""
    _go_online()
    from huggingface_hub import HfApi, try_to_load_from_cache

    info = _asked(model, lambda: HfApi().model_info(model, files_metadata=True))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = wanted_files(list(sizes))
    if not names:
        raise StartError(f"{model} has no weights in {_WEIGHTS}: name another model")
    away = [
        name
        for name in names
        if not isinstance(try_to_load_from_cache(model, name, revision=info.sha), str)
    ]
    return Missing(model, away, sum(sizes[name] for name in away))


def wanted_files(names: Sequence[str]) -> list[str]:
    """Which of a model's files its server and its learner read; [] if it has no weights.

    >>> wanted_files(["model.safetensors", "pytorch_model.bin", "config.json", "onnx/m.json"])
    ['model.safetensors', 'config.json']
    """
    top = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _NOT)]
    if not any(name.endswith(_WEIGHTS) for name in top):
        return []
    return [name for name in top if name.endswith((_WEIGHTS, *_BESIDE))]


def fetch(found: Missing) -> Path:
    """Downloads what is missing; returns the model's folder in the cache. Raises StartError."""
    _go_online()
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    if found.size > (free := shutil.disk_usage(folder).free):
        raise StartError(
            f"{found.model} needs {size_text(found.size)} and {HF_HUB_CACHE} has "
            f"{size_text(free)} free: make room there, or set HF_HOME to a folder with more"
        )
    files = list(found.files)
    return Path(_asked(found.model, lambda: snapshot_download(found.model, allow_patterns=files)))


def size_text(count: float) -> str:
    """A number of bytes in words.

    >>> size_text(8_100_000_000), size_text(93_400_000), size_text(1200)
    ('8.1 GB', '93 MB', '1 kB')
    """
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _go_online() -> None:
    """Lets huggingface_hub use the network; it reads this when it is imported first."""
    os.environ["HF_HUB_OFFLINE"] = "0"


def _asked(model: str, request: Callable[[], T]) -> T:
    """What a request to the hub returns. Raises StartError with what a person can do."""
    from httpx import HTTPError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return request()
    except GatedRepoError:
        raise StartError(
            f"{model} is given only to people who accepted its terms: accept them on its page, "
            "and export HF_TOKEN=… with a token of yours"
        ) from None
    except RepositoryNotFoundError:
        raise StartError(
            f"the hub has no model {model}, or shows it only to some: check the name, or export "
            "HF_TOKEN=… with a token that may read it"
        ) from None
    except (HTTPError, OSError) as error:  # the hub's own errors are of these kinds
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise StartError(
            f"{model} could not be downloaded: {reason}; the same command goes on where it ended"
        ) from error
