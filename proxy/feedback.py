"""`POST /v1/feedback`: what a client says about a turn is read, checked and stored."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, replace
from typing import cast

from aiohttp import web

from nextstate.config import nearest
from nextstate.errors import NoTurnError, RecordError, StoreError
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import Feedback, Json
from nextstate.redaction import NOTHING, Redactor
from nextstate.redaction.names import HiddenNames
from nextstate.store import Store
from nextstate.store.settling import Reception
from nextstate.wire import json_object
from proxy.allowance import Allowance
from proxy.answers import Refused
from proxy.bodies import read_body
from proxy.keys import GRANT
from proxy.lineages import CALLER, Lineages
from proxy.linking.names import session_names

log = logging.getLogger(__name__)

AT_ONCE = 60
"""How often a key may give feedback at once. A person clicks less often in a minute."""
A_MINUTE = 60.0
"""How often it may give more in each minute."""
_EXAMPLE = '{"turn_id": "turn_…", "score": -1, "hint": "Answer in one sentence."}'


class FeedbackRoute:
    """Serves `POST /v1/feedback`."""

    def __init__(
        self,
        store: Store,
        lineages: Lineages,
        profile: str,
        max_body_mb: int,
        redactor: Redactor = NOTHING,
    ) -> None:
        self._store = store
        self._redactor = redactor
        self._hide = HiddenNames(store.dir, redactor)
        self._lineages = lineages
        self._profile: AgentProfile = load_plugin("agents", profile, None)
        self._max_body_mb = max_body_mb
        self.allowance = Allowance(AT_ONCE, A_MINUTE)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Stores feedback and answers with what came of it. Raises Refused."""
        if request.content_type != "application/json":
            found = request.headers.get("Content-Type", "none")
            raise Refused(415, f"Content-Type: {found[:100]!r}: feedback is application/json.")
        try:
            said, session = read_feedback(await read_body(request, self._max_body_mb))
        except RecordError as error:
            raise Refused(400, f"Feedback: {error}.") from error
        if wait_s := self.allowance.wait_s(request[GRANT].who):
            message = f"This key gave feedback more than {A_MINUTE:g} times in a minute."
            raise Refused(429, message, wait_s=wait_s)
        try:
            reception = await asyncio.to_thread(self._store_it, said, session, request)
        except NoTurnError:  # it was forgotten at this moment
            reception = None
        except (StoreError, OSError) as error:
            log.warning("feedback on turn=%s could not be stored: %s", said.turn, error)
            raise Refused(503, "The store cannot be written now.") from error
        if reception is None:
            named = f"turn {said.turn!r}" if session is None else f"turn in {session!r}"
            raise Refused(404, f"There is no {named}.")
        return web.json_response(asdict(reception))

    def _store_it(
        self, said: Feedback, session: str | None, request: web.Request
    ) -> Reception | None:
        """What came of the feedback; None if the caller has no such turn."""
        caller = request[CALLER]
        theirs = [name for name in self._lineages.names if self._lineages.sees(caller, name)]
        if session is not None:
            turn = self._store.turns.newest(
                session_names(session, self._profile, self._hide), theirs
            )
        else:
            turn = said.turn if self._store.turns.lineage(said.turn) in theirs else None
        if turn is None:
            return None
        said = replace(said, turn=turn).without_secrets(self._redactor)
        return self._store.reviewing.give(said, request[GRANT].client)


_FIELDS = ("turn_id", "session_id", "score", "hint", "comment")


def read_feedback(data: bytes) -> tuple[Feedback, str | None]:
    """(feedback, session) in the body of a request. Raises RecordError that says what to change.

    Where it names a session, the feedback is on the newest main turn there, which is not known yet.
    """
    body = json_object(data)
    if body is None:
        raise RecordError(f"the body is not a JSON object: expected {_EXAMPLE}")
    for field in body:
        if field not in _FIELDS:
            raise RecordError(f"unknown field {field!r:.80}; {nearest(field, _FIELDS)}")
    if "score" not in body:
        raise RecordError(f"score is missing: expected {_EXAMPLE}")
    turn, session = _text(body, "turn_id"), _text(body, "session_id")
    if (turn is None) == (session is None):
        found = "neither is there" if turn is None else "both are there"
        raise RecordError(
            "expected either turn_id, from the reply's x-nextstate-turn header, or session_id, "
            f"for the newest turn of a session; {found}"
        )
    hint, comment = _text(body, "hint"), _text(body, "comment")
    return Feedback(turn or "", body["score"], hint, comment), session


def _text(body: Json, field: str) -> str | None:
    """A text; None for an absent, null or blank one."""
    value = cast(object, body.get(field))
    if value is not None and not isinstance(value, str):
        raise RecordError(f"{field} = {value!r:.80}: expected a text")
    return (value or "").strip() or None
