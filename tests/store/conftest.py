"""The tests of the store in a file run twice: as it is, and encrypted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.store import Store
from tests.encrypted import encrypt


@pytest.fixture(params=["clear", "encrypted"])
def store(
    tmp_path: Path, database: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """An empty store on disk. Whatever a test does with it, the ledger must tell it."""
    config = StoreConfig(dir=str(tmp_path / "state"))
    if request.param == "encrypted":
        if database != "sqlite":
            pytest.skip("only a store in a file can be encrypted")
        encrypt(config, monkeypatch)
    opened = Store(config)
    assert (opened.vault is not None) == (request.param == "encrypted")
    yield opened
    assert opened.ledger.problems() == []
    opened.close()
