"""Names that tell a person, such as an e-mail address as a session's: another name stands for them.

A name must find its session again, so it is a keyed hash and no placeholder. The key is a file of
the state folder: with a copy of the database or an export alone nobody can try addresses.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from nextstate.private_files import secret_of
from nextstate.redaction import NOTHING, Redactor

KEY_FILE = "session-names.key"
LONGEST_NAME = 200
_LONGEST_SEARCHED = 1 << 16
_DIGEST_BYTES = 10


class HiddenNames:
    """What is kept of a name that a client gives: the same for the same name.

    Another one stands for a name in which something is found. Of one that is longer than 200
    characters its start is kept, and a hash for the rest.
    """

    def __init__(self, folder: Path | None = None, redactor: Redactor = NOTHING) -> None:
        self._folder = folder if redactor else None
        self._redactor = redactor
        self._key: bytes | None = None

    def __call__(self, name: str) -> str:
        """The name as it is kept. Raises OSError if the key can be neither read nor written."""
        if self._folder is not None and (
            len(name) > _LONGEST_SEARCHED or self._redactor.spans(name)
        ):
            return f"hidden-{self._digest(name)}"
        if len(name) > LONGEST_NAME:
            digest = self._digest(name)
            name = f"{name[: LONGEST_NAME - len(digest) - 1]}-{digest}"
        return name.encode(errors="replace").decode()  # a header may hold any bytes

    def _digest(self, name: str) -> str:
        if self._key is None:
            self._key = b"" if self._folder is None else secret_of(self._folder / KEY_FILE)
        data = name.encode(errors="surrogatepass")
        return hashlib.blake2b(data, key=self._key, digest_size=_DIGEST_BYTES).hexdigest()
