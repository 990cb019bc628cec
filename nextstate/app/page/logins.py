"""Who may see the page: logins with an API key, kept as files that hold no key.

A login is a random token in a cookie. The file of a login has the token's hash as its name, so that
every worker of the proxy knows it and nobody can make a token of what lies on the disk. It ends
after `LASTS_S`, when its key is changed, or with the logout.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from nextstate.private_files import make_folder
from nextstate.records import MAIN_LINEAGE
from nextstate.wire import json_object
from proxy.lineages import Lineages

LASTS_S = 12 * 3600.0
MOST_LOGINS = 64
"""The oldest one ends when there are more."""
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


class Logins:
    """The logins of one state folder."""

    def __init__(
        self, folder: Path, lineages: Lineages, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._lineages = lineages
        self._clock = clock

    @property
    def needed(self) -> bool:
        """Whether the page needs a login."""
        return self._lineages.main_key is not None

    def begin(self, key: str) -> str | None:
        """The token of a new login; None for a wrong key."""
        if not self._lineages.has_key(key):
            return None
        caller = self._lineages.caller(key)
        token = secrets.token_urlsafe(32)
        make_folder(self._folder)
        self._make_room()
        entry = {"until": self._clock() + LASTS_S, "caller": caller, "proof": _mac(token, key)}
        draft = self._folder / f"{_name(token)}.draft"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            json.dump(entry, opened)
        draft.replace(draft.with_suffix(""))
        return token

    def caller(self, token: str) -> str | None:
        """The lineage whose key the login was made with; None if there is no such login."""
        if not _TOKEN.fullmatch(token):
            return None
        file = self._folder / _name(token)
        try:
            entry = json_object(file.read_bytes()) or {}
        except OSError:
            return None
        caller, key = entry.get("caller"), self._key_of(entry.get("caller"))
        proven = key is not None and hmac.compare_digest(
            str(entry.get("proof")).encode(errors="replace"), _mac(token, key).encode()
        )
        until = entry.get("until")
        if not proven or not isinstance(until, float) or self._clock() >= until:
            file.unlink(missing_ok=True)
            return None
        return caller

    def end(self, token: str) -> None:
        """Ends a login."""
        if _TOKEN.fullmatch(token):
            (self._folder / _name(token)).unlink(missing_ok=True)

    def _key_of(self, lineage: object) -> str | None:
        if lineage == MAIN_LINEAGE:
            return self._lineages.main_key
        access = self._lineages.access.get(str(lineage))
        return None if access is None else access.key

    def _make_room(self) -> None:
        ages: list[tuple[float, Path]] = []
        for file in self._folder.iterdir():
            with suppress(OSError):  # another worker may have removed it
                ages.append((file.stat().st_mtime, file))
        for _, file in sorted(ages)[: max(len(ages) - MOST_LOGINS + 1, 0)]:
            file.unlink(missing_ok=True)


class Tries:
    """How often each address may still send a wrong key: a bucket that refills."""

    AT_ONCE, REFILL_S, MOST_ADDRESSES = 5, 10.0, 1024

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}
        """(what was left, when), by address; the one that failed longest ago comes first."""

    def wait_s(self, address: str) -> int:
        """0 if the address may send a key now; else the seconds to wait."""
        left = self._now(address)
        return 0 if left >= 1 else math.ceil((1 - left) * self.REFILL_S)

    def failed(self, address: str) -> None:
        """Counts a wrong key."""
        left = self._now(address)
        self._left.pop(address, None)
        self._left[address] = left - 1, self._clock()
        if len(self._left) > self.MOST_ADDRESSES:
            del self._left[next(iter(self._left))]

    def _now(self, address: str) -> float:
        left, since = self._left.get(address, (float(self.AT_ONCE), 0.0))
        return min(self.AT_ONCE, left + (self._clock() - since) / self.REFILL_S)


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
