"""Who may see the page: logins with an API key, kept as files that hold no key.

A login is a random token in a cookie. The file of a login has the token's hash as its name, so that
every worker of the proxy knows it and nobody can make a token of what lies on the disk. It ends
after `LASTS_S`, when its key is changed, or with the logout.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from nextstate.keys import Scope, hashed
from nextstate.private_files import make_folder, replace_file
from nextstate.wire import json_object
from proxy.keys import Grant, Keys

LASTS_S = 12 * 3600.0
MOST_LOGINS = 64
"""The oldest one ends when there are more."""
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


class Logins:
    """The logins of one state folder."""

    def __init__(self, folder: Path, keys: Keys, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._keys = keys
        self._clock = clock

    @property
    def needed(self) -> bool:
        """Whether the page needs a login."""
        return self._keys.needed

    def begin(self, key: str) -> str | None:
        """The token of a new login; None for a key that is wrong or may not look."""
        grant = self._keys.find(hashed(key))
        if grant is None or not grant.may(Scope.READ):
            return None
        token = secrets.token_urlsafe(32)
        make_folder(self._folder)
        self._make_room()
        entry = {
            "until": self._clock() + LASTS_S,
            "caller": grant.who,
            "proof": _mac(token, grant.hash.hex()),
        }
        replace_file(self._folder / _name(token), json.dumps(entry))
        return token

    def caller(self, token: str) -> Grant | None:
        """What the key may do that the login was made with; None if there is no such login."""
        if not _TOKEN.fullmatch(token):
            return None
        file = self._folder / _name(token)
        try:
            entry = json_object(file.read_bytes()) or {}
        except OSError:
            return None
        grant = self._keys.named(str(entry.get("caller")))
        proven = grant is not None and hmac.compare_digest(
            str(entry.get("proof")).encode(errors="replace"), _mac(token, grant.hash.hex()).encode()
        )
        until = entry.get("until")
        if not proven or not isinstance(until, float) or self._clock() >= until:
            file.unlink(missing_ok=True)
            return None
        return grant

    def end(self, token: str) -> None:
        """Ends a login."""
        if _TOKEN.fullmatch(token):
            (self._folder / _name(token)).unlink(missing_ok=True)

    def _make_room(self) -> None:
        ages: list[tuple[float, Path]] = []
        for file in self._folder.iterdir():
            with suppress(OSError):  # another worker may have removed it
                ages.append((file.stat().st_mtime, file))
        for _, file in sorted(ages)[: max(len(ages) - MOST_LOGINS + 1, 0)]:
            file.unlink(missing_ok=True)


def form_token(cookie: str) -> str:
    """What every form must send back with the cookie: another site can neither read nor set it."""
    return _mac(cookie, "form")


def is_token(cookie: str) -> bool:
    """Whether a cookie has the form of ours."""
    return _TOKEN.fullmatch(cookie) is not None


def is_ours(cookie: str, sent: str) -> bool:
    """Whether a form was made for the browser with this cookie."""
    return hmac.compare_digest(sent.encode(errors="replace"), form_token(cookie).encode())


def new_cookie() -> str:
    """The cookie of a browser that needs no login: its forms are tied to it."""
    return secrets.token_urlsafe(32)


def foreign_form(request: web.Request) -> str | None:
    """Why a form may come from another page than ours, or None.

    Stricter than `proxy.browsers`: other pages of this machine may not send our forms either.
    """
    for origin in request.headers.getall("Origin", ()):
        with suppress(ValueError):
            if urlsplit(origin).netloc == request.headers.get("Host"):
                continue
        return f"Origin: {origin[:100]!r} is not this page's own: open the page itself"
    for site in request.headers.getall("Sec-Fetch-Site", ()):
        if site not in ("same-origin", "none"):
            return f"Sec-Fetch-Site: {site[:100]!r}: only this page itself may send its forms"
    return None


def _name(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _mac(token: str, text: str) -> str:
    return hmac.new(token.encode(), text.encode(), hashlib.sha256).hexdigest()
