"""What a text must hold so that a kind of secret can be in it: cheap tests before the expressions.

Most texts hold nothing. `re` takes some hundred instructions at each character that may begin
something; `translate`, `find` and `in` take a few. A gate may let a text pass in which nothing is
found, but it never stops one in which something would be: `tests/redaction/test_gates.py`.
"""

from __future__ import annotations

import re
import string

_UPPER, _DIGITS = string.ascii_uppercase.encode(), string.digits.encode()
_OF_KEYS = string.ascii_letters.encode() + _DIGITS + b"_.:/+=~-"
"""Each key that is known by its form is made of these alone."""
SHORTEST_KEY = 15
_DIGIT = re.compile("[0-9]")
_LONG = b"x" * SHORTEST_KEY
_SEPARATORS = b" ()./-"
"""May stand within a number."""


def _table(*classes: tuple[bytes, bytes], other: bytes) -> bytes:
    """What `translate` makes of each byte: the sign of its class."""
    signs = {byte: sign for characters, sign in classes for byte in characters}
    return b"".join(signs.get(byte, other) for byte in range(256))


_WORDS = _table((_OF_KEYS, b"x"), other=b" ")
_NUMBERS = _table((_DIGITS, b"0"), (_UPPER, b"A"), other=b"x")
_JOINS = _table((_DIGITS, b"0"), (_SEPARATORS, b"-"), (b"+", b"+"), other=b"x")


def one_byte_each(text: str) -> bytes:
    """A text with one byte for each character; `?` stands for those that are not ASCII."""
    return text.encode("ascii", "replace")


def long_words(text: str) -> str:
    """What may be keys: the words of a text that are long and hold a digit, one after the other."""
    shape = one_byte_each(text).translate(_WORDS)
    found: list[str] = []
    start = shape.find(_LONG)
    while start >= 0:
        end = shape.find(b" ", start)
        word = text[start:] if end < 0 else text[start:end]
        if _DIGIT.search(word) is not None:
            found.append(word)
        start = -1 if end < 0 else shape.find(_LONG, end)
    return " ".join(found)


def joins_digits(text: str) -> bool:
    """Whether a text may hold a telephone number that is written as one: not as digits alone."""
    shape = one_byte_each(text).translate(_JOINS)
    return b"0-0" in shape or b"0--0" in shape or b"+0" in shape


def number_kinds(text: str) -> tuple[str, ...]:
    """The kinds of numbers that may be in a text."""
    plain = one_byte_each(text).translate(_NUMBERS, _SEPARATORS)
    letters = b"A0" in plain
    kinds = ("iban",) if letters and b"AA00" in plain else ()
    if b"0" * 7 in plain:
        return (*kinds, "national_id", "phone", *(("card",) if b"0" * 13 in plain else ()))
    if letters and (b"AA000000A" in plain or b"A00A00A000A" in plain):
        return (*kinds, "national_id")
    return kinds
