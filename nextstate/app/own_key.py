"""The key with which our own commands ask the running proxy of this state folder.

It is made anew at each start of `nextstate up`, or of a proxy alone, and removed at its end. A
proxy that was killed leaves it, and the next one takes it, so that a rollout that runs goes on. So
do proxies on several machines: where the store is on a server, the file stays. Only the owner of
the folder can read it. No command needs a key in its environment then.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nextstate.app.settings import Settings
from nextstate.config import secret
from nextstate.keys import new_key
from nextstate.private_files import replace_file


def own_key_file(settings: Settings) -> Path:
    """The file of the key; it exists while a proxy runs."""
    return settings.store.path / "proxy.key"


def write_own_key(settings: Settings, key: str) -> None:
    """Tells our commands the key of a proxy that has started; only the owner can read the file."""
    replace_file(own_key_file(settings), key)


def remove_own_key(settings: Settings, key: str) -> None:
    """Removes the file at the proxy's end, unless it is, or may be, another proxy's too."""
    if settings.store.url.startswith("postgres"):
        return
    file = own_key_file(settings)
    with suppress(OSError):
        if file.read_text() == key:
            file.unlink()


def own_key_of(settings: Settings) -> str:
    """The key that another process of ours wrote; one that nobody knows without it."""
    try:
        return own_key_file(settings).read_text().strip() or new_key()
    except OSError:
        return new_key()


def proxy_key(settings: Settings) -> str | None:
    """The key for a request of ours: the running proxy's, else `[proxy] api_key_env`'s, else None.

    Raises ConfigError if that variable is needed and is not set.
    """
    try:
        return own_key_file(settings).read_text().strip() or None
    except OSError:
        return secret(settings.proxy.api_key_env, "[proxy] api_key_env")
