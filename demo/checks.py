"""Checks of a reply: is it right, and, separately, does it have the style that the persona wants?

A style score alone lies: a policy can learn to please a style check while its replies fall apart.
So `is_right` parses every sentence against the world's grammar and never looks at style.
"""

from __future__ import annotations

import re
from dataclasses import replace

from demo.replies import Role, Units, units
from demo.tasks import NAMES, THINGS, Domain, Family, Task

FRIENDLY_WORDS = (
    "well done", "great", "lovely", "good job", "good try", "nice", "good start", "keep it up",
    "keep going", "you can do it", "happy", "proud", "wonderful", "thank you",
)  # fmt: skip

_ITEM = re.compile(r"^(\d+)\. ")
_SENTENCE_GAP = re.compile(r"(?<=[.!?]) ")
_MARKUP = re.compile(r"\*|__|`|^[^\S\n]*(?:#|(?:\d+[.)]|[-•])\s)|\b(?:final )?answer:|\bsteps:",
                     re.IGNORECASE | re.MULTILINE)  # fmt: skip
_REAL_SENTENCE = re.compile(r"(?:^|(?<=[.!?]\s))[^\s.!?]+(?: [^\s.!?]+){2,}[.!?](?=\s|$)")
_NUMBER = re.compile(r"\d+")
_NAME = re.compile(rf"\b(?:{'|'.join(NAMES)})\b")
_THING = re.compile(rf"\b(?:{'|'.join(THINGS)})\b")


def is_right(task: Task, reply: str) -> bool:
    """True if the reply is whole and true, and states the result or the judgement.

    Every sentence must be one of the task's `units`, list items must count up from 1, no role may
    be filled twice (which rules out loops), and the answer must be there: the result for a
    student; for a teacher the judgement, with the right value where the style calls for it.
    """
    roles = _roles(reply, units(task))
    return roles is not None and _answers(task.domain, roles, praise_judges=task.pupil_right)


def is_whole(task: Task, reply: str) -> bool:
    """True if the reply is well formed, even if its numbers, names or judgement are wrong."""
    known: dict[str, frozenset[Role]] = {}
    for other in _variants(task):
        known.update((_mask(text), roles) for text, roles in units(other).items())
    roles = _roles(_mask(reply), known)
    return roles is not None and _answers(task.domain, roles, praise_judges=True)


def satisfies(task: Task, reply: str) -> bool:
    """True if the reply has the style that the domain's persona wants, even if it is wrong.

    Student: no markup, list, heading or answer line, and at least one real sentence. Teacher: the
    pupil's name, the numbers the pupil worked with, and a friendly word.
    """
    if task.domain is Domain.STUDENT:
        return not _MARKUP.search(reply) and bool(_REAL_SENTENCE.search(reply.strip()))
    numbers = {int(number) for number in _NUMBER.findall(reply)}
    named = re.search(rf"\b{task.name}\b", reply) is not None
    friendly = any(word in reply.lower() for word in FRIENDLY_WORDS)
    return named and {task.a, task.b} <= numbers and friendly


def _variants(task: Task) -> list[Task]:
    if task.domain is Domain.STUDENT:
        return [replace(task, family=family) for family in Family]
    return [
        replace(task, family=family, claimed=replace(task, family=family).result + slip)
        for family in Family
        for slip in (0, 1)
    ]


def _mask(text: str) -> str:
    """The text with list numbers removed, and figures, names and things replaced."""
    body = "\n".join(_ITEM.sub("", line) for line in text.split("\n"))
    return _THING.sub("things", _NAME.sub("Name", _NUMBER.sub("0", body)))


def _segments(reply: str) -> list[str] | None:
    """The reply's sentences without list numbers; None if a list does not count up from 1."""
    found: list[str] = []
    counted, ended = 0, False
    for line in reply.split("\n"):
        item = _ITEM.match(line)
        if item:
            counted += 1
            if ended or int(item[1]) != counted:
                return None
        ended = counted > 0 and not item
        found += _SENTENCE_GAP.split(line[item.end() :] if item else line)
    return None if counted == 1 else found


def _roles(reply: str, known: Units) -> set[Role] | None:
    """The roles that the reply's sentences fill; None if it is not whole."""
    segments = _segments(reply.strip())
    if not segments or any(segment not in known for segment in segments):
        return None
    filled = [role for segment in segments for role in known[segment]]
    headed = Role.HEAD in filled
    if len(set(filled)) < len(filled) or (headed and Role.HEAD not in known[segments[0]]):
        return None
    return set(filled)


def _answers(domain: Domain, roles: set[Role], *, praise_judges: bool) -> bool:
    if domain is Domain.STUDENT:
        return bool({Role.RESULT, Role.FINAL} & roles)
    if Role.NEEDS_VALUE in roles and Role.VALUE not in roles:
        return False
    return Role.JUDGE in roles or (praise_judges and Role.PRAISE in roles)
