"""Finding turns for a command: the newest of some, all of some, or the one that a person means."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple

from nextstate.app.settings import Settings
from nextstate.app.terminal import columns
from nextstate.app.turn_views import contains, turn_line
from nextstate.errors import ConfigError, NoTurnError
from nextstate.hooks import load_plugin
from nextstate.redaction.names import HiddenNames
from nextstate.store import Store
from nextstate.store.lookup import PAGE, Choice, SessionSummary, TurnSummary
from proxy.linking.names import session_names

LOOKED_THROUGH = 10_000
"""The newest turns that are looked through for some of them, unless words are searched."""
_MOST_SHOWN = 8
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AGO = re.compile(r"([0-9]{1,6})([smhdw])")


class Newest(NamedTuple):
    """The newest chosen turns, oldest first."""

    turns: list[TurnSummary]
    before: str | None
    """The turn before which the search may go on; None if there are no others."""
    gave_up: bool
    """True if it ended before there were enough turns."""


def newest(
    store: Store,
    choice: Choice,
    limit: int,
    before: str | None = None,
    words: Sequence[str] = (),
    most: int = LOOKED_THROUGH,
) -> Newest:
    """Up to `limit` chosen turns, those recorded before `before` if given.

    About `most` turns are looked through. With `words` each of them is in a turn, and the whole
    store is looked through if need be, a page at a time. Raises NoTurnError.
    """
    at = None if before is None else _position(store, before)
    until = _first(store, choice, None if words else most)
    found: list[TurnSummary] = []
    looked_at = 0
    while True:
        wanted = PAGE if words else limit + 1 - len(found)
        page = store.lookup.page(choice, at, until=until, limit=wanted)
        found += [turn for turn in page.turns if contains(turn, words)] if words else page.turns
        if len(found) > limit:
            found = found[:limit]
            return Newest(found[::-1], found[-1].id, False)
        looked_at += page.looked_at
        at = page.next
        if at is None or (looked_at >= most and not words):
            return Newest(found[::-1], page.last, at is not None)


def every(
    store: Store, choice: Choice, before: str | None = None, words: Sequence[str] = ()
) -> Iterator[TurnSummary]:
    """All chosen turns, oldest first, a page at a time. Raises NoTurnError."""
    last = None if before is None else _position(store, before) - 1
    first = _first(store, choice, None)
    at = None if first is None else first - 1
    while True:
        page = store.lookup.page(choice, at, newest_first=False, until=last)
        for turn in page.turns:
            if contains(turn, words):
                yield turn
        if page.next is None:
            return
        at = page.next


class NewestSessions(NamedTuple):
    """The newest sessions, that with the newest turn last."""

    sessions: list[SessionSummary]
    before: int | None
    """The position in the store before which the search may go on; None if there are no others."""
    gave_up: str | None = None
    """The id of the turn there, if the search ended before there were enough sessions."""


def newest_sessions(
    store: Store,
    choice: Choice,
    limit: int,
    most: int = LOOKED_THROUGH,
    before: int | None = None,
) -> NewestSessions:
    """Up to `limit` sessions whose newest chosen turn is before `before`, if given.

    About `most` turns are looked through; with a `limit` of 0 all of them.
    """
    until = _first(store, choice, most if limit else None)
    found: dict[str, SessionSummary | None] = {}
    at, looked_at, count = before, 0, 0
    while True:
        page = store.lookup.session_names(choice, at, until)
        for name, seq in page.names.items():
            if name in found:
                continue
            one = found[name] = store.lookup.session(name, choice.lineages)
            newer = before is not None and one is not None and one.last_seq >= before
            if newer and _newest_seq(store, choice, name, before) is not None:
                found[name] = None  # it stood on a page before
            count += found[name] is not None
            if limit and count == limit:
                return NewestSessions(_shown(found), seq)
        at, looked_at = page.next, looked_at + page.looked_at
        if at is None or (limit and looked_at >= most):
            return NewestSessions(_shown(found), at, page.last)


def end_of(store: Store, choice: Choice, name: str, settings: Settings) -> int:
    """The position of a session's newest chosen turn, or of the turn with this id.

    A session has a name of ours, and may have one of its client's. Raises NoTurnError, also if
    several sessions have the latter, as those of two lineages may.
    """
    for own in names_of(name, settings):
        found: dict[str, int] = {}
        at: int | None = None
        while own not in found:
            page = store.lookup.session_names(replace(choice, sessions=(own,)), at)
            found = page.names | found
            if (at := page.next) is None:
                break
        if len(found) > 1 and own not in found:
            names = ", ".join([*found][:_MOST_SHOWN])
            raise NoTurnError(f"--before {name!r:.80}: several sessions have this name: {names}")
        if found:
            return found.get(own, max(found.values()))
    turn = store.lookup.position(name)
    if turn is None:
        raise NoTurnError(f"--before {name!r:.80}: there is no such session; see its first column")
    return turn


def _newest_seq(store: Store, choice: Choice, session: str, until: int | None) -> int | None:
    """The position of a session's newest chosen turn, of those from `until` on."""
    only, at = replace(choice, sessions=(session,)), None
    while True:
        page = store.lookup.session_names(only, at, until)
        if session in page.names or page.next is None:
            return page.names.get(session)
        at = page.next


def _shown(found: Mapping[str, SessionSummary | None]) -> list[SessionSummary]:
    return [one for one in found.values() if one is not None][::-1]


def the_meant(store: Store, words: Sequence[str]) -> str:
    """The id of the one main turn that has each of the words, in what was said or replied.

    The whole store is looked through, a page at a time. Raises NoTurnError if there is none, and if
    there are several: then it lists the newest.
    """
    found: list[TurnSummary] = []
    at = None
    while True:
        page = store.lookup.page(Choice(main=True), at)
        found += [turn for turn in page.turns if contains(turn, words)]
        at = page.next
        if at is None or len(found) > _MOST_SHOWN:
            break
    text = " ".join(words)
    if not found:
        raise NoTurnError(f"no main turn has the words {text!r:.80}: see `nextstate turns --grep`")
    if len(found) > 1:
        shown = [f"  {turn_line(turn, columns())}" for turn in found[:_MOST_SHOWN]]
        shown += ["  …"] if len(found) > _MOST_SHOWN else []
        raise NoTurnError(
            f"several main turns have the words {text!r:.80}; name one of them by its id, or more "
            "words:\n" + "\n".join(shown)
        )
    return found[0].id


def the_turn(store: Store, beginning: str) -> str:
    """The id of the one turn whose id begins so. Raises NoTurnError."""
    found = store.lookup.named(beginning, _MOST_SHOWN + 1)
    if not found:
        raise NoTurnError(f"there is no turn {beginning!r:.80}: see `nextstate turns`")
    if len(found) > 1:
        shown = ", ".join(found[:_MOST_SHOWN]) + (", …" if len(found) > _MOST_SHOWN else "")
        raise NoTurnError(f"several turns begin with {beginning!r:.80}: {shown}; name one of them")
    return found[0]


def words_of(option: str, text: str) -> tuple[str, ...]:
    """The words of an option's value, as `contains` wants them. Raises ConfigError without any."""
    words = tuple(text.casefold().split())
    if not words:
        raise ConfigError(f"{option} {text!r:.40} has no words: expected some of a turn's")
    return words


def names_of(session: str, settings: Settings) -> tuple[str, ...]:
    """The names under which the store may have a session."""
    hide = HiddenNames(settings.store.path, settings.privacy.redactor)
    names = session_names(session, load_plugin("agents", settings.agents.profile, None), hide)
    return tuple(dict.fromkeys(names))


def since_time(text: str, now: float | None = None, option: str = "--since") -> float:
    """The Unix time that an option means: so long ago, or a date. Raises ConfigError.

    >>> since_time("2h", 7300.0), since_time("1970-01-01T00:00:10+00:00")
    (100.0, 10.0)
    """
    ago = _AGO.fullmatch(text)
    if ago is not None:
        now = time.time() if now is None else now
        return now - int(ago[1]) * _UNITS_S[ago[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ConfigError(
            f"{option} {text!r:.60} is neither a duration such as 30m, 2h or 3d nor a date such as "
            "2026-05-31 or 2026-05-31T14:00"
        ) from None


def _first(store: Store, choice: Choice, most: int | None) -> int | None:
    """Where the chosen turns begin, if `since` says so; looked for among the newest `most`."""
    if choice.since is None:
        return None
    if most is None:
        return store.lookup.first_since(choice.since)
    return store.lookup.first_since(choice.since, most)


def _position(store: Store, turn_id: str) -> int:
    found = store.lookup.position(the_turn(store, turn_id))
    if found is None:
        raise NoTurnError(f"there is no turn {turn_id!r:.80} any more")
    return found
