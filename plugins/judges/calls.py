"""The tool calls that a reply made, read from its text.

A reply shows each call as `[calls name(arguments)]` on a line of its own; a bare `name({…})`, as
some labelled cases have it, counts too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CALL = re.compile(
    r"^\[calls (?P<name>[^\s(]+)\((?P<arguments>.*)\)\]$"
    r"|(?<![\w.])(?P<bare>[A-Za-z_][\w.-]*)\((?P<object>\{.*\})\)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call, as the reply shows it."""

    name: str
    arguments: str
    """JSON as it stood in the reply; cut where the reply was clipped."""


def calls_of(reply: str) -> list[Call]:
    """The calls in a reply, in order.

    >>> calls_of('I look.\\n[calls exec({"cmd": "ls"})]')
    [Call(name='exec', arguments='{"cmd": "ls"}')]
    """
    return [
        Call(match["name"] or match["bare"], match["arguments"] or match["object"] or "")
        for match in _CALL.finditer(reply)
    ]
