"""What a regular expression costs an engine's compiler: benchmarks/results/patterns.md.

Each count costs its square, wherever it stands: a group's parts are compiled once, though copied.
Parts of many characters that may be left out or be longer, side by side, cost most: each token may
be read in as many ways. Others than these, such as `\\d?`, cost little.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

_QUANTIFIER = re.compile(r"[?*+]|\{ *+(\d*+) *+(,?) *+(\d*+) *+\}")
_COUNT = re.compile(r"[{~] *+(\d*+) *+(?:(?:,|\.\.) *+(\d*+))?")
"""How often something is repeated: `{2,5}` in an expression, `~2..5` in Lark's grammars."""
_RANGE = re.compile(r"([^\\])-([^\]\\])")
_ENDLESS = 10**9
_AT_A_TIME = 20
_FEW = 10
"""Characters of a class that is no wider than the digits."""


class Cost(NamedTuple):
    """What an expression costs."""

    copies: int
    """Of parts that are repeated; a group's count as often as the group."""
    squares: int
    """Of all counts, added up."""
    left_out: int
    """Parts that may be left out, in the alternative that has most of them."""
    ways: int
    """In which wide parts that vary, side by side, may be read: the most of a row of them."""


class _Row(NamedTuple):
    """Wide parts that vary and follow each other: their copies, each of which counts by how wide it
    is, and how many parts there are."""

    copies: int = 0
    parts: int = 0

    def then(self, other: _Row) -> _Row:
        return _Row(self.copies + other.copies, self.parts + other.parts)


_NONE = _Row()


@dataclass(slots=True)
class _Part:
    """A character, a class or a group, or a sequence of them; it may be left out if `varies`."""

    copies: int = 0
    squares: int = 0
    left_out: int = 0
    varies: _Row | None = None
    lead: _Row = _NONE
    trail: _Row = _NONE
    """The rows at its beginning and at its end, unless it may be left out as a whole."""
    wide: int = 0
    """0 for few characters, 1 for letters, 2 for more; 1 for a group."""


@dataclass(slots=True)
class _Group:
    """A group that is being read: its present alternative, and what is known of those before."""

    now: _Part = field(default_factory=lambda: _Part(varies=_Row()))
    done: list[_Part] = field(default_factory=lambda: [])


def cost_of(expression: str) -> Cost:
    """What an expression costs. The time is linear.

    >>> cost_of("a{2}(b?c+){10}")
    Cost(copies=22, squares=104, left_out=10, ways=0)
    >>> cost_of(r"(\\?[?] [^,]{1,200},){1,10}").ways, cost_of(".?[a-z]{0,9}").ways
    (0, 60)
    """
    groups, at, longest = [_Group()], 0, 0
    while at < len(expression):
        sign = expression[at]
        at += 1
        if sign == "(":
            groups.append(_Group())
            at = _head_end(expression, at)
            continue
        if sign == "|":
            groups[-1].done.append(groups[-1].now)
            groups[-1].now = _Part(varies=_Row())
            continue
        if sign == ")":
            part = _whole(groups.pop())
            groups = groups or [_Group()]
        elif sign in "^$":
            continue
        else:
            begin, at = at - 1, _atom_end(expression, at)
            part = _Part(wide=_width(expression[begin:at]))
        is_group = sign == ")"
        while repeat := _QUANTIFIER.match(expression, at):
            part, row = _repeated(part, *_times(repeat), is_group=is_group)
            longest = max(longest, row)
            is_group = True
            at = repeat.end() + expression.startswith("?", repeat.end())
        longest = max(longest, _append(groups[-1].now, part))
    whole = [_whole(group) for group in groups]
    copies, squares, left_out = (
        min(sum(getattr(one, name) for one in whole), _ENDLESS**2)
        for name in ("copies", "squares", "left_out")
    )
    return Cost(copies, squares, left_out, longest)


def counts(text: str) -> list[int]:
    """The numbers of repetitions in an expression or a grammar, and a zero."""
    return [0, *(max(map(_number, match.groups(""))) for match in _COUNT.finditer(text))]


def _append(before: _Part, part: _Part) -> int:
    """Adds a part to a sequence. Returns the ways through the row that ends with it."""
    before.copies = min(before.copies + part.copies, _ENDLESS)
    before.squares = min(before.squares + part.squares, _ENDLESS**2)
    before.left_out = min(before.left_out + part.left_out, _ENDLESS)
    if part.varies is not None:
        before.trail = before.trail.then(part.varies)
        if before.varies is not None:
            before.varies = before.trail
        return _in_row(before.trail)
    joined = before.trail.then(part.lead)
    if before.varies is not None:
        before.lead, before.varies = joined, None
    before.trail = part.trail
    return _in_row(joined)


def _whole(group: _Group) -> _Part:
    """A group as a part of what is around it."""
    every = [*group.done, group.now]
    rows = [one.varies for one in every if one.varies is not None]
    lacks = len(rows) < len(every) and bool(rows)
    row = max(rows) if rows else None
    if row is not None and lacks:
        row = row.then(_Row(2, 1))
    return _Part(
        sum(one.copies for one in every),
        sum(one.squares for one in every),
        max(one.left_out for one in every) + (len(every) > 1 and bool(rows)),
        row,
        max(one.lead for one in every),
        max(one.trail for one in every),
        1,
    )


def _repeated(part: _Part, least: int, most: int, *, is_group: bool) -> tuple[_Part, int]:
    """(a part that is repeated, the ways through the row that it is with itself)."""
    varies = least != most
    found = _Part(
        min(max(part.copies, 1) * most, _ENDLESS),
        min(part.squares + (most**2 if most > 1 else 0), _ENDLESS**2),
        min(part.left_out * most + varies, _ENDLESS),
        wide=1,
    )
    if not is_group:
        if varies:
            found.varies = _Row(part.wide * most, 1) if part.wide else _Row()
        return found, 0
    if part.varies is not None:
        found.varies = _Row(part.varies.copies * most, part.varies.parts * most)
        return found, _in_row(found.varies)
    row = _in_row(part.trail.then(part.lead)) if most > 1 else 0
    if varies and not least:
        found.varies = max(part.lead, part.trail).then(_Row(most, 1))
    else:
        found.lead, found.trail = part.lead, part.trail
        if varies:
            found.trail = part.trail.then(_Row(most - least, 1))
    return found, row


def _in_row(row: _Row) -> int:
    """A token is short: only so many copies of each part are read at a time."""
    return row.copies * min(row.copies, _AT_A_TIME * row.parts) // 2 if row.parts > 1 else 0


def _head_end(expression: str, at: int) -> int:
    """Where the inside of a group begins whose bracket ends at `at`."""
    if not expression.startswith("?", at):
        return at
    if expression.startswith(("?<=", "?<!"), at):
        return at + 3
    if expression.startswith(("?<", "?P<"), at):
        return max(expression.find(">", at), at) + 1
    return at + 2


def _atom_end(expression: str, at: int) -> int:
    """Where a character, an escape or a class ends that begins before `at`."""
    if expression[at - 1] == "\\":
        if expression[at : at + 1] not in ("p", "P"):
            return at + 1
        is_long = expression.startswith("{", at + 1)  # `\p{L}` or `\pL`
        return max(expression.find("}", at) + 1, at + 2) if is_long else at + 2
    if expression[at - 1] != "[":
        return at
    while at < len(expression) and expression[at] != "]":
        at += 2 if expression[at] == "\\" else 1
    return at + 1


def _width(atom: str) -> int:
    if atom == "." or atom.startswith("[^") or atom[:1] + atom[1:2] in ("\\S", "\\D", "\\W"):
        return 2
    if atom[:2] in ("\\p", "\\P"):
        return 2
    if atom == "\\w":
        return 1
    if not atom.startswith("["):
        return 0
    many = len(atom) - 2 > _FEW or any(sign in atom for sign in ("\\w", "\\p", "\\P"))
    ranges = _RANGE.findall(atom)
    many = many or any(ord(last) - ord(first) >= _FEW for first, last in ranges)
    beyond = any(sign in atom for sign in ("\\S", "\\D", "\\W"))
    beyond = beyond or any(ord(last) > 0x7F for _, last in ranges)
    return 2 if beyond else int(many)


def _times(repeat: re.Match[str]) -> tuple[int, int]:
    """How often a quantifier repeats a part at least and, as far as copies are made, at most."""
    if repeat[1] is None:
        return int(repeat[0] == "+"), 1
    least, most = (_number(text) for text in (repeat[1], repeat[3]))
    if not repeat[2]:
        return least, least
    return least, most if repeat[3] else least + 1


def _number(digits: str) -> int:
    return int(digits or 0) if len(digits) < 10 else _ENDLESS
