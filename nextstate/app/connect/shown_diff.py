"""A diff of settings for a terminal, in which keys and passwords are not shown."""

from __future__ import annotations

import difflib
import re

from nextstate.wire import one_line

_SECRET = re.compile(
    r"""(?i)((["']?)(?<![\w.-])([\w.-]++)(?:(?<=key)|(?<=token)|(?<=secret)|(?<=password))\2"""
    r"""\s*+[:=]\s*+)("(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+')"""
)
_PUBLIC = frozenset({"envkey", "env_key"})
"""What names a variable, not its value."""


def shown_diff(name: str, before: str, after: str) -> str:
    """The change as a unified diff, without its last line end."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), name, f"{name} (connected)", lineterm=""
    )
    return "\n".join(_SECRET.sub(_masked, one_line(line)) for line in lines)


def _masked(found: re.Match[str]) -> str:
    public = found[3].lower() in _PUBLIC or found[4][1:-1] == "unused"
    return found[0] if public else f'{found[1]}"…"'
