"""Imports of large libraries leave the process as it was."""

from __future__ import annotations

import gc
from importlib import metadata

import pytest

from nextstate.quick_imports import quick_imports


def test_the_list_of_packages_is_read_once_and_no_garbage_is_collected_meanwhile() -> None:
    with quick_imports():
        assert metadata.packages_distributions() is metadata.packages_distributions()
        assert not gc.isenabled()


@pytest.mark.parametrize("collects", [True, False])
def test_after_a_failed_import_everything_is_as_it_was(collects: bool) -> None:
    read = metadata.packages_distributions
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(ImportError), quick_imports():
            raise ImportError("torch")
        assert gc.isenabled() == collects
        assert metadata.packages_distributions is read
    finally:
        gc.enable()
