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
_CALL = re.compile(r"^\[calls ([^\s(\n]{1,200})\(", re.MULTILINE)
_FETCHES = re.compile(
    r"fetch|brows|https?|url|crawl|scrap|web|search|wiki|download|rss|feed|page|navigat|screenshot|"
    r"inbox|pull_?request|"
    r"(?:read|get|list|check)_?(?:[a-z]{1,20}_?)?"
    r"(?:e?mail|message|post|tweet|issue|comment|review|thread|notification)s?",
    re.IGNORECASE,
)
"""A tool with this in its name brings what others wrote, whatever else its name says."""
_RUNS = re.compile(
    r"exec|bash|shell|run|terminal|test|python|process|command|console|powershell|kernel|notebook|"
    r"code_interpreter",
    re.IGNORECASE,
)
_LOADS = re.compile(
    r"\b(?:curl|wget|lynx|w3m|links2?|aria2c|httpie|https? (?:GET|POST)|(?:gh|glab) [a-z]+)\b|"
    r"\bgit\b[^;&|\n]{0,60}?\b(?:show|log|diff|blame|grep|cat-file)\b[^;&|\n]{0,200}?"
    r"(?:\b(?:origin|upstream|remotes|pull)/|FETCH_HEAD)"
)
"""Commands that do so in a shell."""
_INTERPRETS = re.compile(
    r"python|\b(?:node|deno|bun|ruby|perl|php)\b|kernel|notebook|code_interpreter", re.IGNORECASE
)
_ELSEWHERE = re.compile(r"https?://(?!localhost\b|127\.|\[::1\])", re.IGNORECASE)
"""An address that a program in such a language is given, or has in it."""


def without_trust(reply: str, states: Sequence[NextState]) -> tuple[NextState, ...]:
    """The next states of `reply`, those that strangers wrote without trust.

    If there are as many results as calls, they belong together in order; else one call that fetches
    makes all of them a stranger's.
    """
    calls = list(_CALL.finditer(reply))
    ends = [*(call.start() for call in calls), len(reply)][1:]
    fetches = [
        _fetches(call[1], reply[call.end() : end]) for call, end in zip(calls, ends, strict=True)
    ]
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
    if _LOADS.search(arguments):
        return True
    interprets = _INTERPRETS.search(name) or _INTERPRETS.search(arguments)
    return interprets is not None and _ELSEWHERE.search(arguments) is not None
