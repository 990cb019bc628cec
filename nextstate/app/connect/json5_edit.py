"""One value of a JSON5 text is set; every other character stays as it is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from nextstate.app.connect.json5_text import (
    Array,
    Node,
    Object,
    after_trivia,
    parse,
    place,
    plain,
)
from nextstate.wire import obj

_SAME_LINE_COMMENTS = re.compile(
    r"(?:(?<![ \t])[ \t]++(?=/[/*])|//[^\n\r\u2028\u2029]*+|/\*(?>[\s\S]*?(?:\*/|\Z)))*+"
)
_INDENT = re.compile(r"[ \t]*")
_FIRST_INDENT = re.compile(r"\n([ \t]+)[^\s*]")


@dataclass(frozen=True, slots=True)
class Item:
    """A step into an array: to the object with this `id`, or to the string itself."""

    id: str


Step = str | Item


def set_value(text: str, path: tuple[Step, ...], value: object) -> str:
    """The text with `value` at `path`; what is missing on the way is added at the end.

    Raises ValueError for a text that is not JSON5, and for a path through another kind of value.
    """
    node = parse(text)
    for depth, step in enumerate(path):
        child = _child(text, node, path[:depth], step)
        if child is None:
            assert isinstance(node, Object | Array)
            return _added(text, node, step, _wrapped(path[depth + 1 :], value))
        node = child
    if json.dumps(plain(node)) == json.dumps(value):
        return text
    return text[: node.start] + _shown(text, value, _indent(text, node.start)) + text[node.end :]


def _child(text: str, node: Node, path: tuple[Step, ...], step: Step) -> Node | None:
    """What the step leads to; None if it is missing. Raises ValueError."""
    if isinstance(step, str) and isinstance(node, Object):
        return next((m.value for m in reversed(node.members) if m.key == step), None)
    if isinstance(step, Item) and isinstance(node, Array):
        return next((item for item in node.items if _is(item, step.id)), None)
    expected = "an object" if isinstance(step, str) else "an array"
    name = ".".join(one if isinstance(one, str) else one.id for one in path) or "the whole file"
    raise ValueError(f"{place(text, node.start)}: expected {expected} as the value of {name}")


def _is(node: Node, name: str) -> bool:
    value = plain(node)
    return name in (value, obj(value).get("id"))


def _wrapped(path: tuple[Step, ...], value: object) -> object:
    """The value inside of the objects and arrays that lead to it."""
    for depth in range(len(path) - 1, -1, -1):
        step = path[depth]
        value = {step: value} if isinstance(step, str) else [_identified(step, value)]
    return value


def _identified(step: Step, value: object) -> object:
    """What a step adds: an object that is found by its `id` gets it."""
    return {"id": step.id} | obj(value) if isinstance(step, Item) and value != step.id else value


def _added(text: str, node: Object | Array, step: Step, value: object) -> str:
    """The text with one more member or item after the last one of `node`."""
    children = node.members if isinstance(node, Object) else node.items
    key = f"{json.dumps(step, ensure_ascii=False)}: " if isinstance(step, str) else ""
    value = _identified(step, value)
    line = "\r\n" if "\r\n" in text else "\n"
    outer = _indent(text, node.start)
    deeper = outer + _unit(text)
    if not children:
        at = (
            node.start + 1 + len(text[node.start + 1 : after_trivia(text, node.start + 1)].rstrip())
        )
        closing = "" if "\n" in text[at : node.end] else line + outer
        return f"{text[:at]}{line}{deeper}{key}{_shown(text, value, deeper)}{closing}{text[at:]}"
    start, last = children[-1].start, children[-1].end
    after = node.comma or last
    before, more = ("", ",") if node.comma else (",", "")
    if "\n" not in text[node.start : node.end]:
        added = f"{before} {key}{json.dumps(value, ensure_ascii=False)}{more}"
        return text[:after] + added + text[after:]
    begins_line = not text[text.rfind("\n", 0, start) + 1 : start].strip()
    indent = _indent(text, start) if begins_line else deeper
    comments = _SAME_LINE_COMMENTS.match(text, after)
    at = comments.end() if comments else after
    added = f"{line}{indent}{key}{_shown(text, value, indent)}{more}"
    return text[:last] + before + text[last:at] + added + text[at:]


def _shown(text: str, value: object, indent: str) -> str:
    """The value as JSON whose lines after the first begin with `indent`."""
    lines = json.dumps(value, ensure_ascii=False, indent=_unit(text)).split("\n")
    return (("\r\n" if "\r\n" in text else "\n") + indent).join(lines)


def _indent(text: str, position: int) -> str:
    """The white space with which the line of a position begins."""
    found = _INDENT.match(text, text.rfind("\n", 0, position) + 1)
    return found[0] if found else ""


def _unit(text: str) -> str:
    """One level of indentation, as the first indented line has it; two spaces without one."""
    found = _FIRST_INDENT.search(text)
    return found[1] if found else "  "
