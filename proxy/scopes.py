"""Which scope each route needs: the one table of all of them.

A route that is missing here fails tests/proxy/test_scopes.py. Until then it needs `admin`, so that
nothing is open by oversight.
"""

from __future__ import annotations

from collections.abc import Mapping

from nextstate.keys import Scope
from proxy.paths import EPISODES, EXAMS, GENERATING, GROUPS, MODELS, PROBED, is_ours

_CHAT, _FEEDBACK, _READ = Scope.CHAT, Scope.FEEDBACK, Scope.READ
_ADMIN, _EPISODES = Scope.ADMIN, Scope.EPISODES
ANY = "*"
"""Stands for every method that is not named."""

TABLE: Mapping[str, Mapping[str, Scope | None]] = {
    # Who asks whether it lives needs no key. With one, /healthz says more.
    "/healthz": {ANY: None},
    "/health": {ANY: None},
    "/ping": {ANY: None},
    "/metrics": {ANY: _READ},
    "/v1/feedback": {ANY: _FEEDBACK},
    EPISODES: {ANY: _EPISODES},
    GROUPS: {ANY: _EPISODES},
    EXAMS: {ANY: _EPISODES},
    f"{EPISODES}/{{}}": {ANY: _EPISODES},
    f"{EPISODES}/{{}}/trace": {ANY: _EPISODES},
    f"{EPISODES}/{{}}/rewards": {ANY: _EPISODES},
    f"{EPISODES}/{{}}/close": {ANY: _EPISODES},
    **{path: {ANY: _CHAT} for path in (*sorted(GENERATING), MODELS, *sorted(PROBED))},
    # The page. What changes something is a POST.
    "/": {"GET": _READ, ANY: _ADMIN},
    "/page": {"GET": _READ, ANY: _ADMIN},
    "/page/style.css": {"GET": None, ANY: _ADMIN},
    "/page/icon.svg": {"GET": None, ANY: _ADMIN},
    "/page/htmx/htmx.min.js": {"GET": None, ANY: _ADMIN},
    "/page/htmx/hx-sse.min.js": {"GET": None, ANY: _ADMIN},
    "/page/login": {ANY: None},
    "/page/logout": {ANY: None},
    "/page/events": {"GET": _READ, ANY: _ADMIN},
    "/page/turns": {"GET": _READ, ANY: _ADMIN},
    "/page/turns/{}": {"GET": _READ, ANY: _ADMIN},
    "/page/turns/{}/text/{}": {"GET": _READ, ANY: _ADMIN},
    "/page/turns/{}/feedback": {ANY: _ADMIN},
    "/page/turns/{}/forget": {ANY: _ADMIN},
    "/page/sessions": {"GET": _READ, ANY: _ADMIN},
    "/page/session": {"GET": _READ, ANY: _ADMIN},
    "/page/session/forget": {ANY: _ADMIN},
    "/page/episodes": {"GET": _READ, ANY: _ADMIN},
    "/page/episodes/{}": {"GET": _READ, ANY: _ADMIN},
    "/page/episodes/{}/pictures/{}": {"GET": _READ, ANY: _ADMIN},
    "/page/versions": {"GET": _READ, ANY: _ADMIN},
    "/page/versions/{}/{}": {"GET": _READ, ANY: _ADMIN},
    "/page/versions/{}/{}/rollback": {ANY: _ADMIN},
    "/page/lineages/{}/pause": {ANY: _ADMIN},
    "/page/lineages/{}/resume": {ANY: _ADMIN},
    "/page/running": {"GET": _READ, ANY: _ADMIN},
    "/page/export": {"GET": _READ, ANY: _ADMIN},
}
"""The scope by path, `{}` for any one part, and by method; None: no key is needed."""
_BY_LENGTH: Mapping[int, list[tuple[list[str], Mapping[str, Scope | None]]]] = {
    length: [
        (path.split("/"), methods)
        for path, methods in TABLE.items()
        if "{}" in path and path.count("/") + 1 == length
    ]
    for length in range(8)
}


def needed(method: str, path: str) -> Scope | None:
    """The scope that a request needs.

    >>> needed("GET", "/v1/models"), needed("POST", "/page/turns/t/feedback")
    (<Scope.CHAT: 'chat'>, <Scope.ADMIN: 'admin'>)
    """
    methods = TABLE.get(path) or _of_template(path.rstrip("/"))
    if methods is None:
        # The engine's other routes, and addresses that there are not.
        return _ADMIN if is_ours(path) or path.startswith("/page") else _CHAT
    return methods.get("GET" if method == "HEAD" else method, methods[ANY])


def _of_template(path: str) -> Mapping[str, Scope | None] | None:
    if path in TABLE:  # with a slash at its end
        return TABLE[path]
    parts = path.split("/", 8)
    for template, methods in _BY_LENGTH.get(len(parts), ()):
        if all(a in ("{}", b) for a, b in zip(template, parts, strict=True)):
            return methods
    return None
