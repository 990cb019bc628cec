"""JSON from clients and engines: read as vLLM reads it, and written so that it reads the same."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, cast

import orjson

from nextstate.records import Json

_DIGITS = bytes(48 if 48 <= byte <= 57 else 0 for byte in range(256))
_BEYOND_64_BITS = b"0" * 19
"""The shortest number that may not fit has 19 digits; here every digit is replaced by 0."""
_INTEGER = re.compile(r"[+-]?[0-9]+(?:_[0-9]+)*(?:\.0+)?")
_CONTAINERS = (dict, list)
_LONGEST_NUMBER = 4300
"""Digits that Python accepts in `int(text)`. pydantic does not count leading zeros."""
_MOST_SLOW_VALUES = 200_000
"""Commas of a text that Python's parser must read. It and its writer take microseconds for each,
ten times as long as orjson, and nothing else runs meanwhile."""
MOST_LEVELS = 450
"""Nesting of objects and arrays; the recorder's pickles fail at 490."""


def json_object(data: bytes) -> Json | None:
    """The JSON object in `data`; None for anything else. For text of an engine or of ours."""
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return cast(Json, parsed) if isinstance(parsed, dict) else None


def read_json(data: bytes) -> Any:
    """The value in `data` as vLLM reads it, which uses Python's parser. Raises ValueError.

    orjson is faster and reads the same, except that it rounds numbers beyond 64 bits and refuses
    a byte order mark, UTF-16 and UTF-32, NaN and infinities, and lone surrogates. Where there are
    very many values, that is refused here too.
    """
    if _BEYOND_64_BITS not in data.translate(_DIGITS):
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass
    if data.count(b",") > _MOST_SLOW_VALUES:
        bare = b"".join(without_escapes(data).split(b'"')[::2])
        if bare.count(b",") > _MOST_SLOW_VALUES:
            if _BEYOND_64_BITS in bare.translate(_DIGITS):
                raise ValueError("it has many values and a number beyond 64 bits")
            return orjson.loads(data)  # many digits may be within a string
    try:
        return json.loads(data, parse_float=_read_float, parse_constant=_NotFinite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def without_escapes(data: bytes) -> bytes:
    """JSON in UTF-8 without escaped quotes and backslashes: its strings are between the quotes."""
    if 0 in data[:4]:  # UTF-16 and UTF-32: bytes of other characters look like quotes
        data = data.decode(json.detect_encoding(data), "ignore").encode()
    return data.replace(b"\\\\", b"").replace(b'\\"', b"")


def write_json(value: object) -> bytes:
    """JSON that `read_json` reads as `value`. Raises ValueError if it is nested too deep."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # what it cannot represent, or more than 254 levels
        pass
    if _is_deeper(value, MOST_LEVELS):
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
    return json.dumps(value, separators=(",", ":")).encode()


def integer(value: object) -> int | None:
    """`value` as a whole number in pydantic's lax mode, as vLLM reads it; None if refused."""
    if isinstance(value, str):
        text = value.strip()
        if not _INTEGER.fullmatch(text):
            return None
        digits = text.partition(".")[0].replace("_", "").lstrip("+-").lstrip("0") or "0"
        if len(digits) > _LONGEST_NUMBER:
            return None
        return -int(digits) if text[0] == "-" else int(digits)
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1 << 63 else None
    return int(value) if isinstance(value, int) else None


def obj(value: object) -> Json:
    """`value` if it is an object, else an empty one."""
    return cast(Json, value) if isinstance(value, dict) else {}


def one_line(text: str) -> str:
    """Text from others on one line, without control characters.

    >>> one_line("a\\x1b[2Jb\\nc")
    'a [2Jb c'
    """
    return "".join(c if c.isprintable() else " " for c in text)


def objects(value: object) -> list[Json]:
    """The objects in `value` if it is a list, else none."""
    if not isinstance(value, list):
        return []
    return cast("list[Json]", [item for item in cast("list[Any]", value) if isinstance(item, dict)])


def _is_deeper(value: object, levels: int) -> bool:
    """True if objects and arrays are nested deeper than `levels`."""
    level = _containers((value,))
    for _ in range(levels):
        level = [inner for one in level for inner in _containers(_entries(one))]
    return bool(level)


def _containers(values: Iterable[object]) -> list[object]:
    return [value for value in values if isinstance(value, _CONTAINERS)]


def _entries(container: object) -> Iterable[object]:
    if isinstance(container, dict):
        return cast("dict[str, object]", container).values()
    return cast("list[object]", container)


class _NotFinite(float):
    """NaN or an infinity: orjson would write null for a float, but refuses a subclass."""


def _read_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _NotFinite(value)
