"""What the output of a tool or the environment says about the call that it answers.

A failure counts against the call, unless an outage caused it or a part of the work was done. It is
a success if the output says so, or if it names what the call or the user named. The lines of a log
are data: an error in them is not the call's error, and neither is a line that the call itself
printed.
"""

from __future__ import annotations

import re

from nextstate.records import Vote
from plugins.judges.lexicons import tools
from plugins.judges.lexicons.shape import fold

SILENT = Vote(0, sure=False)
_MAX_CHARS = 4000
_LOGGED = re.compile(
    r"\A\W*(?:\d{4}[-/.]\d\d[-/.]\d\d|(?:\w{3} )?\w{3} +\d{1,2}|"
    r"\d{1,2}月\d{1,2})[ t日]+\d\d:\d\d"
)
_PRINTED = re.compile(r"\b(?:echo|printf?|print|console\.log)\b[^|;&\n]*")
_SHARE = re.compile(
    r"(?<![\d/(.,:-])(\d{1,6})\s*(?:/|of|out of|von|de|aus|中的?)\s*(?:las |los |"
    r"the )?(\d{1,6})(?![\d/.:-]|\s*%)"
)


def read_result(text: str, asked: str, arguments: str) -> Vote:
    """The vote on one output; the user had `asked`, and the call had these `arguments`."""
    shown = fold(text[:_MAX_CHARS]).strip()
    printed = "\n".join(_PRINTED.findall(fold(arguments)))
    lines = [line for line in shown.splitlines() if not line.strip() or line not in printed]
    own = "\n".join(line for line in lines if not _LOGGED.match(line))
    if any(map(str.strip, lines)) and not own.strip():
        return Vote(1)
    some = any(0 < int(part) < int(whole) for part, whole in _SHARE.findall(own))
    tested = tools.TESTS.search(own)
    if tools.ITEM_DONE.search(own) and tools.SHORT.search(own) and not tested:
        return Vote(0)
    if tools.FAILED.search(own):
        some = some or bool(tools.ITEM_DONE.search(own))
        return Vote(0 if (some and not tested) or tools.OUTAGE.search(own) else -1)
    if some or tools.PARTIAL.search(own) or tools.OUTAGE.search(own):
        return Vote(0)
    if tools.SUCCEEDED.search(own) or content_of(own) & content_of(f"{asked}\n{arguments}"):
        return Vote(1)
    return SILENT


def content_of(text: str) -> frozenset[str]:
    """The words of four letters or more, numbers of two digits or more, pairs of Han characters.

    >>> sorted(content_of("git mv Report_2.txt to 17"))
    ['17', 'report']
    """
    text = fold(text)
    words = re.findall(r"[^\W\d_]{4,}|\d{2,}", re.sub(r"[\u3400-\u9fff]", " ", text))
    runs = re.findall(r"[\u3400-\u9fff]+", text)
    return frozenset([*words, *(run[i : i + 2] for run in runs for i in range(len(run) - 1))])
