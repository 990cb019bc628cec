"""What logs and stored reasons may say about an error: never a piece of a conversation.

The text of many errors quotes the value that they are about (ValueError, KeyError, a server's
refusal), which may be a person's words. Of such an error only its kind and its place are shown.
"""

from __future__ import annotations

import re
import sqlite3
import traceback

import orjson

from nextstate.errors import NextStateError
from nextstate.records import Json
from nextstate.wire import obj

_SAFE = (
    OSError,
    sqlite3.Error,
    TypeError,
    AttributeError,
    NameError,
    ImportError,
    MemoryError,
    RuntimeError,
)
"""Errors whose text quotes no conversation."""
_SAFE_OF_LIBRARIES = frozenset(
    {
        ("aiohttp.client_exceptions", "ClientConnectionError"),
        ("sqlalchemy.exc", "SQLAlchemyError"),  # the store hides the parameters of its statements
    }
)
"""The same, by module and name: importing these packages would slow down every command."""
_BEFORE_READING = frozenset({401, 403, 404, 405})
"""Statuses that a server answers before it reads a conversation: its text is safe and useful."""
_MAX_CHARS = 300
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


def safe_text(error: BaseException) -> str:
    """The text of an error if it is one of ours or quotes nobody; else only its kind.

    >>> safe_text(KeyError("what somebody said")), safe_text(TimeoutError("after 3 s"))
    ('KeyError', 'TimeoutError: after 3 s')
    """
    if isinstance(error, NextStateError):
        return str(error)
    name = type(error).__name__
    text = str(error) if _is_safe(error) else ""
    return f"{name}: {text}" if text else name


def _is_safe(error: BaseException) -> bool:
    kinds = {(kind.__module__, kind.__name__) for kind in type(error).__mro__}
    return isinstance(error, _SAFE) or not kinds.isdisjoint(_SAFE_OF_LIBRARIES)


def safe_traceback(error: BaseException) -> str:
    """A traceback with the error's causes above it; each error is shown by its `safe_text`."""
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


def refusal(status: int, body: str) -> str:
    """What may be shown of a server's error answer: the status and the error's names.

    >>> refusal(400, '{"error": {"code": "too_long", "message": "cannot take what you said"}}')
    '400 (too_long)'
    >>> refusal(404, "no such model")
    '404: no such model'
    """
    if status in _BEFORE_READING:
        return f"{status}: {body[:_MAX_CHARS]}"
    try:
        names = error_names(obj(orjson.loads(body)))
    except orjson.JSONDecodeError:
        names = []
    return f"{status} ({', '.join(names)})" if names else str(status)


def error_names(answer: Json) -> list[str]:
    """The type, code and parameter in an API's error, as far as each is a single word."""
    error = obj(answer.get("error", answer))
    found = dict.fromkeys(str(error.get(key, "")) for key in ("type", "code", "param"))
    return [name for name in found if name != "None" and _NAME.fullmatch(name)]
