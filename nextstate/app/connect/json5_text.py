"""JSON5, read with the position of every value, so that an editor can leave the rest alone.

The grammar is that of https://spec.json5.org, of which JSON and JSON with comments are parts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_DEEPEST = 100
_TRIVIA = re.compile(r"(?:[\s\ufeff]++|//[^\n\r\u2028\u2029]*+|/\*(?>[\s\S]*?(?:\*/|\Z)))*+")
_STRING = re.compile(
    r'"(?:[^"\\\n\r]|\\(?:\r\n|[\s\S]))*+"' r"|'(?:[^'\\\n\r]|\\(?:\r\n|[\s\S]))*+'"
)
_ESCAPE = re.compile(r"\\(?:\r\n|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[\s\S])")
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "0": "\0"}
_LINE_ENDS = ("\n", "\r", "\r\n", "\u2028", "\u2029")
_NAME = re.compile(r"(?:[^\W\d]|\$|\\u[0-9a-fA-F]{4})(?:[\w$\u200c\u200d]|\\u[0-9a-fA-F]{4})*+")
_NUMBER = re.compile(
    r"[+-]?(?:Infinity|NaN|0[xX][0-9a-fA-F]+"
    r"|(?:(?:0|[1-9][0-9]*+)(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?)(?![\w$.])"
)
_WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class Scalar:
    """A string, number, boolean or null at `text[start:end]`."""

    start: int
    end: int
    value: str | float | bool | None


@dataclass(frozen=True, slots=True)
class Array:
    """An array at `text[start:end]`."""

    start: int
    end: int
    items: tuple[Node, ...]
    comma: int | None
    """Where the comma after the last item ends; None if there is no such comma."""


@dataclass(frozen=True, slots=True)
class Object:
    """An object at `text[start:end]`."""

    start: int
    end: int
    members: tuple[Member, ...]
    comma: int | None
    """Where the comma after the last member ends; None if there is no such comma."""


@dataclass(frozen=True, slots=True)
class Member:
    """A key of an object, which begins at `start`, and its value."""

    key: str
    start: int
    value: Node

    @property
    def end(self) -> int:
        return self.value.end


Node = Scalar | Array | Object


def parse(text: str) -> Node:
    """The one value of the text. Raises ValueError that names the place and what is wrong."""
    return _Parser(text).document()


def plain(node: Node) -> object:
    """The value as dict, list, str, float, int, bool or None; of equal keys the last counts."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Array):
        return [plain(item) for item in node.items]
    return {member.key: plain(member.value) for member in node.members}


def place(text: str, position: int) -> str:
    """A position as people count it: `line 3, column 5`."""
    before = text[:position]
    return f"line {before.count(chr(10)) + 1}, column {position - before.rfind(chr(10))}"


def after_trivia(text: str, position: int) -> int:
    """Where the white space and the comments from a position on end."""
    found = _TRIVIA.match(text, position)
    return found.end() if found else position


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def document(self) -> Node:
        self._skip()
        node = self._value(0)
        self._skip()
        if self._at < len(self._text):
            raise self._wrong("expected nothing more after the value")
        return node

    def _value(self, depth: int) -> Node:
        text, start = self._text, self._at
        if depth > _DEEPEST:
            raise self._wrong(f"expected at most {_DEEPEST} values inside each other")
        if text.startswith("{", start):
            return self._object(depth)
        if text.startswith("[", start):
            return self._array(depth)
        if found := _STRING.match(text, start):
            self._at = found.end()
            return Scalar(start, self._at, _unescaped(found[0][1:-1]))
        if found := _NUMBER.match(text, start):
            self._at = found.end()
            return Scalar(start, self._at, _number(found[0]))
        if (found := _NAME.match(text, start)) and found[0] in _WORDS:
            self._at = found.end()
            return Scalar(start, self._at, _WORDS[found[0]])
        if text.startswith(('"', "'"), start):
            raise self._wrong("this text has no closing quote in its line")
        raise self._wrong("expected a value")

    def _object(self, depth: int) -> Object:
        start, comma = self._at, None
        members: list[Member] = []
        self._at += 1
        while not self._closed("}", "a comma or }", bool(members) and comma is None):
            key_start = self._at
            key = self._key()
            self._skip()
            if not self._text.startswith(":", self._at):
                raise self._wrong("expected a colon after the key")
            self._at += 1
            self._skip()
            members.append(Member(key, key_start, self._value(depth + 1)))
            comma = self._comma()
        return Object(start, self._at, tuple(members), comma)

    def _array(self, depth: int) -> Array:
        start, comma = self._at, None
        items: list[Node] = []
        self._at += 1
        while not self._closed("]", "a comma or ]", bool(items) and comma is None):
            items.append(self._value(depth + 1))
            comma = self._comma()
        return Array(start, self._at, tuple(items), comma)

    def _closed(self, bracket: str, expected: str, must: bool) -> bool:
        """Whether the bracket stands here, which is then passed; with `must`, it has to."""
        self._skip()
        if self._text.startswith(bracket, self._at):
            self._at += 1
            return True
        if must:
            raise self._wrong(f"expected {expected}")
        return False

    def _comma(self) -> int | None:
        """Where the comma ends that comes next, which is then passed; None if none does."""
        self._skip()
        if not self._text.startswith(",", self._at):
            return None
        self._at += 1
        return self._at

    def _key(self) -> str:
        found = _STRING.match(self._text, self._at) or _NAME.match(self._text, self._at)
        if found is None:
            raise self._wrong("expected a key")
        self._at = found.end()
        return _unescaped(found[0][1:-1] if found[0][0] in "\"'" else found[0])

    def _skip(self) -> None:
        self._at = after_trivia(self._text, self._at)

    def _wrong(self, expected: str) -> ValueError:
        found = self._text[self._at : self._at + 1]
        shown = f"found {found!r}" if found else "the file ends here"
        return ValueError(f"{place(self._text, self._at)}: {expected}, {shown}")


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    units = _ESCAPE.sub(lambda found: _meant(found[0][1:]), text)
    # Two escapes may be the halves of one character.
    return units.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _meant(escape: str) -> str:
    if escape[0] in "ux" and len(escape) > 1:
        return chr(int(escape[1:], 16))
    return "" if escape in _LINE_ENDS else _ESCAPED.get(escape, escape)


def _number(text: str) -> float:
    sign, digits = (-1 if text[0] == "-" else 1), text.lstrip("+-")
    if digits[:2] in ("0x", "0X"):
        return sign * int(digits, 16)
    # float: a whole number of many thousand digits is an error for int
    return sign * (int(digits) if digits.isdigit() and len(digits) < 20 else float(digits))
