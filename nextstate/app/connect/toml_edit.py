"""One value of a TOML text is set; every other character stays as it is.

The place is found line by line, which some legal texts can mislead. So the result is read again: if
anything but the one value differs, nothing is changed.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from typing import Any

_VALUE = r"""(?:"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+'|[^\s"'\[{#]++)"""
_HEADER = re.compile(r"^[ \t]*\[", re.MULTILINE)


def set_value(text: str, path: tuple[str, ...], value: object) -> str:
    """The text with `value` at `path`; a missing table is added at the end.

    The steps of the path are bare keys. Raises ValueError for a text that is not TOML, and for one
    where the value cannot be set by changing one line.
    """
    data = tomllib.loads(text)
    wanted = _with(data, path, value)
    if _as_text(wanted) == _as_text(data):
        return text
    edited = _edited(text, path, json.dumps(value, ensure_ascii=False))
    try:
        same = _as_text(tomllib.loads(edited)) == _as_text(wanted)
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise ValueError(
            f"{'.'.join(path)} is written in a way that cannot be changed here: set it to "
            f"{json.dumps(value, ensure_ascii=False)} yourself"
        )
    return edited


def _as_text(data: dict[str, Any]) -> str:
    """The data in a form that can be compared: NaN is unlike itself, and True is like 1."""
    return json.dumps(data, default=repr, sort_keys=True)


def _with(data: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    wanted = copy.deepcopy(data)
    table: Any = wanted
    for step in path[:-1]:
        if not isinstance(table.setdefault(step, {}), dict):
            raise ValueError(f"expected a table as the value of {step}")
        table = table[step]
    table[path[-1]] = value
    return wanted


def _edited(text: str, path: tuple[str, ...], shown: str) -> str:
    """The text after the change of one line, which may be the wrong one."""
    line = "\r\n" if "\r\n" in text else "\n"
    *table, key = path
    start = 0
    if table:
        name = r"[ \t]*\.[ \t]*".join(rf"(?:{step}|\"{step}\")" for step in table)
        form = rf"^[ \t]*\[[ \t]*{name}[ \t]*\][ \t]*(?:#[^\r\n]*)?(?=\r?$)"
        header = re.search(form, text, re.MULTILINE)
        if header is None:
            gap = "" if not text else line if text.endswith("\n") else line + line
            return f"{text}{gap}[{'.'.join(table)}]{line}{key} = {shown}{line}"
        start = header.end()
    following = _HEADER.search(text, start)
    end = following.start() if following else len(text)
    old = re.compile(rf"^([ \t]*(?:{key}|\"{key}\")[ \t]*=[ \t]*){_VALUE}", re.MULTILINE)
    if found := old.search(text, start, end):
        return f"{text[: found.end(1)]}{shown}{text[found.end() :]}"
    if table:
        return f"{text[:start]}{line}{key} = {shown}{text[start:]}"
    return f"{key} = {shown}{line}{text}"
