"""A text as hashed features: its words, their character n-grams, neighbours, and structural signs.

The judge `rules` adds up one row of weights for each feature. Everything is bounded: of a text
count `MAX_CHARS` characters at its two ends, a token counts once however often it is repeated, and
each pass is linear.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

BITS = 16
"""Features are hashed to 2 ** BITS rows."""
MAX_CHARS = 600
_SHORTEST, _LONGEST = 2, 5
_ACCENT = re.compile(r"[\u0300-\u036f]+")
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufe0e\ufe0f"
    r"\U000e0000-\U000e007f]+"
)
_HAN = "\u3400-\u9fff"
_TOKEN = re.compile(
    rf"[^\W\d_{_HAN}]{{1,40}}(?:'[^\W\d_{_HAN}]{{1,20}})?|\d{{1,40}}|[{_HAN}]|[.!?]{{1,40}}|[^\w\s]"
)
_DIGITS = str.maketrans("23456789’", "11111111'")
"""Of a digit only counts whether it is 0: "0 errors" differs from "3 errors"."""
_NUMBER = re.compile(r"\d+")


def plain(text: str) -> str:
    """The text without accents, invisible characters and the difference of wide and narrow forms.

    >>> plain("Größer\\u200b 𝐕𝐨𝐭𝐞")
    'Großer Vote'
    """
    if text.isascii() and text.isprintable():
        return text
    return _HIDDEN.sub("", _ACCENT.sub("", unicodedata.normalize("NFKD", text)))


def clipped(text: str) -> str:
    """The two ends of a text."""
    if len(text) <= MAX_CHARS:
        return text
    return f"{text[: MAX_CHARS // 2]}\n{text[-MAX_CHARS // 2 :]}"


def tokens_of(text: str) -> list[str]:
    """Words in lower case, numbers, Han characters and punctuation, in order.

    >>> tokens_of("It's 42, not 0?? 不对")
    ["it's", '11', ',', 'not', '0', '??', '不', '对']
    """
    return _TOKEN.findall(text.lower().translate(_DIGITS))


def pairs_of(tokens: Sequence[str]) -> set[str]:
    """The neighbours in a text, with its beginning and its end."""
    return {f"{one} {two}" for one, two in pairwise(["^", *tokens, "$"])}


def token_rows(token: str, speaker: int) -> list[int]:
    """The rows of a token and of its n-grams; the same word of another speaker has others."""
    whole = f"<{token}>"
    grams = [
        whole[start : start + length]
        for length in range(_SHORTEST, _LONGEST + 1)
        for start in range(len(whole) - length + 1)
    ]
    return [row_of(gram, speaker) for gram in (token, *grams)]


def row_of(name: str, speaker: int) -> int:
    """The row of one feature."""
    return crc32(name.encode("utf-8", "replace"), speaker) >> (32 - BITS)


def signs_of(text: str, tokens: Sequence[str], asked: str, reply: str) -> list[str]:
    """What the text looks like, and how much of it stood in the request or the reply."""
    reply = reply[-MAX_CHARS:]
    there = reply.lower()
    long = {token for token in tokens if len(token) > 3} or set(tokens)
    numbers = _NUMBER.findall(text)
    return [
        f"length {len(text).bit_length()}",
        f"end {text[-1:] if text[-1:] in '?!.' else ''}",
        f"question {'?' in text}",
        f"shouted {text.isupper()}",
        f"lines {chr(10) in text}",
        f"capital {text[:1].isupper()}",
        f"trails off {'...' in text or '…' in text}",
        f"asked {_share(long, asked[-MAX_CHARS:].lower())}",
        f"reply {_share(long, there)}",
        f"reply asks {there.endswith('?')}",
        f"reply calls {'({' in reply}",
        f"number {bool(numbers) + any(number in reply for number in numbers)}",
    ]


def _share(words: set[str], context: str) -> int:
    """How many quarters of the words stand in a context, rounded up."""
    return -(-4 * sum([word in context for word in words]) // (len(words) or 1))
