"""Imports of large libraries, without work that says nothing or is done twice."""

from __future__ import annotations

import functools
import gc
from collections.abc import Generator
from contextlib import contextmanager
from importlib import metadata


@contextmanager
def quick_imports() -> Generator[None]:
    """Around imports of torch and what builds on it: a fifth less of the processor's time.

    Imports leave hardly any garbage, and each search for it looks through all that was imported.
    Several of the libraries read the names of all installed packages: it takes 0.5 s a time.
    """
    collects, read = gc.isenabled(), metadata.packages_distributions
    gc.disable()
    metadata.packages_distributions = functools.cache(read)
    try:
        yield
    finally:
        metadata.packages_distributions = read
        if collects:
            gc.enable()
