"""A settings file is replaced at once, and undone byte for byte."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.app.connect import settings_file
from nextstate.errors import ConfigError


@given(st.none() | st.binary(), st.lists(st.binary(), min_size=1, max_size=4))
def test_undo_is_byte_exact_after_any_number_of_writes(
    tmp_path_factory: pytest.TempPathFactory, before: bytes | None, writes: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("home") / "agent" / "settings.json"
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)
    for data in writes:
        found = settings_file.find(path)
        if found.data != data:
            settings_file.write(found, data)
        assert path.read_bytes() == data
    if path.parent.exists() and any(path.parent.glob("*-nextstate-*")):
        settings_file.undo(settings_file.find(path))
    assert settings_file.find(path).data == before
    assert [*path.parent.glob("*")] == ([] if before is None else [path])


def test_mode_and_owner_stay(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("old")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 4321)
    was = path.stat()
    copy = settings_file.write(settings_file.find(path), b"new")
    for status in (path.stat(), copy.stat()):
        assert stat.S_IMODE(status.st_mode) == 0o640
        assert (status.st_uid, status.st_gid) == (was.st_uid, was.st_gid)


def test_a_new_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    settings_file.write(settings_file.find(path), b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "dotfiles.json", tmp_path / "settings.json"
    real.write_text("old")
    link.symlink_to(real)
    settings_file.write(settings_file.find(link), b"new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    settings_file.undo(settings_file.find(link))
    assert real.read_text() == "old"


def test_a_file_that_was_changed_since_stays_and_the_copy_is_named(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("old")
    copy = settings_file.write(settings_file.find(path), b"new")
    path.write_text("new and mine")
    with pytest.raises(ConfigError, match=rf"has changed since.*{copy.name}"):
        assert settings_file.undo(settings_file.find(path)) == copy
    assert path.read_text() == "new and mine"
    settings_file.write(settings_file.find(path), b"newer")
    settings_file.undo(settings_file.find(path))
    assert path.read_text() == "new and mine"


def test_undo_of_a_file_that_was_never_changed_says_so(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    for text in (None, "mine"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match="was not changed by `nextstate connect`"):
            settings_file.undo(settings_file.find(path))


def test_a_file_that_another_program_changes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("old")
    found = settings_file.find(path)
    path.write_text("theirs")
    with pytest.raises(ConfigError, match="changed by another program just now"):
        settings_file.write(found, b"new")
    assert path.read_text() == "theirs"
    assert [*tmp_path.glob("*")] == [path]


def test_what_is_no_settings_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "text").write_bytes(b"ab\xff")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 5 << 20)
    for path in (tmp_path, tmp_path / "large", Path("/dev/null")):
        with pytest.raises(ConfigError, match="is not a file of up to 4 MiB"):
            settings_file.find(path)
    for path in (tmp_path / "circle", Path("~nobody-here/a"), Path("a\0b")):
        with pytest.raises(ConfigError, match="name another with --file"):
            settings_file.find(path)
    with pytest.raises(ConfigError, match="byte 2 is not UTF-8; nothing was changed"):
        _ = settings_file.find(tmp_path / "text").text
    with pytest.raises(ConfigError, match="name another file with --file"):
        settings_file.write(settings_file.find(tmp_path / "text" / "inside"), b"new")
