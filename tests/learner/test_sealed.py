"""In an encrypted state folder no plain byte of an adapter or a checkpoint reaches the disk."""
# pyright: basic

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.adapters import Card, load_weights, save_adapter
from learner.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from learner.folders import version_path
from nextstate import sealed_files
from nextstate.config import StoreConfig
from nextstate.engine.adapter_files import (
    opened_folder,
    prepare_served,
    remove_all_served,
    served_folder,
    verify_adapter,
)
from nextstate.errors import AdapterError, EngineError, LearnerError
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.encrypted import encrypt
from tests.learner.test_tiny_model import CONFIG

CARD = Card("main", 1, 0, "combined", ["turn-1"], {"loss": 0.5})
MARK = b"\x11\x22\x33\x44" * 4
"""Four equal weights as bytes: they stand in a plain file."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    config = StoreConfig(dir=str(tmp_path / "state"))
    encrypt(config, monkeypatch)
    with closing(Store(config)):
        yield config.path
    remove_all_served(config.path)


def weights() -> dict[str, torch.Tensor]:
    value = torch.frombuffer(bytearray(MARK), dtype=torch.float32)
    return {"a.lora_A.weight": value.reshape(2, 2).clone(), "a.lora_B.weight": torch.ones(3, 2)}


def plain_bytes(folder: Path) -> bool:
    return any(MARK in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_adapter_is_sealed_and_read_back_and_the_engine_gets_a_plain_copy(folder: Path) -> None:
    path = version_path(folder, "main", 1)
    sha256 = save_adapter(path, weights(), CONFIG, "some/model", CARD)
    assert not plain_bytes(folder)
    verify_adapter(path, sha256)
    loaded = load_weights(path, sha256)
    assert {n: t.tolist() for n, t in loaded.items()} == {
        n: t.tolist() for n, t in weights().items()
    }
    served = Path(prepare_served(str(path)))
    for copy in (served, opened_folder(path)):
        if isinstance(copy, Path):
            assert load_file(copy / "adapter_model.safetensors").keys() == weights().keys()
        else:
            with copy as plain:
                assert load_file(plain / "adapter_model.safetensors").keys() == weights().keys()
            assert not plain.exists()
    sealed_files.use(folder, None)
    assert sha256 != "", "the hash is that of the plain file: another data key does not change it"


def test_hidden_files_are_not_copied_for_the_engine_and_folders_are(folder: Path) -> None:
    path = version_path(folder, "main", 1)
    sha256 = save_adapter(path, weights(), CONFIG, "some/model", CARD)
    (path / ".adapter_model.safetensors.draft").write_bytes(b"not sealed whole")  # as `encrypt`
    sealed = (path / "adapter_model.safetensors").read_bytes()
    (path / ".nfs0123").write_bytes(sealed[:-1])
    (path / ".hidden").mkdir()
    verify_adapter(path, sha256)
    (path / "more").mkdir()
    (path / "more" / "file").write_bytes(b"more")
    for _ in range(2):
        served = Path(prepare_served(str(path)))
        assert {file.name for file in served.iterdir() if file.name.startswith(".")} == set()
        assert (served / "more" / "file").read_bytes() == b"more"


def test_a_copy_that_cannot_be_finished_leaves_no_memory_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = version_path(folder, "main", 1)
    save_adapter(path, weights(), CONFIG, "some/model", CARD)
    copies = Path(served_folder(str(path))).parent

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(EngineError, match="No space left"):
            prepare_served(str(path))
    assert list(copies.iterdir()) == []


def test_several_engines_get_one_copy_of_an_adapter_at_the_same_time(folder: Path) -> None:
    path = version_path(folder, "main", 1)
    save_adapter(path, weights(), CONFIG, "some/model", CARD)
    with ThreadPoolExecutor(8) as pool:
        served = set(pool.map(prepare_served, [str(path)] * 64))
        assert len(served) == 1
        (copy,) = map(Path, served)
        before = {file.name: file.stat().st_ino for file in copy.iterdir()}
        assert before.keys() == {file.name for file in path.iterdir()}
        list(pool.map(prepare_served, [str(path)] * 8))
    assert {file.name: file.stat().st_ino for file in copy.iterdir()} == before, "one may read it"


def test_a_checkpoint_is_sealed_and_read_back(folder: Path) -> None:
    version = PolicyVersion("main", 1, 0, None, "0" * 64, 2, VersionState.CANDIDATE, {"loss": 1.0})
    place = folder / "learner" / "main"
    place.mkdir(parents=True)
    save_checkpoint(place, Checkpoint(version, "batch-1", {"moments": weights()}, 3))
    assert not plain_bytes(folder)
    found = load_checkpoint(place)
    assert found is not None
    assert (found.version, found.batch, found.decided) == (version, "batch-1", 3)
    assert torch.equal(found.training["moments"]["a.lora_A.weight"], weights()["a.lora_A.weight"])
    file = place / "checkpoint.pt"
    other = folder / "learner" / "alice"
    other.mkdir()
    shutil.copy(file, other)
    with pytest.raises(LearnerError, match="is that of lineage 'main'"):
        load_checkpoint(other)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LearnerError, match="was changed since it was encrypted"):
        load_checkpoint(place)


def test_a_plain_checkpoint_or_adapter_in_the_place_of_a_sealed_one_is_not_read(
    folder: Path,
) -> None:
    """Whoever puts it there can write its hash into the database, too."""
    sealed_files.use(folder, None)
    version = PolicyVersion("main", 1, 0, None, "0" * 64, 2, VersionState.CANDIDATE, {"loss": 1.0})
    place = folder / "learner" / "main"
    place.mkdir(parents=True)
    save_checkpoint(place, Checkpoint(version, "batch-1", {"moments": weights()}, 3))
    path = version_path(folder, "main", 1)
    sha256 = save_adapter(path, weights(), CONFIG, "some/model", CARD)
    assert plain_bytes(folder)
    with closing(Store(StoreConfig(dir=str(folder)))):
        with pytest.raises(LearnerError, match="is not encrypted, but its folder is"):
            load_checkpoint(place)
        for given in (sha256, None):
            with pytest.raises(AdapterError, match="is not encrypted, but its folder is"):
                load_weights(path, given)
        with pytest.raises(AdapterError, match="cannot be read"):
            verify_adapter(path, sha256)
        with pytest.raises((AdapterError, EngineError), match="is not encrypted"):
            prepare_served(str(path))
