"""Secrets and personal data in texts: found, and replaced before anything is kept.

A secret becomes `[secret:KIND]`, always the same for a kind. No hash and no number tells two values
apart: a hash of a telephone number gives it away to whoever tries all of them, and a number would
depend on what was said before, so that a history which an agent cuts would read differently. What
is compared with a stored text is redacted in the same way, so it stays equal to itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

from nextstate.redaction.gates import number_kinds

__all__ = ["KINDS", "NOTHING", "PATTERN", "Redactor", "Span", "placeholder"]

PATTERN = "pattern"
"""The kind of what the user's own expressions match."""
_PASSWORD = "password"
KINDS = (
    *("private_key", "api_key", "iban", "card", "national_id", "email", "phone"),
    _PASSWORD,
)
"""What can be found. Where two overlap, the first counts."""
_OF_NUMBERS = frozenset(("iban", "card", "national_id", "phone"))
_SHORTEST = 6
"""No secret has fewer characters."""
_PICTURE = re.compile(
    r"data:[\w.+-]{1,60}/[\w.+-]{1,60}(?:;[\w=.+-]{1,60}){0,3};base64,[\w+/=%-]*+\Z"
)
_LONGEST_REMEMBERED, _MOST_REMEMBERED = 8192, 256
"""Characters of a text whose result is remembered in the process, and how many texts."""
_ESCAPES = "nrtbf"
_PLAIN_NAMES = frozenset(("role", "content", "type", "text", "name", "function", "arguments", "id"))
"""Names of fields in messages, which are no secrets and name none."""
_FIELD = re.compile(r"(?P<quote>\\{0,7}\")\s{0,9}:\s{0,9}\Z")
_FIELD_END = re.compile(r"\s{0,9}[,}]")
_LONGEST_FIELD = 28
"""What stands before and after a number in JSON, also within a text of JSON."""
_SMALLEST_NUMBER = 10**6
_NUMBER_NAMES = re.compile(
    r"phone|tel|fax|mobil|handy|cell|card|kart|tarjeta|ssn|social|dni|nie|tax|steuer|电话|手机|卡"
)
"""Names of fields whose numbers may tell a person."""


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def placeholder(kind: str) -> str:
    """What stands where a secret stood.

    >>> placeholder("email")
    '[secret:email]'
    """
    return f"[secret:{kind}]"


class Span(NamedTuple):
    """Characters `start` to `end` of a text are a secret of some kind."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Redactor:
    """Finds what is to be kept from disk. Without kinds and patterns it finds nothing."""

    kinds: frozenset[str] = frozenset(KINDS)
    patterns: tuple[re.Pattern[str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.kinds or self.patterns)

    def spans(self, text: str) -> Sequence[Span]:
        """The secrets in a text, in order; none overlaps another.

        A reply is searched once: the next request brings it again, as a message.
        """
        if len(text) < _SHORTEST:
            return ()
        long = len(text) > _LONGEST_REMEMBERED
        return _last_long(self, text) if long else _remembered(self, text)

    def search(self, text: str) -> list[Span]:
        """What `spans` returns, without looking whether it is remembered."""
        if len(text) < _SHORTEST or not self:
            return []
        if text.startswith("data:") and _PICTURE.match(text):
            return []
        found: list[Span] = []
        for pattern in self.patterns:
            found += (Span(*match.span(), PATTERN) for match in pattern.finditer(text))
        numbers = number_kinds(text)
        for kind, finder in _finders().items():
            if kind in self.kinds and (kind in numbers or kind not in _OF_NUMBERS):
                found += finder(text)
        if _PASSWORD in self.kinds:
            found += _passwords(text)
        return _apart(found, text) if found else found

    def text(self, text: str) -> str:
        """A text with placeholders for its secrets; itself if there are none."""
        spans = self.spans(text)
        if not spans:
            return text
        parts, end = list[str](), 0
        for span in spans:
            quote = _quote_of_number(text, span)
            parts += (text[end : span.start], quote, placeholder(span.kind), quote)
            end = span.end
        return "".join((*parts, text[end:]))

    def value(self, value: Any) -> Any:
        """A JSON value with its texts redacted, names of fields too; itself if none changes."""
        if not self:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            old = cast("list[Any]", value)
            new = [self.value(one) for one in old]
            return new if any(a is not b for a, b in zip(new, old, strict=True)) else old
        if isinstance(value, dict):
            return self._object(cast("dict[str, Any]", value))
        return value

    def secrets(self, value: Any) -> Iterator[str]:
        """The secrets themselves in the texts of a JSON value."""
        if isinstance(value, str):
            yield from (value[span.start : span.end] for span in self.spans(value))
        elif isinstance(value, list | dict):
            found = cast("Any", value)
            for one in found.values() if isinstance(value, dict) else found:
                yield from self.secrets(one)

    def comment(self, text: str | None, most: int) -> str | None:
        """A hint or comment of at most `most` characters, without secrets."""
        return text and self.text(text)[:most]

    def _number(self, name: str, number: int) -> int | str:
        """A number in a field, or what stands for it if the name and the number tell a secret."""
        if _NUMBER_NAMES.search(name.lower()) is None:
            return number
        written = f"{name}: {number}"
        place = len(written) - len(str(number)), len(written)
        whole = [span.kind for span in self.spans(written) if span[:2] == place]
        return placeholder(whole[0]) if whole else number

    def _object(self, value: dict[str, Any]) -> dict[str, Any]:
        changed, found = False, dict[str, Any]()
        for name, old in value.items():
            if name in _PLAIN_NAMES:
                found[name] = new = self.value(old)
                changed = changed or new is not old
                continue
            key = self.text(name)
            if _PASSWORD in self.kinds and isinstance(old, str) and _is_secret_of(name, old):
                new = placeholder(_PASSWORD)
            elif type(old) is int and old >= _SMALLEST_NUMBER:
                new = self._number(name, old)
            else:
                new = self.value(old)
            changed = changed or new is not old or key is not name
            found[key] = new
        return found if changed else value


@lru_cache(maxsize=_MOST_REMEMBERED)
def _remembered(redactor: Redactor, text: str) -> tuple[Span, ...]:
    return tuple(redactor.search(text))


@lru_cache(maxsize=1)
def _last_long(redactor: Redactor, text: str) -> tuple[Span, ...]:
    """Of a long text that is searched again at once, for what it named."""
    return tuple(redactor.search(text))


NOTHING = Redactor(frozenset())
"""Finds nothing."""


@lru_cache(maxsize=1)
def _finders() -> Mapping[str, Callable[[str], Iterator[Span]]]:
    """By kind. Imported late: their expressions take 0.1 s to compile, and few processes search."""
    from nextstate.redaction import forms, numbers

    finders = (forms.private_keys, forms.api_keys, numbers.ibans, numbers.cards)
    return dict(
        zip(KINDS, (*finders, numbers.national_ids, forms.emails, numbers.phones), strict=False)
    )


def _passwords(text: str) -> Iterator[Span]:
    from nextstate.redaction import forms, named

    yield from forms.url_passwords(text)
    yield from named.passwords(text)


def _is_secret_of(name: str, value: str) -> bool:
    from nextstate.redaction import named

    return named.is_secret_of(name, value)


def _quote_of_number(text: str, span: Span) -> str:
    """The quotes that a placeholder needs where a bare number of JSON stood; else nothing."""
    if not text[span.start : span.end].isdigit() or not _FIELD_END.match(text, span.end):
        return ""
    field = _FIELD.search(text[max(span.start - _LONGEST_FIELD, 0) : span.start])
    return "" if field is None else field["quote"]


def _apart(found: Sequence[Span], text: str) -> list[Span]:
    """Spans that do not overlap: of those that do, the union, under the first one's kind."""
    rank = {span: at for at, span in reversed(list(enumerate(found)))}
    joined: list[tuple[int, Span]] = []
    for span in sorted(set(found)):
        start = span.start
        if start and text[start - 1] == "\\" and text[start] in _ESCAPES and start + 1 < span.end:
            start += 1  # an escaped line end within JSON: without its letter it is broken
        at, span = rank[span], Span(start, span.end, span.kind)
        if joined and span.start < joined[-1][1].end:
            before_at, before = joined[-1]
            first = before if before_at <= at else span
            union = Span(before.start, max(before.end, span.end), first.kind)
            joined[-1] = min(before_at, at), union
        else:
            joined.append((at, span))
    return [span for _, span in joined]
