"""Which route of the engine a path leads to, however the client has written it."""

from __future__ import annotations

from urllib.parse import unquote

from proxy.serving import CHAT, COMPLETIONS, DIALECTS

GENERATING = frozenset((CHAT, COMPLETIONS, *DIALECTS))
"""The routes whose replies are recorded."""
MODELS = "/v1/models"
PROBED = frozenset(("/version", "/load", "/tokenize", "/detokenize", "/tokenizer_info"))
"""The engine's routes outside /v1/ that agents use. Most others administer the engine."""
EPISODES, GROUPS, EXAMS = "/v1/episodes", "/v1/groups", "/v1/exams"
OURS = frozenset(
    ("/v1/feedback", EPISODES, GROUPS, EXAMS, "/healthz", "/metrics", "/health", "/ping")
)
_OF_EPISODE = "/episodes/"
_KNOWN = GENERATING | PROBED | OURS | {MODELS}


def known_as(raw_path: str) -> str:
    """The known route that the engine's server would serve for a path; else the path.

    uvicorn decodes a path once. starlette redirects a path with a slash at its end to the same
    path without it.

    >>> known_as("/v1/%63hat%2Fcompletions/"), known_as("/v1/models/a%2Fb")
    ('/v1/chat/completions', '/v1/models/a%2Fb')
    """
    path = unquote(raw_path)
    path = path.rstrip("/") or "/"
    return path if path in _KNOWN else raw_path


def is_ours(path: str) -> bool:
    """Whether the proxy answers it itself."""
    return path in OURS or path.startswith(f"{EPISODES}/")


def of_episode(raw_path: str) -> tuple[str | None, str]:
    """(the episode that a path names, the path without it), or (None, the path).

    Some clients add `/v1` to a base URL that ends with it.

    >>> of_episode("/episodes/e-1/v1/v1/messages"), of_episode("/v1/episodes/e-1")
    (('e-1', '/v1/messages'), (None, '/v1/episodes/e-1'))
    """
    name, _, rest = raw_path.removeprefix(_OF_EPISODE).partition("/")
    if not raw_path.startswith(_OF_EPISODE) or not rest.startswith("v1/"):
        return None, raw_path
    return unquote(name), f"/{rest.removeprefix('v1/') if rest.startswith('v1/v1/') else rest}"


def resembles_generating(path: str) -> bool:
    """Whether some server might serve a route that generates for a path that is not one.

    A gateway before the engine may merge slashes, ignore parameters or case, or decode again.

    >>> [resembles_generating(path) for path in ("/v1//Chat;v=1/completions", "/v1/completions")]
    [True, False]
    """
    parts = [part.partition(";")[0].strip() for part in unquote(unquote(path)).lower().split("/")]
    return path not in GENERATING and "/" + "/".join(filter(None, parts)) in GENERATING
