"""Which steps of a task a user's words are about.

A task begins with what the user asked, goes on with replies that call tools, and ends with the
reply that the user answers. The answer is about that last reply. It is also about an earlier step
if it names something that only this step's calls named: a file, a command, a number or a word of
four letters or more that stands neither in the request nor in another step. So general thanks or
anger count for the last reply only, and "you deleted notes.txt" also finds the step that did it. In
Han script any two characters in a row count as a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_LETTER = r"[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_TERM = re.compile(rf"{_LETTER}(?:{_LETTER}|[_./\\:@-])*{_LETTER}")
_HAN = re.compile(r"[\u3400-\u9fff]{2,}")
_SPLIT = re.compile(r"[./\\:@_-]+")
_MIN_LETTERS = 4


def steps_meant(said: str, calls: Sequence[str], request: str) -> list[int]:
    """Positions of the steps that `said` is about; `calls` has one text for each earlier step.

    >>> calls = ['[calls read({"path": "a/todo.md"})]', '[calls remove({"path": "notes.txt"})]']
    >>> steps_meant("Why did you delete notes.txt?", calls, "Tidy up my folder")
    [1]
    >>> steps_meant("Thanks, great!", calls, "Tidy up my folder")
    []
    """
    mentioned, asked = terms(said), terms(request)
    named = [terms(call) - asked for call in calls]
    owners = Counter(term for found in named for term in found)
    return [
        position
        for position, found in enumerate(named)
        if any(owners[term] == 1 for term in found & mentioned)
    ]


def terms(text: str) -> frozenset[str]:
    """The names in a text and their parts: paths, identifiers, numbers, longer words.

    >>> sorted(terms("rm a/notes.txt 42"))
    ['42', 'a/notes.txt', 'notes', 'notes.txt']
    """
    found: set[str] = set()
    for whole in _TERM.findall(text.lower()):
        parts = _SPLIT.split(whole)
        found.update(part for part in (whole, *parts) if _distinct(part))
        if len(parts) > 2:  # the name of the file in a path
            found.add(re.split(r"[/\\]", whole)[-1])
    for run in _HAN.findall(text):
        found.update(run[start : start + 2] for start in range(len(run) - 1))
    return frozenset(found)


def _distinct(term: str) -> bool:
    return term.isdigit() or len(term) >= _MIN_LETTERS or any(c in term for c in "./\\_")
