"""The web page's routes: which path shows what, who may see it, and what its forms change."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from urllib.parse import parse_qs

import jinja2
from aiohttp import web

from nextstate.app.finding import newest
from nextstate.app.page import turns
from nextstate.app.page.charts import score_text
from nextstate.app.page.home import home, why_paused
from nextstate.app.page.logins import (
    LASTS_S,
    Logins,
    Tries,
    foreign_form,
    form_token,
    is_ours,
    is_token,
    new_cookie,
)
from nextstate.app.page.texts import visible
from nextstate.app.settings import Settings
from nextstate.app.watching import version_watch, watch_text
from nextstate.errors import NextStateError, NoTurnError, RecordError, WaitError
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import MAIN_LINEAGE, Feedback, Json, PolicyVersion, Turn
from nextstate.store import Store
from nextstate.store.lookup import Choice
from proxy.answers import Refused
from proxy.bodies import read_any_body, refuse_coded
from proxy.browsers import foreign
from proxy.feedback import Allowance
from proxy.lineages import Lineages

log = logging.getLogger(__name__)

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: a browser would send its forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_STATIC = {"/page/style.css": "text/css", "/page/icon.svg": "image/svg+xml"}
_TURNS_SHOWN, _VERSIONS_SHOWN, _TRAINED_SHOWN = 25, 50, 100
_LOOKED_THROUGH = 1000
"""Turns that one page of the list looks through for those that a filter wants."""
_MOST_FIELDS, _MOST_FORM_BYTES = 16, 1 << 16
_NUMBER = re.compile(r"[0-9]{1,12}")
_ID = re.compile(r"[\w.-]{1,40}")
_TURN = re.compile(r"/page/turns/([\w.-]{1,40})")
_TEXT = re.compile(r"/page/turns/([\w.-]{1,40})/text/(reply|[ms][0-9]{1,6})")
_VERSION = re.compile(r"/page/versions/([a-z0-9_-]{1,40})/([0-9]{1,9})(/rollback)?")
_RESUME = re.compile(r"/page/lineages/([a-z0-9_-]{1,40})/resume")
Rollback = Callable[[PolicyVersion], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks for a page."""

    lineage: str
    """Whose key it is."""
    sees: tuple[str, ...]
    """The lineages that it may look at and change."""
    cookie: str
    logged_in: bool


class Page:
    """The pages of a running proxy."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        lineages: Lineages,
        rollback: Rollback,
        health: Callable[[], Json],
        allowance: Allowance,
    ) -> None:
        self._settings = settings
        self._store = store
        self._lineages = lineages
        self._rollback = rollback
        self._health = health
        self._allowance = allowance
        self._profile: AgentProfile = load_plugin("agents", settings.agents.profile, None)
        self._logins = Logins(settings.store.path / "logins", lineages)
        self._tries = Tries()
        # Browsers send a cookie to every port of a host.
        self._cookie = f"nextstate-{settings.proxy.port}"
        self._templates = _templates()
        folder = files("nextstate.app.page") / "static"
        self._static = {path: (folder / path[6:]).read_bytes() for path in _STATIC}

    def serves(self, path: str) -> bool:
        """Whether a path is the page's."""
        return path in ("/", "/page") or path.startswith("/page/")

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers any request for the page, an error as a page too."""
        try:
            response = await self._answer(request)
        except Refused as error:
            response = self._error(error.status, error.message)
        except WaitError as error:
            log.warning("a page could not be shown: %s", error)
            response = self._error(503, "The store is busy or full: try again in a moment.")
        except (NextStateError, OSError) as error:
            log.warning("a page could not be shown: %s", error)
            response = self._error(500, f"This page cannot be shown: {error}")
        response.headers.update(_HEADERS)
        return response

    async def _answer(self, request: web.Request) -> web.Response:
        path, method = request.path, request.method
        if method not in ("GET", "HEAD", "POST"):
            raise Refused(405, f"{path} takes GET or POST, not {method[:20]}.")
        why = None if self._logins.needed else foreign(request.headers, self._settings.proxy.host)
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
            if method == "POST":
                raise Refused(403, "You are logged out: log in and try again.")
            return _redirect("/page/login")
        if method != "POST":
            return await self._show(request, visitor)
        if not is_ours(visitor.cookie, form.get("token", "")):
            raise Refused(403, "This form is too old: go back, load its page again and resend it.")
        return await self._change(request, visitor, form)

    async def _visitor(self, request: web.Request) -> Visitor | None:
        """Who asks; None without the login that is needed."""
        cookie = request.cookies.get(self._cookie, "")
        lineage = await asyncio.to_thread(self._logins.caller, cookie)
        logged_in = lineage is not None
        if lineage is None:
            if self._logins.needed:
                return None
            lineage = MAIN_LINEAGE
            if not is_token(cookie):
                cookie = new_cookie()
        sees = tuple(name for name in self._lineages.names if self._lineages.sees(lineage, name))
        return Visitor(lineage, sees, cookie, logged_in)

    async def _login(self, request: web.Request, form: Json) -> web.Response:
        if request.method != "POST":
            return web.Response(text=self._page("login.html", wrong=None), content_type="text/html")
        address = request.remote or ""
        if wait_s := self._tries.wait_s(address):
            text = f"Too many wrong keys: wait {wait_s} seconds and try again."
            page = self._page("login.html", wrong=text)
            headers = {"Retry-After": str(wait_s)}
            return web.Response(text=page, content_type="text/html", status=429, headers=headers)
        token = await asyncio.to_thread(self._logins.begin, form.get("key", ""))
        if token is None:
            self._tries.failed(address)
            page = self._page("login.html", wrong="This is not the proxy's key.")
            return web.Response(text=page, content_type="text/html", status=403)
        response = _redirect("/")
        self._set_cookie(request, response, token, LASTS_S)
        return response

    async def _show(self, request: web.Request, visitor: Visitor) -> web.Response:
        path = request.path.rstrip("/") or "/"
        text: str | None = None
        if found := _TEXT.fullmatch(path):
            turn = await asyncio.to_thread(self._turn, visitor, found[1])
            whole = await asyncio.to_thread(turns.text_named, self._store, turn, found[2])
            if whole is None:
                raise Refused(404, "This turn has no such text.")
            return web.Response(text=visible(whole), content_type="text/plain", charset="utf-8")
        if path in ("/", "/page"):
            text = await asyncio.to_thread(self._home, request, visitor)
        elif path == "/page/turns":
            text = await asyncio.to_thread(self._turns, request, visitor)
        elif found := _TURN.fullmatch(path):
            text = await asyncio.to_thread(self._whole_turn, request, visitor, found[1])
        elif path == "/page/versions":
            text = await asyncio.to_thread(self._versions, request, visitor)
        elif found := _VERSION.fullmatch(path):
            name = "rollback.html" if found[3] else "version.html"
            text = await asyncio.to_thread(self._version, visitor, found[1], found[2], name)
        elif found := _RESUME.fullmatch(path):
            paused = await asyncio.to_thread(why_paused, self._store, _seen(visitor, found[1]))
            text = self._page("resume.html", visitor, lineage=found[1], paused=paused)
        if text is None:
            raise Refused(404, "There is no such page.")
        response = web.Response(text=text, content_type="text/html")
        if visitor.cookie != request.cookies.get(self._cookie):
            self._set_cookie(request, response, visitor.cookie, None)
        return response

    async def _change(self, request: web.Request, visitor: Visitor, form: Json) -> web.Response:
        path = request.path
        if path == "/page/logout":
            await asyncio.to_thread(self._logins.end, visitor.cookie)
            response = _redirect("/page/login" if self._logins.needed else "/")
            response.del_cookie(self._cookie)
            return response
        if path.endswith("/feedback") and (found := _TURN.fullmatch(path[: -len("/feedback")])):
            return await self._feedback(visitor, found[1], form)
        if (found := _VERSION.fullmatch(path)) and found[3]:
            version = await asyncio.to_thread(self._version_of, visitor, found[1], found[2])
            if not version.can_serve:
                raise Refused(409, f"Version {version.number} has no adapter and cannot serve.")
            await self._rollback(version)
            text = f"Version {version.number} serves {version.lineage} now."
            return self._done(visitor, text, "/page/versions")
        if found := _RESUME.fullmatch(path):
            lineage = _seen(visitor, found[1])
            await asyncio.to_thread(self._store.versions.resume, lineage)
            return self._done(visitor, f"{lineage} trains again once the learner looks.", "/")
        raise Refused(404, "There is no such form.")

    async def _feedback(self, visitor: Visitor, turn_id: str, form: Json) -> web.Response:
        turn = await asyncio.to_thread(self._turn, visitor, turn_id)
        hint = form.get("hint", "").replace("\r\n", "\n").strip() or None
        score = {"1": 1, "0": 0, "-1": -1}.get(form.get("score", ""))
        if score is None:
            raise Refused(400, "Choose good, neither or bad.")
        if wait_s := self._allowance.wait_s(visitor.lineage):
            raise Refused(429, f"Too much feedback in a minute: wait {wait_s} seconds.")
        try:
            said = Feedback(turn.id, score, hint)
            found = await asyncio.to_thread(self._store.judging.give_feedback, said)
        except (RecordError, NoTurnError) as error:
            raise Refused(400, f"Your feedback was not kept: {error}.") from error
        text = f"Kept: {score:+d}."
        if not found.applied:
            text += f" It is a label for the judge, but it does not train: {found.reason}."
        return self._done(visitor, text, f"/page/turns/{turn.id}")

    def _home(self, request: web.Request, visitor: Visitor) -> str:
        lineage = _seen(visitor, request.query.get("lineage") or visitor.sees[0])
        found = home(self._settings, self._store, self._health(), lineage)
        return self._page("home.html", visitor, **found)

    def _turns(self, request: web.Request, visitor: Visitor) -> str:
        session = request.query.get("session", "")[:200]
        wanted = Choice(
            sessions=(session,) if session else (),
            lineages=visitor.sees,
            version=_number(request, "version"),
            untrained=request.query.get("untrained") == "1",
        )
        before = request.query.get("before") or None
        if before is not None and not _ID.fullmatch(before):
            raise Refused(400, f"before = {before[:40]!r}: expected the id of a turn.")
        try:
            found = newest(self._store, wanted, _TURNS_SHOWN, before, most=_LOOKED_THROUGH)
        except NoTurnError as error:
            raise Refused(404, "The turn before which the list goes on is not known.") from error
        return self._page(
            "turns.html",
            visitor,
            lines=[turns.line(turn, self._profile) for turn in reversed(found.turns)],
            session=session,
            wanted=wanted,
            older=found.before,
            before=before,
            looked=_LOOKED_THROUGH,
        )

    def _whole_turn(self, request: web.Request, visitor: Visitor, turn_id: str) -> str:
        turn = self._turn(visitor, turn_id)
        found = turns.whole(self._store, turn, _number(request, "before"))
        return self._page("turn.html", visitor, **found)

    def _versions(self, request: web.Request, visitor: Visitor) -> str:
        lineage = _seen(visitor, request.query.get("lineage") or visitor.sees[0])
        before = _number(request, "before")
        if before is None:
            found = self._store.versions.newest(lineage, _VERSIONS_SHOWN)[::-1]
        else:
            numbers = range(before - 1, max(before - 1 - _VERSIONS_SHOWN, -1), -1)
            each = (self._store.versions.get(lineage, number) for number in numbers)
            found = [version for version in each if version is not None]
        older = found[-1].number if found and found[-1].number > 0 else None
        return self._page(
            "versions.html",
            visitor,
            lineage=lineage,
            versions=found,
            older=older,
            serving=self._store.versions.serving(lineage).number,
            made_at=self._store.versions.made_at(lineage, [v.number for v in found]),
            paused=why_paused(self._store, lineage),
        )

    def _version(self, visitor: Visitor, lineage: str, number: str, template: str) -> str:
        version = self._version_of(visitor, lineage, number)
        serving = self._store.versions.serving(lineage).number
        if template == "rollback.html":
            return self._page(template, visitor, version=version, serving=serving)
        used = self._store.versions.used_turns(lineage, version.number)
        return self._page(
            template,
            visitor,
            version=version,
            serving=serving,
            made_at=self._store.versions.made_at(lineage, [version.number]),
            watch=watch_text(version_watch(self._store, version)),
            trained=used[:_TRAINED_SHOWN],
            more=max(len(used) - _TRAINED_SHOWN, 0),
        )

    def _turn(self, visitor: Visitor, turn_id: str) -> Turn:
        if self._store.turns.lineage(turn_id) in visitor.sees:
            turn = self._store.turns.get(turn_id)
            if turn is not None:
                return turn
        raise Refused(404, f"There is no turn {turn_id!r}.")

    def _version_of(self, visitor: Visitor, lineage: str, number: str) -> PolicyVersion:
        found = self._store.versions.get(_seen(visitor, lineage), int(number))
        if found is None:
            raise Refused(404, f"Lineage {lineage} has no version {number}.")
        return found

    def _page(self, template: str, visitor: Visitor | None = None, **values: object) -> str:
        token = "" if visitor is None else form_token(visitor.cookie)
        shown = {"visitor": visitor, "token": token, **values}
        return self._templates.get_template(template).render(shown)

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

    def _done(self, visitor: Visitor, text: str, back: str) -> web.Response:
        page = self._page("done.html", visitor, text=text, back=back)
        return web.Response(text=page, content_type="text/html")

    def _error(self, status: int, message: str) -> web.Response:
        page = self._page("error.html", status=status, message=message)
        return web.Response(text=page, content_type="text/html", status=status)


def _templates() -> jinja2.Environment:
    """Everything that a template writes is escaped: nothing here is marked as safe."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("nextstate.app.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    found.filters |= {"visible": visible, "when": _when, "score_text": score_text}
    return found


def _when(unix_time: float) -> str:
    try:
        return f"{datetime.fromtimestamp(unix_time):%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


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


def _number(request: web.Request, name: str) -> int | None:
    """A number in the address. Raises Refused."""
    text = request.query.get(name, "")
    if not text:
        return None
    if not _NUMBER.fullmatch(text):
        raise Refused(400, f"{name} = {text[:40]!r}: expected a number.")
    return int(text)


def _seen(visitor: Visitor, lineage: str) -> str:
    if lineage not in visitor.sees:
        raise Refused(404, f"There is no lineage {lineage[:40]!r}.")
    return lineage


def _redirect(to: str) -> web.Response:
    return web.Response(status=303, headers={"Location": to})
