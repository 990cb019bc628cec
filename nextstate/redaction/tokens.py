"""Which tokens of a reply hold a secret: spans of a text, found again among its tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from nextstate.redaction.forms import Span


def tokens_before(tokens: Sequence[bytes], spans: Sequence[Span], text: str) -> int:
    """How many tokens end before the first span of `text`, which the tokens' bytes decode to.

    Those after a secret were sampled with it in their context, which is not kept: so they cannot
    train either. `text` is `b"".join(tokens)` decoded with `errors="replace"`, where each byte
    that is no UTF-8 may have become one character.
    """
    if not spans:
        return len(tokens)
    first = byte_offset(b"".join(tokens), text, min(span.start for span in spans))
    ends = list(accumulate(map(len, tokens)))
    return bisect_right(ends, first)


def byte_offset(data: bytes, text: str, at: int) -> int:
    """Where the character `at` of `text` begins in `data`, which decodes to it with replacement.

    Errs to the left if bytes before it are no UTF-8.
    """
    offset = len(text[:at].encode())
    if data[:offset].decode(errors="replace") == text[:at]:
        return offset
    low = 0
    for high in range(min(offset, len(data)), -1, -1):  # each replaced byte became three
        if text.startswith(data[:high].decode(errors="replace").rstrip("�")) and (
            len(data[:high].decode(errors="replace")) <= at
        ):
            low = high
            break
    return low
