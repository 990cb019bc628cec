"""Which texts strangers wrote: what a tool brought from the web is evidence of nothing.

A fetched page may say "Great job!", "exit code 1" or "5 passed", and whoever writes it would
teach the policy. Such a text has the trust 0.0: judges see it, and no score comes of it alone. What
a person says about it counts as always.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from nextstate.records import NextState, Source

NO_TRUST = 0.0
_CALL = re.compile(r"^\[calls ([^\s(\n]{1,200})\(([^\n]*)\)\]$", re.MULTILINE)
_FETCHES = re.compile(
    r"fetch|brows|https?|url|crawl|scrap|web|search|wiki|download|rss|feed|page|navigat|screenshot|"
    r"inbox|(?:read|get|list|check)\w{0,20}(?:mails?|messages?|posts?|tweets?|issues?|comments?)",
    re.IGNORECASE,
)
"""A tool with this in its name brings what others wrote, also if it runs something for that."""
_ELSEWHERE = r"https?://(?!localhost\b|127\.|\[::1\])"
_LOADS = re.compile(
    r"\b(?:curl|wget|lynx|w3m|links2?|aria2c|httpie|https? (?:GET|POST)|glab|"
    r"gh (?:api|issue|pr|release|repo|gist|search|run|discussion))\b|"
    r"\bgit (?:show|log|diff|blame)\b[^;&|]{0,100}\b(?:origin|upstream|FETCH_HEAD)\b|"
    rf"\b(?:python3?|node|deno|bun|ruby|perl|php|npx|uvx?)\b[^;&|]{{0,200}}{_ELSEWHERE}"
)
"""Programs that do so in a shell."""
_CODE = re.compile(r"python|notebook|kernel|interpreter", re.IGNORECASE)
_URL = re.compile(_ELSEWHERE)
_RUNS = re.compile(
    r"exec|bash|shell|run|terminal|test|python|process|command|console|powershell|kernel|notebook|"
    r"code_interpreter",
    re.IGNORECASE,
)


def without_trust(reply: str, states: Sequence[NextState]) -> tuple[NextState, ...]:
    """The next states of `reply`, those that strangers wrote without trust.

    If there are as many results as calls, they belong together in order; else one call that fetches
    makes all of them a stranger's.
    """
    fetches = [_fetches(name, arguments) for name, arguments in _CALL.findall(reply)]
    results = [state for state in states if state.source is Source.TOOL]
    if len(fetches) != len(results):
        fetches = [any(fetches)] * len(results)
    theirs = {id(one) for one, fetched in zip(results, fetches, strict=True) if fetched}
    return tuple(
        replace(state, trust=NO_TRUST) if id(state) in theirs else state for state in states
    )


def is_evidence(state: NextState) -> bool:
    """Whether a score may come of a text."""
    return state.trust > NO_TRUST


def _fetches(name: str, arguments: str) -> bool:
    if _FETCHES.search(name):
        return True
    if not _RUNS.search(name):
        return False
    code = _CODE.search(name) is not None and _URL.search(arguments) is not None
    return code or _LOADS.search(arguments) is not None
