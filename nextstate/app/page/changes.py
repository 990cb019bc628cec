"""What the page's forms change. Each form comes from a page that says what will happen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from nextstate.app.page import forgetting
from nextstate.app.page.screens import Screens
from nextstate.app.page.visits import Visit
from nextstate.app.settings import Settings
from nextstate.errors import NoTurnError, RecordError
from nextstate.records import Feedback, PolicyVersion
from nextstate.redaction import Redactor
from nextstate.store import Store
from nextstate.store.shares import OWNER
from proxy.allowance import Allowance
from proxy.answers import Refused

Rollback = Callable[[PolicyVersion], Awaitable[None]]
AT_THE_PAGE = "somebody at the web page"


class Done(NamedTuple):
    """What was done, in words, and where to go on."""

    text: str
    back: str


class Changes:
    """The forms of one proxy's page. Each raises Refused."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        screens: Screens,
        rollback: Rollback,
        allowance: Allowance,
        redactor: Redactor,
    ) -> None:
        self._settings = settings
        self._store = store
        self._redactor = redactor
        self._screens = screens
        self._rollback = rollback
        self._allowance = allowance

    async def feedback(self, visit: Visit) -> Done:
        turn = await asyncio.to_thread(self._screens.turn_of, visit)
        hint = visit.form.get("hint", "").replace("\r\n", "\n").strip() or None
        score = {"1": 1, "0": 0, "-1": -1}.get(visit.form.get("score", ""))
        if score is None:
            raise Refused(400, "Choose good, neither or bad.")
        if wait_s := self._allowance.wait_s(visit.visitor.who):
            raise Refused(429, f"Too much feedback in a minute: wait {wait_s} seconds.")
        try:
            said = Feedback(turn.id, score, hint).without_secrets(self._redactor)
            found = await asyncio.to_thread(self._store.reviewing.give, said, OWNER)
        except (RecordError, NoTurnError) as error:
            raise Refused(400, f"Your feedback was not kept: {error}.") from error
        text = f"Kept: {score:+d}."
        if not found.applied:
            text += f" It is a label for the judge, but it does not train: {found.reason}."
        return Done(text, f"/page/turns/{turn.id}")

    async def forget_turn(self, visit: Visit) -> Done:
        await asyncio.to_thread(self._screens.forget_turn, visit)  # may it?
        told = await forgetting.run(self._settings, [visit.names[0]], AT_THE_PAGE)
        return Done(told, "/page/turns")

    async def forget_session(self, visit: Visit) -> Done:
        await asyncio.to_thread(self._screens.forget_session, visit)
        ids = await asyncio.to_thread(self._screens.turns_of, visit)
        return Done(await forgetting.run(self._settings, ids, AT_THE_PAGE), "/page/sessions")

    async def rollback(self, visit: Visit) -> Done:
        version = await asyncio.to_thread(self._screens.version_of, visit)
        if not version.can_serve:
            raise Refused(409, f"Version {version.number} has no adapter and cannot serve.")
        await self._rollback(version)
        text = f"Version {version.number} serves {version.lineage} now."
        return Done(text, f"/page/versions?lineage={version.lineage}")

    async def pause(self, visit: Visit) -> Done:
        lineage = visit.seen(visit.names[0])
        await asyncio.to_thread(self._store.versions.pause, lineage, AT_THE_PAGE)
        text = f"{lineage} takes no batch any more. An update that is under way ends as it would."
        return Done(text, f"/?lineage={lineage}")

    async def resume(self, visit: Visit) -> Done:
        lineage = visit.seen(visit.names[0])
        await asyncio.to_thread(self._store.versions.resume, lineage, AT_THE_PAGE)
        return Done(f"{lineage} trains again once the learner looks.", f"/?lineage={lineage}")
