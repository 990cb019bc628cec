"""Whether an engine told a tool call's arguments again instead of going on with them."""

from __future__ import annotations

import json
import string

_DECODER = json.JSONDecoder(parse_int=str, strict=False)
_IN_WORDS = f"{string.ascii_letters}{string.digits}-+.\\"
"""What may be left of a JSON number, word or escape that was cut."""


def begins_again(arguments: str, seams: list[int], *, cut: bool) -> bool:
    """Whether arguments are not JSON because a part that begins at a seam is a whole of its own.

    A tree repeats its names within each other, and its model may have left it open, or was `cut`.
    """
    begin = len(arguments) - len(arguments.lstrip())
    try:
        _, end = _DECODER.raw_decode(arguments, begin)
    except (ValueError, RecursionError):
        first = seams[0]  # each part may hold all that came before it
        if not arguments.startswith(arguments[begin:first], first):
            return False
        return not _is_beginning(arguments) or (not cut and _is_json(arguments[seams[-1] :]))
    seam = next((at for at in seams if at >= end), None)
    return seam is not None and not arguments[end:seam].strip()


def _is_beginning(text: str) -> bool:
    """Whether a text that is no JSON only lacks its end."""
    known = text.rstrip(_IN_WORDS)
    try:
        _DECODER.decode(known)
    except RecursionError:
        return True
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            return True
        at_end = not known[error.pos :].strip()
        return at_end and (known == text or error.msg == "Expecting value")
    return False


def _is_json(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
