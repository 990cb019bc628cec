"""One visit of a page: who asks, what the address says, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy.answers import Refused

_NUMBER = re.compile(r"[0-9]{1,12}")
_ID = re.compile(r"[\w.:~+-]{1,100}")
_MOST_CHARS = 200


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks for a page."""

    lineage: str
    """Whose key it is."""
    sees: tuple[str, ...]
    """The lineages that it may look at and change."""
    cookie: str
    logged_in: bool
    may_change: bool
    """Whether it may use the page's forms."""
    who: str
    """One name for each key."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A request for a page. Each method raises Refused."""

    visitor: Visitor
    address: str
    """Path and query, as the browser sent them."""
    names: tuple[str, ...]
    """What the path names, in its order."""
    query: Mapping[str, str]
    form: Mapping[str, str] = field(default_factory=dict[str, str])

    def number(self, name: str) -> int | None:
        """A number in the query; None without one."""
        text = self.query.get(name, "")
        if not text:
            return None
        if not _NUMBER.fullmatch(text):
            raise Refused(400, f"{name} = {text[:40]!r}: expected a number.")
        return int(text)

    def id(self, name: str) -> str | None:
        """The id of a turn or an episode in the query; None without one."""
        text = self.query.get(name, "")
        if not text:
            return None
        if not _ID.fullmatch(text):
            raise Refused(400, f"{name} = {text[:40]!r}: expected an id.")
        return text

    def text(self, name: str) -> str:
        """The beginning of a text in the query; it may be empty."""
        return self.query.get(name, "")[:_MOST_CHARS]

    def lineage(self) -> str:
        """The lineage that the query names, or the visitor's first one."""
        return self.seen(self.query.get("lineage") or self.visitor.sees[0])

    def seen(self, lineage: str) -> str:
        """The lineage, if the visitor may look at it."""
        if lineage not in self.visitor.sees:
            raise Refused(404, f"There is no lineage {lineage[:40]!r}.")
        return lineage
