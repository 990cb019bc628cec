"""What an assistant message means, whichever way an agent writes it when it sends it back.

Agents strip thoughts, rename tool calls, reformat arguments, and split one reply into several
messages or join two into one. They repair arguments, and JavaScript rounds long numbers. So replies
are compared as one text and one list of calls, without the borders between messages. Where that
tells less than what was said, `Meaning.exact` tells replies apart.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from typing import NamedTuple, cast

from nextstate.hooks import text_of
from nextstate.records import Json
from nextstate.thoughts import without_thoughts
from nextstate.wire import obj, objects
from proxy.linking.repair import repaired

_NOTHING = ("", "null", "{}", "[]")
"""Ways to write that a call has no arguments."""
_NUMBER = "\0"
"""Stands before the spelling of a number, so that no text equals it."""
_CALL_BYTES = 16
_SPACE = b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"
"""What `str.split` cuts ASCII text at."""
_LONGEST_NUMBER = 400
_LONGEST_JSON, _LONGEST_REPAIRED = 1 << 20, 1 << 17
"""Characters of arguments that are read; a repair takes half a microsecond for each."""
_LONG_NUMBER = re.compile(r'"\\u0000(-?(?:\d{16,400}e-?\d{1,9}|\d{1,400}e\d{3,9}|Infinity)|NaN)"')
"""A canonical number that need not fit into the 64 bits of JavaScript."""
_MOST_STOPS, _MOST_ENDS = 16, 8
_CALLING, _OF_CODE = "Calling tools:\n", "python_interpreter"
"""smolagents sends calls back as text, in Python's spelling. Code in a text, which is no call, gets
this name."""
_PLACEHOLDERS = (b"(nocontent)",)
"""What agents send in place of an empty text, without white space."""
_PIECE = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]{1,256}")
"""What is composed at once: the time grows with the square of the marks on one letter."""
_THOUGHT_PARTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_text")


class Meaning(NamedTuple):
    """What one assistant message means; equal for all messages that mean the same."""

    text: bytes
    """Without thoughts and white space: an agent may send one text back in several parts."""
    calls: bytes
    """A 16-byte digest of each call's name and arguments; call ids do not count."""
    size: int
    """How many bytes of text, names and arguments tell this message from others."""
    exact: bytes = b""
    """A digest of what was said where the rest tells less than that; mostly empty."""


def meaning_of(message: Json) -> Meaning:
    """The parts of an assistant message that an agent's history keeps."""
    plain, given = without_thoughts(_text(message)), objects(message.get("tool_calls"))
    if _CALLING in plain and not given:
        plain, given = _written_calls(plain)
    text = without_space(plain)
    text = b"" if text in _PLACEHOLDERS else text
    called = [call.get("function") or call.get("custom") for call in given]
    called.append(message.get("function_call"))
    both = [_call(function) for found in called if (function := obj(found))]
    calls = [meant for meant, _ in both]
    digests = b"".join(_digest(call) for call in calls)
    exact = b"".join([own for meant, own in both if own != meant])
    return Meaning(text, digests, len(text) + sum(map(len, calls)), exact and _digest(exact))


def as_ended(
    reply: Meaning, stops: Sequence[bytes], met: Iterable[bytes] = ()
) -> Iterator[tuple[Meaning, set[bytes]]]:
    """A reply as an engine may have ended it, with the stop sequences at which it did.

    Agents write the sequence back, or more. The first and the last places count: white space, which
    does not, may have kept the engine from ending it. An engine may also tell the sequence. Those
    that other requests had, `met`, count at the end alone.
    """
    ends: dict[int, set[bytes]] = {}
    for stop in stops:
        at = reply.text.find(stop)
        for begin in {at, reply.text.rfind(stop)} if at >= 0 else ():
            for end in (begin, begin + len(stop)):
                ends.setdefault(end, set()).add(stop)
    for stop in met:
        if reply.text.endswith(stop):
            ends.setdefault(len(reply.text) - len(stop), set()).add(stop)
    ends.pop(len(reply.text), None)
    for end in sorted(ends)[:_MOST_ENDS]:
        size = reply.size - len(reply.text) + end
        yield reply._replace(text=reply.text[:end], size=size), ends[end]


def stops_of(request: Json) -> list[bytes]:
    """The stop sequences of a request, without white space."""
    given = request.get("stop")
    texts = cast("list[object]", given) if isinstance(given, list) else [given]
    found = [without_space(text_of(text)) for text in texts[:_MOST_STOPS]]
    return [stop for stop in found if stop]


def key_of(
    replies: Sequence[Meaning], scope: bytes = b"", parts: int = 0, texts: bytes | None = None
) -> bytes:
    """A 16-byte key of replies that follow each other; it is the same if they are split anew.

    The last `parts` are one reply: the order of its calls does not count, because an agent that
    runs them at the same time may send them back as they ended. An empty message between others
    adds nothing. At the end it counts as a reply. Keys of different scopes are different. `texts`
    is the `digest_of_texts` of the replies, if it is known.
    """
    first = len(replies) - parts
    together = b"".join([reply.calls for reply in replies[first:]])
    starts = range(0, len(together), _CALL_BYTES)
    ordered = sorted([together[at : at + _CALL_BYTES] for at in starts])
    calls = b"".join([*(reply.calls for reply in replies[:first]), *ordered])
    head = b"%b%d %d %b" % (scope, replies[-1].size == 0, len(calls), calls)
    said = digest_of_texts(replies) if texts is None else texts
    return hashlib.blake2b(head + said, digest_size=16).digest()


def digest_of_texts(replies: Sequence[Meaning]) -> bytes:
    """A 16-byte digest of all texts together."""
    digest = hashlib.blake2b(digest_size=16)
    for reply in replies:
        digest.update(reply.text)
    return digest.digest()


def without_space(text: str) -> bytes:
    """The text's bytes without white space, equal letters in one form."""
    if text.isascii():  # much faster, and the same
        return text.encode().translate(None, _SPACE)
    # A mark before a text goes, and half a character, of which agents keep a mark, was "?" before.
    text = _PIECE.sub(_composed, text).replace("\ufeff", "").replace("\ufffd", "?")
    return "".join(text.split()).encode(errors="surrogatepass")


def _composed(piece: re.Match[str]) -> str:
    return unicodedata.normalize("NFC", piece[0])


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_CALL_BYTES).digest()


def _text(message: Json) -> str:
    content = message.get("content")
    parts = objects(content)
    if parts:
        content = [part for part in parts if part.get("type") not in _THOUGHT_PARTS]
    if text := text_of(content):
        return text
    return text_of([{"text": part.get("refusal")} for part in (*parts, message)])


def _written_calls(text: str) -> tuple[str, list[Json]]:
    """(a text without the calls that were written at its end, these calls)."""
    before, _, written = text.rpartition(_CALLING)
    try:
        calls = objects(json.loads(repaired(written[:_LONGEST_REPAIRED]) or "0"))
    except (ValueError, RecursionError):
        calls = []
    if not calls:
        return text, []
    return before, [one for one in calls if obj(one.get("function")).get("name") != _OF_CODE]


def _call(function: Json) -> tuple[bytes, bytes]:
    """(what a call means, what exactly it says)."""
    name = str(function.get("name")).lower()  # agents repair `Read` to `read`
    given = function.get("arguments", function.get("input", ""))
    meant = said = _canonical(given)
    if meant is None and isinstance(given, str) and len(given) <= _LONGEST_REPAIRED:
        meant = _canonical(repaired(given) or given)
    exact = _spelled(given, said)
    loose = exact if meant is None else _as_agents_read(_spelled(given, meant))
    call = json.dumps([name, loose]).encode()
    return call, call if exact == loose else json.dumps([name, exact]).encode()


def canonical_arguments(arguments: object) -> str:
    """The arguments of a call in one spelling: as JSON, or without white space if they are not.

    >>> canonical_arguments('{"n": 5000.0, "a": []}') == canonical_arguments({"a": [], "n": 5000})
    True
    """
    return _spelled(arguments, _canonical(arguments))


def _spelled(arguments: object, canonical: str | None) -> str:
    if canonical is None:
        canonical = "".join(arguments.split()) if isinstance(arguments, str) else "not JSON"
    return "" if canonical in _NOTHING else canonical


def _canonical(arguments: object) -> str | None:
    """The JSON of arguments in one spelling; None if they were cut short, or nest too deep."""
    try:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        value = _parsed(text)
        if isinstance(value, str) and not value.startswith(_NUMBER):
            value = _parsed(value) if value.strip() else None  # JSON within a JSON text
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return None


def _as_agents_read(canonical: str) -> str:
    """Numbers as JavaScript holds them, and truths that a model put in quotes without these."""
    if "\\u0000" in canonical:
        canonical = _LONG_NUMBER.sub(_as_float, canonical)
    return canonical.replace('"true"', "true").replace('"false"', "false")


def _as_float(number: re.Match[str]) -> str:
    value = float(number[1])
    return json.dumps(_number(repr(value))) if isfinite(value) else "null"


def _parsed(text: str) -> object:
    """The JSON value of a text, its numbers as `_number` spells them. Raises ValueError."""
    if len(text) > _LONGEST_JSON:
        raise ValueError(f"{len(text)} characters of JSON, more than {_LONGEST_JSON}")
    return json.loads(
        text, parse_int=_number, parse_float=_rounded, parse_constant=_NUMBER.__add__, strict=False
    )


def _rounded(text: str) -> str:
    """The spelling of a number with a point or an exponent, which programs keep in 64 bits."""
    rounded = float(text)
    return _number(repr(rounded) if isfinite(rounded) else text)


def _number(text: str) -> str:
    """One spelling for all equal numbers: `_NUMBER`, significant digits, exponent of ten.

    All digits stay: whole numbers that are equal as floats get different spellings.
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
