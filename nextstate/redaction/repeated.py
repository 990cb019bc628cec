"""What a secret's value alone does not tell: where it is said again, without the name before it.

`password: hunter2Xy9` is found by its name. A reply that says `hunter2Xy9` is not, unless the value
is known. So what was found by a name is looked for in what was said after it, within one exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from nextstate.records import Json
from nextstate.redaction import Redactor, placeholder
from nextstate.wire import write_json

TOO_LONG = "[too long to search]"
"""Stands for a text that was not searched."""
MOST_SEARCHED = 4 << 20
"""Characters of one exchange that are searched: a hostile text takes two seconds a million."""
_NAMED = frozenset(("password", "phone", "national_id", "card"))
"""Kinds that the words before a value may have given away; others have a form of their own."""
_SHORTEST = 8
"""Characters: a shorter value may be a word that means something else elsewhere."""
_MOST = 64
"""Values that an exchange looks for."""

Values = Mapping[str, str]
"""What stands for each value."""


def repeatable(redactor: Redactor, value: Any, kept: Any) -> Values:
    """The secrets in a JSON value that may be said again; `kept` is the value without them."""
    found: dict[str, str] = {}
    for secret, stands in _pairs(redactor, value, kept):
        if len(secret) >= _SHORTEST and not secret.isalpha():
            found[secret] = stands
        if len(found) == _MOST:
            break
    return found


class Known:
    """What was named so far in one exchange: the latest of it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._written: list[bytes] = []

    def add(self, found: Values) -> None:
        """Adds what a message named."""
        if found:
            self.values |= found
            for old in [*self.values][:-_MOST]:
                del self.values[old]
            self._written = [write_json(secret)[1:-1] for secret in self.values]

    def stands_in(self, written: bytes) -> bool:
        """Whether a value's JSON may hold one of them."""
        return any(secret in written for secret in self._written)


def without(value: Any, known: Values) -> Any:
    """A JSON value whose texts do not hold the secrets; itself if none does."""
    if isinstance(value, str):
        text = value
        for secret, stands in known.items():
            if secret in text:
                text = _replaced(text, secret, stands)
        return value if text == value else text
    if isinstance(value, list):
        old = cast("list[Any]", value)
        new = [without(one, known) for one in old]
        return new if any(a is not b for a, b in zip(new, old, strict=True)) else old
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        others = {name: without(one, known) for name, one in fields.items()}
        return others if any(others[name] is not fields[name] for name in fields) else fields
    return value


def redacted_messages(redactor: Redactor, messages: Sequence[Json]) -> list[Json]:
    """The messages of a conversation without secrets, and without what earlier ones told to be."""
    known, searched, found = Known(), 0, list[Json]()
    for message in messages:
        searched += size_of(message)
        if redactor and searched > MOST_SEARCHED:
            found.append({"role": message.get("role"), "content": TOO_LONG})
            continue
        kept = redactor.value(message)
        known.add(repeatable(redactor, message, kept))
        if known.stands_in(write_json(kept)):
            kept = without(kept, known.values)
        found.append(kept)
    return found


def size_of(value: Any) -> int:
    """The characters of a JSON value that a search reads: its texts without pictures."""
    if isinstance(value, str):
        return 0 if value.startswith("data:image/") else len(value)
    if isinstance(value, list):
        return sum(map(size_of, cast("list[Any]", value)))
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return sum(map(len, fields)) + sum(map(size_of, fields.values()))
    return 0


def _pairs(redactor: Redactor, value: Any, kept: Any) -> Iterator[tuple[str, str]]:
    """(secret, what stands for it) in a value; its form is that of `kept`."""
    if value is kept:
        return
    if isinstance(value, str):
        spans = redactor.spans(value)
        for span in spans:
            if span.kind in _NAMED:
                yield value[span.start : span.end], placeholder(span.kind)
        if not spans and kept == placeholder("password"):  # the field's name gave it away
            yield value, kept
    elif isinstance(value, list | dict):
        old, new = cast("Any", value), kept
        if isinstance(value, dict):
            old, new = old.values(), new.values()
        for one, other in zip(old, new, strict=False):
            yield from _pairs(redactor, one, other)


def _replaced(text: str, secret: str, stands: str) -> str:
    """A text without the secret where it stands as a word of its own."""
    parts, end, at = list[str](), 0, text.find(secret)
    while at >= 0:
        after = at + len(secret)
        if not (text[at - 1 : at].isalnum() or text[after : after + 1].isalnum()):
            parts += (text[end:at], stands)
            end = after
        at = text.find(secret, after)
    return "".join((*parts, text[end:]))
