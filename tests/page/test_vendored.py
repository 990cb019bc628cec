"""What is vendored for the page is what its licence and hashes say."""

from __future__ import annotations

import hashlib
from importlib.resources import files

FOLDER = files("nextstate.app.page") / "static" / "htmx"


def test_the_vendored_files_are_unchanged_and_have_their_licence_beside_them() -> None:
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    known = {name: digest for digest, name in (line.split() for line in lines)}
    assert set(known) == {"htmx.min.js", "hx-sse.min.js", "LICENSE"}
    assert {one.name for one in FOLDER.iterdir()} == {*known, "SHA256SUMS", "README.md"}
    for name, digest in known.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name
    assert (FOLDER / "LICENSE").read_text().startswith("Zero-Clause BSD")
    assert "4.0.1" in (FOLDER / "README.md").read_text()
