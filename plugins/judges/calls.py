"""The tool calls of a reply, read from its text.

A reply shows each call as `[calls name(arguments)]` on its own line. A bare `name({…})` counts too;
some labelled cases have it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SHOWN = re.compile(r"\A\[calls ([^\s(]+)\((.*)\)\]\Z")
_BARE = re.compile(r"(?<![\w.-])([A-Za-z_][\w.-]*)\((?=\{)")


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call of a reply."""

    name: str
    arguments: str
    """The JSON text of the reply; cut where the reply was clipped."""


def calls_of(reply: str) -> list[Call]:
    """The calls in a reply, in order.

    >>> calls_of('I look.\\n[calls exec({"cmd": "ls"})]')
    [Call(name='exec', arguments='{"cmd": "ls"}')]
    """
    found: list[Call] = []
    for line in reply.split("\n"):
        if shown := _SHOWN.match(line):
            found.append(Call(shown[1], shown[2]))
        elif line.endswith("})") and (bare := _BARE.search(line)):
            found.append(Call(bare[1], line[bare.end() : -1]))
    return found
