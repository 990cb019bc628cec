"""The JSON that agents make of arguments that a model wrote wrongly or did not end."""

from __future__ import annotations

import re

_PIECE = re.compile(
    r"""
    "(?P<double>[^"\\]*+(?:\\.[^"\\]*+)*+\\?)"?
    | '(?P<single>[^'\\]*+(?:\\.[^'\\]*+)*+\\?)'?
    | (?P<mark>[\[\]{}:,])
    | (?P<bare>[^\s\[\]{}:,"']++)
    """,
    re.VERBOSE | re.DOTALL,
)
_CLOSING = {"{": "}", "[": "]"}
_WORDS = {"True": "true", "False": "false", "None": "null", "undefined": "null"}
_ESCAPED = re.compile(r"""(?P<cut>\\(?:u[0-9a-fA-F]{0,3})?\Z)|\\.|["]""", re.DOTALL)
_IN_DOUBLE_QUOTES = {"\\'": "'", '"': '\\"'}


def repaired(text: str) -> str | None:
    """`text` as JSON: Python's spelling read, commas too many dropped, all that is open closed.

    A key without a value is dropped at the end. None if `text` is no object and no list. The result
    need not be JSON. The time is linear.

    >>> repaired("{'a': True, 'b': [1, {'c': 'd"), repaired('{"a": 1, "b":'), repaired("rm -r")
    ('{"a":true,"b":[1,{"c":"d"}]}', '{"a":1}', None)
    """
    text = text.lstrip("\ufeff \t\r\n")
    if text[:1] not in _CLOSING:
        return None
    out: list[str] = []
    opened: list[str] = []
    kind, is_key = "", False
    for piece in _PIECE.finditer(text):
        kind, found = str(piece.lastgroup), piece[0]
        is_key = kind != "mark" and opened[-1:] == ["{"] and out[-1] in "{,"
        if found in _CLOSING:
            opened.append(found)
        elif found in ("}", "]"):
            if not opened or _CLOSING[opened.pop()] != found:
                return None
            _drop(out, ",")
        elif kind == "bare":
            found = f'"{found}"' if is_key else _WORDS.get(found, found)
        elif kind != "mark":
            found = f'"{_ESCAPED.sub(_in_double_quotes, piece[kind])}"'
        out.append(found)
    if opened:
        if is_key or out[-1] == ":":
            _drop(out, ":")
            out.pop()
        elif kind == "bare":
            out[-1] = _ended(out[-1]) or "null"
        _drop(out, ",")
    return "".join([*out, *(_CLOSING[one] for one in reversed(opened))])


def _drop(out: list[str], mark: str) -> None:
    while out and out[-1] == mark:
        out.pop()


def _in_double_quotes(found: re.Match[str]) -> str:
    """An escape or a quote in a text; nothing for an escape that was cut."""
    return "" if found["cut"] else _IN_DOUBLE_QUOTES.get(found[0], found[0])


def _ended(bare: str) -> str:
    """A word or a number that may have been cut."""
    words = (word for word in ("true", "false", "null") if word.startswith(bare))
    return next(words, bare.rstrip(".eE+-"))
