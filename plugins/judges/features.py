"""A text as the rows of a weight table: hashed character n-grams, words and a few structural signs.

The judge `linear` adds up these rows. Everything is bounded: of a text count `MAX_CHARS` characters
at its two ends, and each pass over them is linear.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BITS = 16
"""The table has 2 ** BITS rows."""
MAX_CHARS = 600
_MAX_CONTEXT = 600
_MAX_WORDS = 60
_LONGEST = 5
_SHIFT = np.uint32(32 - BITS)
_FOLD = np.uint32(15)
_FIRST, _NEXT = np.uint32(2654435761), np.uint32(0x01000193)
_MIX = tuple(
    np.uint32(value) for value in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)
)
_DIGITS = str.maketrans("23456789", "11111111")
"""Only whether a number is 0 matters: "0 errors" differs from "3 errors"."""
_ACCENT = re.compile(r"[\u0300-\u036f]+")
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufe0e\ufe0f"
    r"\U000e0000-\U000e007f]+"
)
_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?。!?…]+(?:\s|$)")
_SHOUTED = re.compile(r"[A-Z]{4}")
_NUMBER = re.compile(r"\d+")


class Features(NamedTuple):
    """Rows of the table."""

    text: NDArray[np.intp]
    """Of the text's n-grams and words, each once."""
    signs: NDArray[np.intp]
    """Of the structural signs."""
    repeats: bool
    """The text says the same again and again."""


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


def features(text: str, asked: str, reply: str, speaker: str) -> Features:
    """The features of a plain, clipped text that followed `reply` to `asked`.

    `speaker` is "user" or "tool"; the same words of another speaker are other features. Without
    `asked` and `reply` (a bare phrase) there are no structural signs.
    """
    low = " ".join(text.lower().translate(_DIGITS).split())
    words = _WORD.findall(low)[:_MAX_WORDS]
    rows = np.concatenate([_ngrams(f" {low} ", speaker), _word_rows(words, speaker)])
    rows.sort()
    once = rows[np.flatnonzero(np.diff(rows, prepend=-1))]
    repeats = len(low) > 200 and len(once) < 0.3 * len(rows)
    signs = _signs(text, low, words, asked, reply, speaker) if asked or reply else []
    return Features(once, np.array(signs, np.intp), repeats)


def _ngrams(text: str, speaker: str) -> NDArray[np.intp]:
    """The rows of every run of 1 to 5 characters."""
    points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    first = points * _FIRST + np.uint32(len(speaker))
    key, found = first, []
    for length, mix in enumerate(_MIX):
        if length:
            key = key[:-1] * _NEXT ^ first[length:]
        mixed = key * mix
        found.append((mixed ^ mixed >> _FOLD) >> _SHIFT)
    return np.concatenate(found).astype(np.intp)


def _word_rows(words: list[str], speaker: str) -> NDArray[np.intp]:
    """The rows of single words and of pairs in a row."""
    keys = [zlib.crc32(f"{speaker} {word}".encode("utf-8", "replace")) for word in words]
    pairs = [(one * 31 ^ two * 17) & 0xFFFFFFFF for one, two in zip(keys, keys[1:])]
    return np.array([*keys, *pairs], np.intp) >> (32 - BITS)


@lru_cache(4096)
def _row(sign: str) -> int:
    return zlib.crc32(sign.encode()) >> (32 - BITS)


def _signs(
    text: str, low: str, words: list[str], asked: str, reply: str, speaker: str
) -> list[int]:
    """What the text looks like, and how much of it stood in the request or the reply."""
    long = [word for word in words if len(word) > 3] or words
    before = reply[-_MAX_CONTEXT:]
    numbers = set(_NUMBER.findall(text[:MAX_CHARS])) & set(_NUMBER.findall(before))
    found = (
        f"length {len(low).bit_length()}",
        f"ends with question {low.endswith('?')}",
        f"question {'?' in low}",
        f"exclamation {min(2, low.count('!'))}",
        f"shouted {_SHOUTED.search(text) is not None}",
        f"lines {chr(10) in text.strip()}",
        f"capital {text[:1].isupper()}",
        f"full stop {low.endswith('.')}",
        f"trails off {'...' in low or '…' in low}",
        f"sentences {min(4, len(_SENTENCE_END.findall(low)))}",
        f"asked {_share(long, asked[-_MAX_CONTEXT:])}",
        f"reply {_share(long, before)}",
        f"reply asks {before.rstrip().endswith('?')}",
        f"reply calls {'({' in before}",
        f"number {bool(numbers)}",
    )
    return [_row(f"{speaker} {sign}") for sign in found]


def _share(words: list[str], context: str) -> int:
    """How many quarters of the words stand in a context, rounded up."""
    there = set(_WORD.findall(context.lower()))
    return -(-4 * sum(word in there for word in words) // (len(words) or 1))
