"""Which tokens of a reply come before its first secret."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate

from nextstate.redaction import Redactor


def tokens_before(
    pieces: Sequence[str], secrets: Collection[str], redactor: Redactor
) -> int | None:
    """How many tokens end before the first secret among them; None if it cannot be known.

    `pieces` are the tokens' texts, `secrets` what was found in the message that was made of them.
    Each of these must stand in the tokens too, letter by letter: a parser of tool calls may have
    written a text anew. What only the tokens hold, such as a thought that the client did not ask
    for, is searched here.
    """
    text = "".join(pieces)
    places = [text.find(secret) for secret in secrets]
    if min(places, default=0) < 0:
        return None
    places += (span.start for span in redactor.spans(text))
    ends = list(accumulate(map(len, pieces)))
    before = bisect_right(ends, min(places, default=len(text)))
    while places and before and not pieces[before - 1]:
        before -= 1  # a token without a text of its own may be the first byte of the secret
    return before
