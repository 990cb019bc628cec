"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store on disk."""
    opened = Store(StoreConfig(dir=str(tmp_path / "state")))
    yield opened
    opened.close()
