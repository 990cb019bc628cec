"""What a client says about its request: the session that it names, and the kind of the turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nextstate.hooks import AgentProfile
from nextstate.records import Json, TurnKind
from nextstate.redaction.names import HiddenNames
from nextstate.wire import obj

TURN_TYPE = "x-turn-type"
_KINDS = {kind.value: kind for kind in (TurnKind.MAIN, TurnKind.SIDE)}
_SESSION_HEADERS = ("x-session-id", "x-session-affinity")


def explicit_session(headers: Mapping[str, str], request: Json) -> str | None:
    """The session id that the client gives in a header or a field; None without one.

    It may hold any bytes, and be of any length: `HiddenNames` says what is kept of it.
    """
    for name, _ in _names(headers, request):
        return name
    return None


def names_conversation(headers: Mapping[str, str], request: Json) -> bool:
    """True if that id names one conversation; False if it names a person or an app, or is missing.

    Clients often give the same `prompt_cache_key`, `user` or `user_id` with all their requests.
    """
    return next((own for _, own in _names(headers, request)), False)


def _names(headers: Mapping[str, str], request: Json) -> Iterator[tuple[str, bool]]:
    """Each (name, whether it names one conversation); the first one counts."""
    metadata = obj(request.get("metadata"))
    names = [(headers.get(name), True) for name in _SESSION_HEADERS]
    names += [(request.get("prompt_cache_key"), False), (request.get("session_id"), True)]
    names += [(metadata.get("session_id"), True), (request.get("user"), False)]
    names.append((metadata.get("user_id"), False))
    return ((name, own) for name, own in names if isinstance(name, str) and name)


def named_kind(headers: Mapping[str, str]) -> TurnKind | None:
    """The kind of the turn in the header `X-Turn-Type`; None if it is missing or unknown."""
    return _KINDS.get(headers.get(TURN_TYPE, "").strip().lower())


def session_names(name: str, profile: AgentProfile, hide: HiddenNames | None = None) -> list[str]:
    """The names under which the store may have the session that a client calls `name`."""
    kept = (hide or HiddenNames())(name)
    return [kept, profile.session(kept)]
