"""Names of sessions that tell a person, such as an e-mail address: another name stands for them.

A name must find its session again, so it is a keyed hash and no placeholder. The key is a file of
the state folder: with a copy of the database or an export alone nobody can try addresses.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from nextstate.private_files import secret_of
from nextstate.redaction import NOTHING, Redactor

KEY_FILE = "session-names.key"
_DIGEST_BYTES = 10


class HiddenNames:
    """Replaces names of sessions in which something is found; the same name stays the same."""

    def __init__(self, folder: Path | None = None, redactor: Redactor = NOTHING) -> None:
        self._folder = folder
        self._redactor = redactor
        self._key: bytes | None = None

    def __call__(self, name: str) -> str:
        """The name as it is kept. Raises OSError if the key can be neither read nor written."""
        if self._folder is None or not self._redactor.spans(name):
            return name
        if self._key is None:
            self._key = secret_of(self._folder / KEY_FILE)
        digest = hashlib.blake2b(name.encode(), key=self._key, digest_size=_DIGEST_BYTES)
        return f"hidden-{digest.hexdigest()}"
