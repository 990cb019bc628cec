"""Which lineage a request belongs to: by the key that it carries, or by the model that it names."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from nextstate.records import MAIN_LINEAGE


@dataclass(frozen=True, slots=True)
class Access:
    """One lineage's door."""

    model: str | None
    """The model name that reaches it, besides the engine's own for whoever has the key."""
    key: str | None
    """The only key that reaches it; None where the name is enough."""


@dataclass(frozen=True, slots=True)
class Lineages:
    """Every lineage's door. A key opens one lineage and nothing of any other.

    Without a lineage's own key a request belongs to `main` under the engine's model name, or to the
    lineage without a key whose model it names.
    """

    engine_model: str
    main_key: str | None
    """What clients of `main` must send; None: nothing is asked of them."""
    doors: Mapping[str, Access] = field(default_factory=dict[str, Access])

    @property
    def names(self) -> list[str]:
        """Every lineage, `main` first."""
        return [MAIN_LINEAGE, *self.doors]

    @property
    def apart(self) -> bool:
        """Whether there are lineages that must not learn of each other."""
        return any(door.key is not None for door in self.doors.values())

    def caller(self, sent_key: str) -> str | None:
        """The lineage whose key this is, `main` for everyone else; None for a wrong key."""
        found = [
            name
            for name, door in self.doors.items()
            if door.key is not None and _same(sent_key, door.key)
        ]
        if found:
            return found[0]
        return MAIN_LINEAGE if self.main_key is None or _same(sent_key, self.main_key) else None

    def of(self, caller: str, model: str) -> str | None:
        """The lineage of a request that names `model`; None: there is no such model for it."""
        if model == self.engine_model:
            return caller
        return next(
            (name for name in self._open_to(caller) if self.doors[name].model == model), None
        )

    def models(self, caller: str) -> list[str]:
        """The further model names that a caller may use."""
        named = (self.doors[name].model for name in self._open_to(caller))
        return [model for model in named if model is not None]

    def sees(self, caller: str, lineage: str) -> bool:
        """Whether a caller may speak about turns of the lineage."""
        return lineage == caller or lineage in self._open_to(caller)

    def _open_to(self, caller: str) -> list[str]:
        if caller != MAIN_LINEAGE:
            return [caller]
        return [name for name, door in self.doors.items() if door.key is None]


def _same(sent: str, key: str) -> bool:
    # A header's bytes need not be UTF-8: aiohttp keeps what is not as surrogates.
    return hmac.compare_digest(sent.encode(errors="surrogateescape"), key.encode())
