"""What the tests of this folder need of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nextstate.episodes import Episode
from nextstate.errors import StartError
from nextstate.store import Store
from nextstate.store.episodes import Choice
from plugins.environments.browsers import check_programs

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="needs bubblewrap: make bubblewrap"
)


def _lacks_for_gui() -> str:
    try:
        check_programs()
    except StartError as error:
        return str(error)
    return ""


needs_chromium = pytest.mark.skipif(
    bool(_lacks_for_gui()) and "CI" not in os.environ, reason=_lacks_for_gui() or "make gui"
)
"""In CI a test fails that lacks its browser."""


def _has_pytest() -> bool:
    """Whether the Python of sandboxes has pytest."""
    found = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", "import pytest"], capture_output=True, check=False
    )
    return found.returncode == 0


needs_pytest = pytest.mark.skipif(
    shutil.which("bwrap") is None or not Path("/usr/bin/python3").exists() or not _has_pytest(),
    reason="needs bubblewrap and python3-pytest: make bubblewrap",
)


def every_episode(store: Store) -> list[Episode]:
    """All episodes of a store, oldest first."""
    return store.episodes.get_all(store.episodes.ids(Choice()))
