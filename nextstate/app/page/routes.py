"""The web page's routes: who may see it, which address shows what, and what its forms change."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from urllib.parse import parse_qs

from aiohttp import web

from nextstate.app.page.changes import Changes, Done, Rollback
from nextstate.app.page.exporting import Downloads
from nextstate.app.page.live import Streams, watched
from nextstate.app.page.logins import (
    LASTS_S,
    Logins,
    foreign_form,
    is_ours,
    is_token,
    new_cookie,
)
from nextstate.app.page.screens import Screens, Shown
from nextstate.app.page.templating import Renderer
from nextstate.app.page.visits import Visit, Visitor
from nextstate.app.settings import Settings
from nextstate.errors import NextStateError, WaitError
from nextstate.keys import Scope, hashed
from nextstate.records import Json
from nextstate.store import Store
from proxy.allowance import Allowance
from proxy.answers import Refused
from proxy.bodies import read_any_body, refuse_coded
from proxy.browsers import foreign
from proxy.keys import ANYBODY, Grant, Keys
from proxy.scopes import needed
from proxy.tries import Tries

log = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; "
        "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: a browser would send its forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_STATIC = {
    "/page/style.css": "text/css",
    "/page/icon.svg": "image/svg+xml",
    "/page/htmx/htmx.min.js": "text/javascript",
    "/page/htmx/hx-sse.min.js": "text/javascript",
}
_EVENTS, _EXPORT = "/page/events", "/page/export"
_WRONG_KEY = "This is not the proxy's key, or it may not look at the page."
_MOST_FIELDS, _MOST_FORM_BYTES = 16, 1 << 16
_TURN = r"/page/turns/([\w.-]{1,40})"
_EPISODE = r"/page/episodes/([A-Za-z0-9][\w.:~+-]{0,99})"
_VERSION = r"/page/versions/([a-z0-9_-]{1,40})/([0-9]{1,9})"
_LINEAGE = r"/page/lineages/([a-z0-9_-]{1,40})"
_SHOWN: tuple[tuple[re.Pattern[str], Callable[[Screens, Visit], Shown]], ...] = tuple(
    (re.compile(path), screen)
    for path, screen in (
        (r"/|/page", Screens.home),
        (r"/page/turns", Screens.turns),
        (_TURN, Screens.turn),
        (_TURN + r"/forget", Screens.forget_turn),
        (_TURN + r"/text/(reply|[ms][0-9]{1,6})", Screens.text),
        (r"/page/sessions", Screens.sessions),
        (r"/page/session", Screens.session),
        (r"/page/session/forget", Screens.forget_session),
        (r"/page/episodes", Screens.episodes),
        (_EPISODE, Screens.episode),
        (_EPISODE + r"/pictures/([0-9]{1,9})", Screens.picture),
        (r"/page/versions", Screens.versions),
        (_VERSION, Screens.version),
        (_VERSION + r"/rollback", Screens.rollback),
        (_LINEAGE + r"/pause", Screens.pause),
        (_LINEAGE + r"/resume", Screens.resume),
        (r"/page/running", Screens.running),
        (_EXPORT, Screens.export),
    )
)
_CHANGED: tuple[tuple[re.Pattern[str], Callable[[Changes, Visit], Awaitable[Done]]], ...] = tuple(
    (re.compile(path), change)
    for path, change in (
        (_TURN + r"/feedback", Changes.feedback),
        (_TURN + r"/forget", Changes.forget_turn),
        (r"/page/session/forget", Changes.forget_session),
        (_VERSION + r"/rollback", Changes.rollback),
        (_LINEAGE + r"/pause", Changes.pause),
        (_LINEAGE + r"/resume", Changes.resume),
    )
)


class Page:
    """The pages of a running proxy."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        keys: Keys,
        rollback: Rollback,
        health: Callable[[], Json],
        allowance: Allowance,
        tries: Tries,
        requests: Allowance,
    ) -> None:
        """`allowance` is that of feedback, `requests` that of all requests of a key."""
        self._host = settings.proxy.host
        self._keys = keys
        self._tries = tries
        self._requests = requests
        self._renderer = Renderer()
        self._screens = Screens(settings, store, health, self._renderer)
        redactor = settings.privacy.redactor
        self._changes = Changes(settings, store, self._screens, rollback, allowance, redactor)
        self._streams = Streams(lambda: watched(store, health))
        self._downloads = Downloads(settings, store)
        self._logins = Logins(settings.store.path / "logins", keys)
        # Browsers send a cookie to every port of a host.
        self._cookie = f"nextstate-{settings.proxy.port}"
        folder = files("nextstate.app.page") / "static"
        self._static = {path: (folder / path[6:]).read_bytes() for path in _STATIC}

    def serves(self, path: str) -> bool:
        """Whether a path is the page's."""
        return path in ("/", "/page") or path.startswith("/page/")

    async def close(self) -> None:
        """Ends the streams of pages that update themselves."""
        await self._streams.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers any request for the page, an error as a page too."""
        try:
            response = await self._answer(request)
        except Refused as error:
            response = self._error(error.status, error.message)
            if error.wait_s is not None:
                response.headers["Retry-After"] = str(error.wait_s)
        except WaitError as error:
            log.warning("a page could not be shown: %s", error)
            response = self._error(503, "The store is busy or full: try again in a moment.")
        except (NextStateError, OSError) as error:
            log.warning("a page could not be shown: %s", error)
            response = self._error(500, f"This page cannot be shown: {error}")
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path, method = request.path, request.method
        if method not in ("GET", "HEAD", "POST"):
            raise Refused(405, f"{path} takes GET or POST, not {method[:20]}.")
        why = None if self._logins.needed else foreign(request.headers, self._host)
        if why is not None:
            raise Refused(403, why)
        if method == "POST" and (why := foreign_form(request)) is not None:
            raise Refused(403, f"{why}.")
        if path in _STATIC and method != "POST":
            return web.Response(body=self._static[path], content_type=_STATIC[path])
        form = await _form(request) if method == "POST" else {}
        if path == "/page/login":
            return await self._login(request, form)
        visitor = await self._visitor(request)
        if visitor is None:
            if method == "POST" or path == _EVENTS:
                raise Refused(403, "You are logged out: log in and try again.")
            return _redirect("/page/login")
        if needed(method, path) is Scope.ADMIN and not visitor.may_change:
            raise Refused(403, "This key may look at the page only: log in with one that may more.")
        if path == _EVENTS and method == "GET":
            return await self._streams.stream(request, HEADERS)
        if method != "POST":
            return await self._show(request, visitor)
        if not is_ours(visitor.cookie, form.get("token", "")):
            raise Refused(403, "This form is too old: go back, load its page again and resend it.")
        if path == _EXPORT:
            visit = Visit(visitor, request.path_qs, (), request.query, form)
            return await self._downloads.send(request, visit, HEADERS)
        return await self._change(request, visitor, form)

    async def _visitor(self, request: web.Request) -> Visitor | None:
        """Who asks; None without the login that is needed."""
        cookie = request.cookies.get(self._cookie, "")
        grant = await asyncio.to_thread(self._logins.caller, cookie)
        logged_in = grant is not None
        if grant is None:
            if self._logins.needed:
                return None
            grant = ANYBODY
            if not is_token(cookie):
                cookie = new_cookie()
        self._count(grant)
        known, lineage = self._keys.lineages, grant.lineage
        sees = tuple(name for name in known.names if known.sees(lineage, name))
        return Visitor(lineage, sees, cookie, logged_in, grant.may(Scope.ADMIN), grant.who)

    def _count(self, grant: Grant) -> None:
        """Counts a request of a key, with those that it sends to the API. Raises Refused."""
        if grant.limited and (wait_s := self._requests.wait_s(grant.who)):
            message = f"Too many requests came with this key: wait {wait_s} seconds."
            raise Refused(429, message, wait_s=wait_s)

    async def _login(self, request: web.Request, form: Json) -> web.Response:
        if request.method != "POST":
            return web.Response(
                text=self._renderer.render("login.html", wrong=None), content_type="text/html"
            )
        address, key = request.remote or "", form.get("key", "")
        grant = self._keys.find(hashed(key))
        drawn = grant is not None and not grant.chosen
        if not drawn and (wait_s := self._tries.wait_s(address, hashed(key))):
            text = f"Too many wrong keys: wait {wait_s} seconds and try again."
            page = self._renderer.render("login.html", wrong=text)
            headers = {"Retry-After": str(wait_s)}
            return web.Response(text=page, content_type="text/html", status=429, headers=headers)
        if grant is not None:
            self._count(grant)
        token = await asyncio.to_thread(self._logins.begin, key)
        if token is None:
            self._tries.failed(address, hashed(key))
            page = self._renderer.render("login.html", wrong=_WRONG_KEY)
            return web.Response(text=page, content_type="text/html", status=403)
        response = _redirect("/")
        self._set_cookie(request, response, token, LASTS_S)
        return response

    async def _show(self, request: web.Request, visitor: Visitor) -> web.Response:
        path = request.path.rstrip("/") or "/"
        for pattern, screen in _SHOWN:
            if found := pattern.fullmatch(path):
                visit = Visit(visitor, request.path_qs, found.groups(), request.query)
                shown = await asyncio.to_thread(screen, self._screens, visit)
                break
        else:
            raise Refused(404, "There is no such page.")
        if not isinstance(shown, str):
            return shown
        response = web.Response(text=shown, content_type="text/html")
        if visitor.cookie != request.cookies.get(self._cookie):
            self._set_cookie(request, response, visitor.cookie, None)
        return response

    async def _change(
        self, request: web.Request, visitor: Visitor, form: Mapping[str, str]
    ) -> web.Response:
        if request.path == "/page/logout":
            await asyncio.to_thread(self._logins.end, visitor.cookie)
            response = _redirect("/page/login" if self._logins.needed else "/")
            response.del_cookie(self._cookie)
            return response
        for pattern, change in _CHANGED:
            if found := pattern.fullmatch(request.path):
                visit = Visit(visitor, request.path_qs, found.groups(), request.query, form)
                done = await change(self._changes, visit)
                page = self._renderer.page("done.html", visit, text=done.text, back=done.back)
                return web.Response(text=page, content_type="text/html")
        raise Refused(404, "There is no such form.")

    def _set_cookie(
        self, request: web.Request, response: web.Response, value: str, lasts_s: float | None
    ) -> None:
        response.set_cookie(
            self._cookie,
            value,
            max_age=None if lasts_s is None else int(lasts_s),
            httponly=True,
            samesite="Strict",
            secure=request.secure or None,
        )

    def _error(self, status: int, message: str) -> web.Response:
        page = self._renderer.render("error.html", status=status, message=message)
        return web.Response(text=page, content_type="text/html", status=status)


async def _form(request: web.Request) -> dict[str, str]:
    """The fields of a form. Raises Refused."""
    if request.content_type != "application/x-www-form-urlencoded":
        raise Refused(415, "A form is application/x-www-form-urlencoded.")
    refuse_coded(request)
    if (request.content_length or 0) > _MOST_FORM_BYTES:
        raise Refused(413, f"A form has at most {_MOST_FORM_BYTES} bytes.")
    data = await read_any_body(request, 1)
    try:
        found = parse_qs(data.decode(), max_num_fields=_MOST_FIELDS)
    except ValueError as error:
        raise Refused(400, "The form cannot be read: send few fields in UTF-8.") from error
    return {name: values[-1] for name, values in found.items()}


def _redirect(to: str) -> web.Response:
    return web.Response(status=303, headers={"Location": to})
