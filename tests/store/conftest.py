"""The tests of the store in a file run twice: as it is, and encrypted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.store import Store
from nextstate.store_key import VARIABLE
from tests.encrypted import encrypt

_IMPOSSIBLE = {"database": "postgresql", "store": "encrypted"}
"""Only a store in a file can be encrypted."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what there cannot be."""
    items[:] = [item for item in items if not _IMPOSSIBLE.items() <= _chosen(item).items()]


def _chosen(item: pytest.Item) -> dict[str, object]:
    """The values of a test's parameters, by name."""
    found = getattr(item, "callspec", None)
    return {} if found is None else found.params


@pytest.fixture(scope="session")
def encrypted_state(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an empty encrypted store, and its key in hexadecimal."""
    folder = tmp_path_factory.mktemp("encrypted") / "state"
    with pytest.MonkeyPatch.context() as patch:
        key = encrypt(StoreConfig(dir=str(folder)), patch)
    return folder, key.key.hex()


@pytest.fixture(params=["clear", "encrypted"])
def store(
    tmp_path: Path, database: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """An empty store on disk. Whatever a test does with it, the ledger must tell it."""
    folder: Path | None = None
    if request.param == "encrypted":
        folder, key = request.getfixturevalue("encrypted_state")
        monkeypatch.setenv(VARIABLE, key)
    elif database == "sqlite":
        folder = request.getfixturevalue("empty_state")
    if folder is not None:
        shutil.copytree(folder, tmp_path / "state")
    opened = Store(StoreConfig(dir=str(tmp_path / "state")))
    assert (opened.vault is not None) == (request.param == "encrypted")
    yield opened
    assert opened.ledger.problems() == []
    opened.close()
