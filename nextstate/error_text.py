"""What logs and stored reasons may say of an error: nothing that it may quote of what people said.

The text of many errors holds the value that they are about (a ValueError, a KeyError, a server's
refusal): a piece of a conversation. Of those only the kind is told, and where it happened.
"""

from __future__ import annotations

import re
import sqlite3
import traceback

import orjson
from aiohttp import ClientConnectionError
from sqlalchemy.exc import SQLAlchemyError

from nextstate.errors import NextStateError
from nextstate.records import Json
from nextstate.wire import obj

_QUOTES_NOBODY = (
    OSError,
    ClientConnectionError,
    sqlite3.Error,
    SQLAlchemyError,  # the store's engine hides what its statements are given
    TypeError,
    AttributeError,
    NameError,
    ImportError,
    MemoryError,
    RuntimeError,
)
_BEFORE_READING = frozenset({401, 403, 404, 405})
"""What a server answers before it has looked at a conversation: there its own words help."""
_LONGEST = 300
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


def safe_text(error: BaseException) -> str:
    """An error's own words if it is one of ours or quotes nobody; else its kind.

    >>> safe_text(KeyError("what somebody said")), safe_text(TimeoutError("after 3 s"))
    ('KeyError', 'TimeoutError: after 3 s')
    """
    if isinstance(error, NextStateError):
        return str(error)
    name = type(error).__name__
    text = str(error) if isinstance(error, _QUOTES_NOBODY) else ""
    return f"{name}: {text}" if text else name


def safe_traceback(error: BaseException) -> str:
    """A traceback, with its causes above it as usual, in which each error is `told`."""
    shown: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        place = "".join(traceback.format_tb(cause.__traceback__))
        kind = f"{type(cause).__name__}: " if isinstance(cause, NextStateError) else ""
        shown.append(f"{place}{kind}{safe_text(cause)}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\nwhich led to\n".join(reversed(shown))


def refusal(status: int, said: str) -> str:
    """What a server's answer with an error says: the status, and the error's names.

    >>> refusal(400, '{"error": {"code": "too_long", "message": "cannot take what you said"}}')
    '400 (too_long)'
    >>> refusal(404, "no such model")
    '404: no such model'
    """
    if status in _BEFORE_READING:
        return f"{status}: {said[:_LONGEST]}"
    try:
        names = error_names(obj(orjson.loads(said)))
    except orjson.JSONDecodeError:
        names = []
    return f"{status} ({', '.join(names)})" if names else str(status)


def error_names(answer: Json) -> list[str]:
    """The type, code and parameter that an API's error names, each a single word."""
    error = obj(answer.get("error", answer))
    found = dict.fromkeys(str(error.get(key, "")) for key in ("type", "code", "param"))
    return [name for name in found if name != "None" and _NAME.fullmatch(name)]
