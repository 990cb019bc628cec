"""Reading JSON that others wrote: the wanted shape, or an empty one, never an exception."""

from __future__ import annotations

from typing import Any, cast

import orjson

from nextstate.records import Json


def json_object(data: bytes) -> Json | None:
    """The JSON object in `data`; None for anything else."""
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return cast(Json, parsed) if isinstance(parsed, dict) else None


def obj(value: object) -> Json:
    """`value` if it is an object, else an empty one."""
    return cast(Json, value) if isinstance(value, dict) else {}


def one_line(text: str) -> str:
    """Text that others wrote without what a terminal would obey, on one line.

    >>> one_line("a\\x1b[2Jb\\nc")
    'a [2Jb c'
    """
    return "".join(c if c.isprintable() else " " for c in text)


def objects(value: object) -> list[Json]:
    """The objects in `value` if it is a list, else none."""
    if not isinstance(value, list):
        return []
    return cast("list[Json]", [item for item in cast("list[Any]", value) if isinstance(item, dict)])
