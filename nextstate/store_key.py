"""The key to an encrypted store: where it is looked for, its form, making one.

It is 32 random bytes in hexadecimal, and no password: nobody can try all of them, so opening the
store costs no slow hash. It must lie elsewhere than the store, or who takes one has both.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nextstate.errors import ConfigError

VARIABLE, FILE_VARIABLE = "NEXTSTATE_STORE_KEY", "NEXTSTATE_STORE_KEY_FILE"
DIRECTORY_VARIABLE = "CREDENTIALS_DIRECTORY"
"""Where systemd puts credentials."""
VARIABLES = (VARIABLE, FILE_VARIABLE, DIRECTORY_VARIABLE)
"""Whoever has one of these may find the key."""
CREDENTIAL = "nextstate-store-key"
"""The name of a credential of systemd (`LoadCredential=`, `LoadCredentialEncrypted=`)."""
SERVICE = "nextstate"
"""The name in the keyring of the desktop, with the state folder as the account."""
HOW = (
    f"set {VARIABLE}, or {FILE_VARIABLE} to the path of the key's file, give systemd's credential "
    f"{CREDENTIAL}, or put it into the keyring (`keyring set {SERVICE} FOLDER`)"
)
_FORM = re.compile(r"[0-9a-f]{64}")


class StoreKey(NamedTuple):
    """A key, and where it was found, for messages."""

    key: bytes
    where: str


def find_store_key(folder: Path, environment: Mapping[str, str] | None = None) -> StoreKey | None:
    """The key for the store in a state folder; None if there is none. Raises ConfigError."""
    variables = os.environ if environment is None else environment
    if text := variables.get(VARIABLE):
        return StoreKey(_read(text, VARIABLE), VARIABLE)
    if file := variables.get(FILE_VARIABLE):
        return read_key_file(Path(file), folder, FILE_VARIABLE)
    if credentials := variables.get(DIRECTORY_VARIABLE):
        file = Path(credentials, CREDENTIAL)
        if file.exists():
            return read_key_file(file, folder, "systemd's credential")
    text = _of_keyring(str(folder))
    return None if text is None else StoreKey(_read(text, "the keyring"), "the keyring")


def read_key_file(file: Path, folder: Path, named: str) -> StoreKey:
    """The key in a file that `named` names. Raises ConfigError."""
    _require_elsewhere(file, folder)
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(
            f"{named} names {str(file)!r}, which cannot be read: {why}; expected a file with a key "
            "(`nextstate encrypt --key-file FILE` makes one)"
        ) from None
    return StoreKey(_read(text, f"{file}"), str(file))


def make_key_file(file: Path, folder: Path) -> StoreKey:
    """Makes a file with a new key, which only its owner can read. Raises ConfigError."""
    _require_elsewhere(file, folder)
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(secrets.token_hex(32) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        raise ConfigError(
            f"--key-file {str(file)!r} cannot be written: {error.strerror}; name a file in a "
            "folder that is there"
        ) from None
    return read_key_file(file, folder, "--key-file")


def _require_elsewhere(file: Path, folder: Path) -> None:
    if file.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"the key's file {str(file)!r} lies in the state folder, and who takes that would have "
            "both: put it elsewhere, such as on another disk"
        )


def _read(text: str, where: str) -> bytes:
    """The key of a text, which is not quoted. Raises ConfigError."""
    text = text.strip()
    if not _FORM.fullmatch(text) or len(set(text)) < 8:
        raise ConfigError(
            f"{where} does not hold a key of a store: expected 64 random hexadecimal digits, as "
            "`nextstate encrypt --key-file FILE` and `openssl rand -hex 32` make them"
        )
    return bytes.fromhex(text)


def _of_keyring(account: str) -> str | None:
    try:
        keyring: Any = importlib.import_module("keyring")
    except ImportError:
        return None
    try:
        return keyring.get_password(SERVICE, account)
    except Exception:  # whatever its backend raises where there is no desktop
        return None
