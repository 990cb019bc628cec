"""Which lineage a request belongs to: by whose key it carries, or by the model that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web

from nextstate.records import MAIN_LINEAGE

CALLER: web.RequestKey[str] = web.RequestKey("lineage", str)
"""The lineage whose key a request carries."""


@dataclass(frozen=True, slots=True)
class Access:
    """How clients reach one lineage."""

    model: str | None
    """The model name that reaches it, besides the engine's own for whoever has the key."""
    key: str | None
    """The only key that reaches it; None if the model name is enough."""


@dataclass(frozen=True, slots=True)
class Lineages:
    """How clients reach each lineage. A key gives access to one lineage only.

    A request without a lineage's key belongs to `main` if it names the engine's model, or to the
    lineage without a key whose model it names.
    """

    engine_model: str
    main_key: str | None
    """The key that clients of `main` must send; None if they need none."""
    access: Mapping[str, Access] = field(default_factory=dict[str, Access])

    @property
    def names(self) -> list[str]:
        """Every lineage, `main` first."""
        return [MAIN_LINEAGE, *self.access]

    @property
    def apart(self) -> bool:
        """Whether there are lineages that must not learn about each other."""
        return any(access.key is not None for access in self.access.values())

    def of(self, caller: str, model: str) -> str | None:
        """The lineage of a request that names `model`; None if the caller has no such model."""
        if model == self.engine_model:
            return caller
        return next(
            (name for name in self._open_to(caller) if self.access[name].model == model), None
        )

    def models(self, caller: str) -> list[str]:
        """The further model names that a caller may use."""
        named = (self.access[name].model for name in self._open_to(caller))
        return [model for model in named if model is not None]

    def sees(self, caller: str, lineage: str) -> bool:
        """Whether a caller may give feedback on turns of the lineage."""
        return lineage == caller or lineage in self._open_to(caller)

    def _open_to(self, caller: str) -> list[str]:
        if caller != MAIN_LINEAGE:
            return [caller]
        return [name for name, access in self.access.items() if access.key is None]
