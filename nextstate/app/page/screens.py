"""What each address of the page shows. Every screen runs in a thread, as the store needs."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

from aiohttp import web

from nextstate.app.finding import newest, newest_sessions
from nextstate.app.page import episodes, exporting, forgetting, running, turns
from nextstate.app.page.home import home, why_paused
from nextstate.app.page.templating import Renderer
from nextstate.app.page.texts import visible
from nextstate.app.page.visits import Visit
from nextstate.app.settings import Settings
from nextstate.app.watching import version_watch, watch_text
from nextstate.episodes import Episode
from nextstate.errors import NoTurnError
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import Json, PolicyVersion, Turn
from nextstate.store import Store
from nextstate.store import episodes as stored_episodes
from nextstate.store.lookup import Choice
from proxy.answers import Refused

LOOKED_THROUGH = 1000
"""Turns that one page of a list looks through for those that a filter wants."""
_ON_PAGE, _VERSIONS_ON_PAGE, _TRAINED_SHOWN = 25, 50, 100
Shown = str | web.Response


class Screens:
    """The screens of one proxy's page. Each takes a visit and raises Refused."""

    def __init__(
        self, settings: Settings, store: Store, health: Callable[[], Json], renderer: Renderer
    ) -> None:
        self._settings = settings
        self._store = store
        self._health = health
        self._page = renderer.page
        self._profile: AgentProfile = load_plugin("agents", settings.agents.profile, None)

    def home(self, visit: Visit) -> Shown:
        found = home(self._settings, self._store, self._health(), visit.lineage())
        return self._page("home.html", visit, **found)

    def turns(self, visit: Visit) -> Shown:
        session = visit.text("session")
        wanted = Choice(
            sessions=(session,) if session else (),
            lineages=(visit.lineage(),) if visit.text("lineage") else visit.visitor.sees,
            version=visit.number("version"),
            untrained=visit.query.get("untrained") == "1",
        )
        before = visit.id("before")
        try:
            found = newest(self._store, wanted, _ON_PAGE, before, most=LOOKED_THROUGH)
        except NoTurnError as error:
            raise Refused(404, "The turn before which the list goes on is not known.") from error
        return self._page(
            "turns.html",
            visit,
            lines=[turns.line(turn, self._profile) for turn in reversed(found.turns)],
            lineage=visit.text("lineage"),
            session=session,
            wanted=wanted,
            older=found.before,
            before=before,
            looked=LOOKED_THROUGH,
        )

    def turn(self, visit: Visit) -> Shown:
        found = turns.whole(self._store, self.turn_of(visit), visit.number("before"))
        return self._page("turn.html", visit, **found)

    def text(self, visit: Visit) -> Shown:
        whole = turns.text_named(self._store, self.turn_of(visit), visit.names[1])
        if whole is None:
            raise Refused(404, "This turn has no such text.")
        return web.Response(text=visible(whole), content_type="text/plain", charset="utf-8")

    def sessions(self, visit: Visit) -> Shown:
        choice = Choice(lineages=visit.visitor.sees)
        before = visit.number("before")
        found = newest_sessions(self._store, choice, _ON_PAGE, LOOKED_THROUGH, before)
        return self._page(
            "sessions.html",
            visit,
            sessions=found.sessions[::-1],
            before=before,
            older=found.before,
            looked=LOOKED_THROUGH,
        )

    def session(self, visit: Visit) -> Shown:
        name, before = visit.text("name"), visit.id("before")
        choice = Choice(sessions=(name,), lineages=visit.visitor.sees)
        summary = self._store.lookup.session(name, visit.visitor.sees)
        if summary is None:
            raise Refused(404, f"There is no session {name[:80]!r}.")
        try:
            found = newest(self._store, choice, _ON_PAGE, before, most=LOOKED_THROUGH)
        except NoTurnError as error:
            raise Refused(404, "The turn before which the session goes on is not known.") from error
        return self._page(
            "session.html",
            visit,
            session=summary,
            lines=[turns.spoken(turn, self._profile) for turn in found.turns],
            older=found.before,
            before=before,
        )

    def episodes(self, visit: Visit) -> Shown:
        outcome = visit.query.get("outcome") or None
        if outcome not in (None, "solved", "failed", "none"):
            raise Refused(400, f"outcome = {outcome[:40]!r}: expected solved, failed or none.")
        before = visit.id("before")
        if before is not None:
            self._episode_named(visit, before)
        environment = visit.text("environment")
        choice = stored_episodes.Choice(
            lineages=visit.visitor.sees, environment=environment or None, outcome=outcome
        )
        ids = self._store.episodes.ids(choice, before, _ON_PAGE + 1)
        shown = ids[-_ON_PAGE:]
        return self._page(
            "episodes.html",
            visit,
            episodes=self._store.episodes.get_all(shown)[::-1],
            environment=environment,
            outcome=outcome or "",
            before=before,
            older=shown[0] if len(shown) < len(ids) else None,
        )

    def episode(self, visit: Visit) -> Shown:
        episode = self._episode_named(visit, visit.names[0])
        start = visit.number("from") or 0
        found = episodes.whole(self._store, episode, start, self._profile)
        return self._page("episode.html", visit, **found)

    def picture(self, visit: Visit) -> Shown:
        episode = self._episode_named(visit, visit.names[0])
        found = episodes.picture(self._store.dir, episode.id, int(visit.names[1]))
        if found is None:
            raise Refused(404, "This step has no picture.")
        return web.Response(body=found[0], content_type=found[1])

    def forget_turn(self, visit: Visit) -> Shown:
        turn = self.turn_of(visit)
        return self._forget(visit, [turn.id], turn.id, f"/page/turns/{turn.id}", session=False)

    def forget_session(self, visit: Visit) -> Shown:
        name = visit.text("name")
        back = f"/page/session?name={quote(name)}"
        return self._forget(visit, self.turns_of(visit), name, back, session=True)

    def versions(self, visit: Visit) -> Shown:
        lineage = visit.lineage()
        before = visit.number("before")
        if before is None:
            found = self._store.versions.newest(lineage, _VERSIONS_ON_PAGE)[::-1]
        else:
            numbers = range(before - 1, max(before - 1 - _VERSIONS_ON_PAGE, -1), -1)
            each = (self._store.versions.get(lineage, number) for number in numbers)
            found = [version for version in each if version is not None]
        older = found[-1].number if found and found[-1].number > 0 else None
        return self._page(
            "versions.html",
            visit,
            lineage=lineage,
            versions=found,
            before=before,
            older=older,
            serving=self._store.versions.serving(lineage).number,
            made_at=self._store.versions.made_at(lineage, [v.number for v in found]),
            paused=why_paused(self._store, lineage),
        )

    def version(self, visit: Visit) -> Shown:
        version = self.version_of(visit)
        used = self._store.versions.used_turns(version.lineage, version.number)
        return self._page(
            "version.html",
            visit,
            version=version,
            serving=self._store.versions.serving(version.lineage).number,
            made_at=self._store.versions.made_at(version.lineage, [version.number]),
            watch=watch_text(version_watch(self._store, version, self._settings.learner.watch)),
            trained=used[:_TRAINED_SHOWN],
            more=max(len(used) - _TRAINED_SHOWN, 0),
        )

    def rollback(self, visit: Visit) -> Shown:
        version = self.version_of(visit)
        serving = self._store.versions.serving(version.lineage).number
        return self._page("rollback.html", visit, version=version, serving=serving)

    def pause(self, visit: Visit) -> Shown:
        return self._decision("pause.html", visit)

    def resume(self, visit: Visit) -> Shown:
        return self._decision("resume.html", visit)

    def running(self, visit: Visit) -> Shown:
        lineage = visit.lineage()
        found = running.running(self._settings, self._store, self._health(), lineage)
        return self._page("running.html", visit, **found)

    def export(self, visit: Visit) -> Shown:
        found = exporting.shown(
            self._settings,
            self._store,
            visit.lineage(),
            visit.query.get("what"),
            visit.query.get("form"),
        )
        return self._page("export.html", visit, **found)

    def turn_of(self, visit: Visit) -> Turn:
        """The turn that the path names."""
        name = visit.names[0]
        if self._store.turns.lineage(name) in visit.visitor.sees:
            turn = self._store.turns.get(name)
            if turn is not None:
                return turn
        raise Refused(404, f"There is no turn {name!r}.")

    def turns_of(self, visit: Visit) -> list[str]:
        """The turns of the session that the query names."""
        name = visit.text("name")
        most = forgetting.MOST + 1
        found = self._store.turns.of_session(name, visit.visitor.sees, most)
        if not found:
            raise Refused(404, f"There is no session {name[:80]!r}.")
        return found

    def version_of(self, visit: Visit) -> PolicyVersion:
        """The version that the path names."""
        lineage, number = visit.names
        found = self._store.versions.get(visit.seen(lineage), int(number))
        if found is None:
            raise Refused(404, f"Lineage {lineage} has no version {number}.")
        return found

    def _episode_named(self, visit: Visit, name: str) -> Episode:
        found = self._store.episodes.get(name)
        if found is None or found.lineage not in visit.visitor.sees:
            raise Refused(404, f"There is no episode {name!r}.")
        return found

    def _forget(self, visit: Visit, ids: list[str], what: str, back: str, *, session: bool) -> str:
        found = forgetting.plan(self._store, ids, visit.visitor.sees, self._profile)
        return self._page("forget.html", visit, what=what, back=back, session=session, **found)

    def _decision(self, template: str, visit: Visit) -> str:
        lineage = visit.seen(visit.names[0])
        paused = why_paused(self._store, lineage)
        return self._page(template, visit, lineage=lineage, paused=paused)
