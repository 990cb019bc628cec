"""What the tests of this folder need of the machine."""

from __future__ import annotations

import shutil

import pytest

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="needs bubblewrap: make bubblewrap"
)
