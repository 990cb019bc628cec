"""Bounds for the schemas and grammars that an engine would compile: one alone can end it for all.

Measured with vLLM 0.32's own compilers (xgrammar, llguidance), of which the slower one counts:
2000 optional properties, `const` with 100 kB and a `pattern` with `.{1,2000}` take over 10 s each,
20 million `minItems` 4.5 GB. `proxy/patterns.py` says what a `pattern` costs.
What is told to the engine and not compiled is not looked at.
"""

from __future__ import annotations

import re
from math import isqrt
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

from nextstate.records import Json
from nextstate.wire import obj, objects, read_json
from proxy.dialects.chat import is_off
from proxy.dialects.messages_tools import tool_changes
from proxy.patterns import cost_of, counts

_FIELDS = (
    *("response_format", "structured_outputs", "output_format", "output_config"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
_ITEMS = frozenset(
    f"{side}{what}" for side in ("min", "max") for what in ("Items", "Contains", "Properties", "")
)
_LENGTHS = frozenset(("minLength", "maxLength"))
_MOST = dict.fromkeys(_ITEMS, 10_000) | dict.fromkeys(_LENGTHS, 1_000_000)
_MOST_IN_ALL = 10_000_000
"""All counts and lengths of a request together."""
_MOST_DEPTH = 100
"""vLLM itself takes 64 levels, and 16 around them."""
_MOST_OBJECTS = 3000
_MOST_ENTRIES, _MOST_VALUES = 1000, 10_000
"""Of one object or array, and of one that holds values alone."""
_VALUES = frozenset(("enum", "required", "choice", "guided_choice", "triggers"))
_LONGEST_TEXT, _MOST_TEXT = 10_000, 100_000
"""Characters of one name or value, and of all of them."""
_LONGEST_GRAMMAR = 100_000
_COPIES_IN_PATTERN, _REPEATED_IN_PATTERN, _LEFT_OUT_OF_PATTERN = 20_000, 1000, 150
"""The copies that the compiler makes of a `pattern`, the root of the squares of its counts, and its
parts that may be left out."""
_IN_PATTERNS, _LEFT_OUT_OF_PATTERNS = 2 * _REPEATED_IN_PATTERN**2, 4 * _LEFT_OUT_OF_PATTERN**2
"""The squares of the last two, of all patterns together."""
_WAYS = 2000
"""In which parts that vary, side by side, may be read; twice as many in all patterns together."""
_REPEATED, _LEFT_OUT_OF_REGEX, _LEFT_OUT_OF_GRAMMAR = 100_000, 500, 1000
"""The same of an expression or a grammar, which are compiled faster."""
_NAMED = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
)
"""Objects whose keys are names that somebody chose."""
_NOTES = frozenset(("description", "title", "$comment", "examples", "default", "name", "$id"))
_REFERENCES = frozenset(("$ref", "$dynamicRef", "$recursiveRef"))
_AS_JSON = frozenset(("json", "guided_json", "structural_tag", "json_schema", "schema"))
"""Where a schema may stand as a text."""


class _Part(NamedTuple):
    """A value within a schema."""

    path: str
    key: str
    value: object
    depth: int
    named: bool = False
    """Whether it is an object with names for keys."""


class _Excess(Exception):
    """What exceeds its bound."""


def excess(body: Json) -> str | None:
    """What in a request's schemas and grammars exceeds its bound, or None."""
    parts = [_Part(name, name, body[name], 0) for name in _FIELDS if body.get(name) is not None]
    if (form := obj(body.get("text")).get("format")) is not None:
        parts.append(_Part("text.format", "format", form, 0))
    added = [tool for _, tool in tool_changes(body)]
    if _compiles_tools(body, added):
        parts += [_Part("tools", "tools", body.get("tools"), 0), _Part("tools", "tools", added, 0)]
    if not parts:
        return None
    try:
        _Sizes().measure(parts)
    except _Excess as found:
        return str(found)
    return None


def _compiles_tools(body: Json, added: list[Json]) -> bool:
    """Whether the reply is bound to the schemas of the tools. Messages may have `added` some."""
    tools = [*objects(body.get("tools")), *added]
    tools += [inner for tool in tools for inner in objects(tool.get("tools"))]
    if not tools:
        return False
    named: object = body.get("tool_choice")
    choice = obj(named)
    free = named in (None, "auto", "none") or choice.get("type") in ("auto", "none")
    single = body.get("parallel_tool_calls") is not None and is_off(body["parallel_tool_calls"])
    if not free or single or choice.get("disable_parallel_tool_use"):
        return True
    strict = [tool.get("strict") or obj(tool.get("function")).get("strict") for tool in tools]
    return any(not is_off(value) for value in strict)


class _Sizes:
    """Adds up what a request's schemas hold. Every method raises _Excess."""

    def __init__(self) -> None:
        self._objects = 0
        self._text = 0
        self._in_all = 0.0
        self._repeated, self._left_out, self._ways = 0, 0, 0
        self._notes: list[_Part] = []
        """Those not looked at: no compiler reads them, unless a reference points into one."""
        self._referred = False
        """Whether one does."""

    def measure(self, parts: list[_Part]) -> None:
        """Takes in `parts` and all that is in them, in steps that the bounds limit."""
        while parts or (self._referred and self._notes):
            part = (parts or self._notes).pop()
            if part.depth > _MOST_DEPTH:
                raise _Excess(f"{_short(part.path)} is nested deeper than {_MOST_DEPTH} levels.")
            match part.value:
                case dict():
                    parts += self._object(part, cast(Json, part.value))
                case list():
                    parts += self._array(part, cast("list[Any]", part.value))
                case str():
                    parts += self._string(part, part.value)
                case int() | float():
                    self._number(part, part.value)
                case _:
                    pass

    def _object(self, part: _Part, value: Json) -> list[_Part]:
        _bounded(f"{part.path} has", len(value), _MOST_ENTRIES, "entries")
        self._objects += 1
        _bounded("The request's schemas have", self._objects, _MOST_OBJECTS, "objects")
        found: list[_Part] = []
        for key, inner in value.items():
            path = f"{part.path}.{key}"
            if key in _NOTES and not part.named and not self._referred:
                self._notes.append(_Part(path, key, inner, part.depth + 1))
                continue
            self._add_text(path, key)
            if part.named and part.key == "patternProperties":
                self._pattern(path, key)
            named = key in _NAMED and not part.named
            # A name says nothing about what it names.
            found.append(_Part(path, "" if part.named else key, inner, part.depth + 1, named))
        return found

    def _array(self, part: _Part, value: list[Any]) -> list[_Part]:
        most = _MOST_VALUES if part.key in _VALUES else _MOST_ENTRIES
        _bounded(f"{part.path} has", len(value), most, "entries")
        return [
            _Part(f"{part.path}[{at}]", part.key, inner, part.depth + 1)
            for at, inner in enumerate(value)
        ]

    def _string(self, part: _Part, value: str) -> list[_Part]:
        if part.key in ("grammar", "guided_grammar"):
            _bounded(f"{part.path} has", len(value), _LONGEST_GRAMMAR, "characters")
            _bounded(f"{part.path} has", max(map(len, value.split('"'))), _LONGEST_TEXT, "in a row")
            _grammar(part.path, value)
        elif part.key in _AS_JSON:
            _bounded(f"{part.path} has", len(value), 4 * _MOST_TEXT, "characters")
            try:
                inner = read_json(value.encode(errors="surrogatepass"))
            except ValueError:
                return []  # the engine says what is wrong with it
            return [] if isinstance(inner, str) else [part._replace(value=inner)]
        else:
            self._add_text(part.path, value)
            if part.key in _REFERENCES:
                self._referred |= not _NOTES.isdisjoint(re.split("[#/]", unquote(value)))
            if part.key == "pattern":
                self._pattern(part.path, value)
            elif part.key in ("regex", "guided_regex"):
                _expression(part.path, value)
        return []

    def _number(self, part: _Part, value: float) -> None:
        if (most := _MOST.get(part.key)) is not None:
            if not value <= most:
                raise _Excess(f"{_short(part.path)} = {value!s:.40}: at most {most}.")
            self._in_all += max(value, 0)
            _bounded("All counts and lengths add up to", self._in_all, _MOST_IN_ALL, "")

    def _pattern(self, path: str, pattern: str) -> None:
        cost = cost_of(pattern)
        _bounded(f"{path} repeats", cost.copies, _COPIES_IN_PATTERN, "times")
        squares = max(cost.squares, max(counts(pattern)) ** 2)
        _bounded(f"{path} repeats", isqrt(squares), _REPEATED_IN_PATTERN, "times")
        _bounded(f"{path} lets", cost.left_out, _LEFT_OUT_OF_PATTERN, "parts be left out")
        _bounded(f"{path} can be read in", cost.ways, _WAYS, "ways")
        self._repeated += squares
        self._left_out += cost.left_out**2
        for what, found, most in (
            ("repeats", self._repeated, _IN_PATTERNS),
            ("leaves out", self._left_out, _LEFT_OUT_OF_PATTERNS),
        ):
            all_of_it = f"All patterns repeat or leave out too much: together as one that {what}"
            _bounded(all_of_it, isqrt(found), isqrt(most), "times")
        self._ways += cost.ways
        _bounded("All patterns together can be read in", self._ways, 2 * _WAYS, "ways")

    def _add_text(self, path: str, text: str) -> None:
        _bounded(f"{path} has", len(text), _LONGEST_TEXT, "characters")
        self._text += len(text)
        _bounded("The schemas' names and values have", self._text, _MOST_TEXT, "characters")


def _expression(path: str, text: str) -> None:
    cost = cost_of(text)
    _bounded(f"{path} repeats", max(cost.copies, sum(counts(text))), _REPEATED, "times")
    _bounded(f"{path} lets", cost.left_out, _LEFT_OUT_OF_REGEX, "parts be left out")
    _bounded(f"{path} can be read in", cost.ways, _WAYS, "ways")


def _grammar(path: str, text: str) -> None:
    _bounded(f"{path} repeats", sum(counts(text)), _REPEATED, "times")
    left_out = text.count("?") + text.count("*")
    _bounded(f"{path} lets", left_out, _LEFT_OUT_OF_GRAMMAR, "parts be left out")


def _bounded(what: str, size: float, most: int, unit: str) -> None:
    if size > most:
        raise _Excess(f"{_short(what)} {size:.0f} {unit}".rstrip() + f": at most {most}.")


def _short(text: str) -> str:
    """A path as a message shows it: its end says most."""
    return text if len(text) <= 200 else f"…{text[-199:]}"
