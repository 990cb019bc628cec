"""What an assistant message means, however an agent writes it down when it sends it back.

Agents strip thoughts, rename tool calls, write arguments anew, and cut one reply into several
messages or make one message of two. So replies are compared as one text and one row of calls, in
which no message begins or ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

from nextstate.hooks import text_of
from nextstate.records import Json
from nextstate.thoughts import without_thoughts
from nextstate.wire import obj, objects

_NOTHING = ("", "null", "{}", "[]")
"""Arguments that say that there are none."""
_NUMBER = "\0"
"""Before a number's spelling, which else were a text's."""
_LONGEST_NUMBER = 400
_LONGEST_JSON = 1 << 20
_THOUGHT_PARTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_text")


class Meant(NamedTuple):
    """What one assistant message means."""

    text: bytes
    """Without thoughts and white space: what comes in one text may go back in several parts."""
    calls: tuple[bytes, ...]
    """Each with its name and arguments; without its id, which agents change."""

    @property
    def size(self) -> int:
        """How much there is to tell it from others, in bytes."""
        return len(self.text) + sum(map(len, self.calls))


def meant(message: Json) -> Meant:
    """The parts of an assistant message that survive an agent's history."""
    text = "".join(without_thoughts(_text(message)).split())
    given = objects(message.get("tool_calls"))
    called = [call.get("function") or call.get("custom") for call in given]
    called.append(message.get("function_call"))
    calls = (_call(function) for found in called if (function := obj(found)))
    return Meant(text.encode(errors="surrogatepass"), tuple(calls))


def canonical_reply(message: Json) -> bytes:
    """The same bytes for all messages that mean the same."""
    text, calls = meant(message)
    return b"\0".join([text, *calls])


def key_of(said: Sequence[Meant]) -> bytes:
    """The key of what messages mean one after the other: the same if they are cut anew.

    An empty message in between is nothing; at the end it is a reply of its own.
    """
    texts, calls = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for message in said:
        texts.update(message.text)
        for call in message.calls:
            calls.update(hashlib.blake2b(call, digest_size=16).digest())
    end = b"" if said[-1].size else b"empty"
    return hashlib.blake2b(texts.digest() + calls.digest() + end, digest_size=16).digest()


def meant_in(history: Sequence[Json]) -> list[Meant]:
    """What the assistant messages of a history mean."""
    return [meant(message) for message in history if message.get("role") == "assistant"]


def _text(message: Json) -> str:
    content = message.get("content")
    parts = objects(content)
    if parts:
        content = [part for part in parts if part.get("type") not in _THOUGHT_PARTS]
    refusals = [{"text": said.get("refusal")} for said in (*parts, message)]
    return text_of(content) or text_of(refusals)


def _call(function: Json) -> bytes:
    given = function.get("arguments", function.get("input", ""))
    return json.dumps([str(function.get("name")), canonical_arguments(given)]).encode()


def canonical_arguments(arguments: object) -> str:
    """The arguments of a call in one spelling: as JSON, or without white space if they are not.

    >>> canonical_arguments('{"n": 5000.0, "a": []}') == canonical_arguments({"a": [], "n": 5000})
    True
    """
    try:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        value = _parsed(text)
        if isinstance(value, str) and not value.startswith(_NUMBER):
            value = _parsed(value) if value.strip() else None  # JSON within a JSON text
        found = json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):  # cut, or deeper than anybody means it
        found = "".join(arguments.split()) if isinstance(arguments, str) else "not JSON"
    return "" if found in _NOTHING else found


def _parsed(text: str) -> object:
    """The JSON value of a text, its numbers as `_number` spells them. Raises ValueError."""
    if len(text) > _LONGEST_JSON:
        raise ValueError(f"{len(text)} characters of JSON, more than {_LONGEST_JSON}")
    return json.loads(
        text, parse_int=_number, parse_float=_rounded, parse_constant=str, strict=False
    )


def _rounded(text: str) -> str:
    """The spelling of a number with a point or an exponent, which programs keep in 64 bits."""
    rounded = float(text)
    return _number(repr(rounded) if isfinite(rounded) else text)


def _number(text: str) -> str:
    """One spelling for all that are equal: `_NUMBER`, significant digits, exponent of ten.

    No digit is lost: whole numbers that no float tells apart stay apart.
    """
    if len(text) > _LONGEST_NUMBER:
        return _NUMBER + text
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, fraction = mantissa.removeprefix("-").partition(".")
    digits = (whole + fraction).lstrip("0")
    significant = digits.rstrip("0")
    if not significant:
        return f"{_NUMBER}0"
    sign = "-" if mantissa.startswith("-") else ""
    power = int(exponent or 0) - len(fraction) + len(digits) - len(significant)
    return f"{_NUMBER}{sign}{significant}e{power}"
