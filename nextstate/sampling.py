"""The settings from which a turn's tokens were drawn, in vLLM's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from nextstate.errors import RecordError

DEFAULTS = "defaults"
"""The key of `Turn.sampling` with the engine's own settings, where the client sent none."""
_LEAST_TEMPERATURE = 0.01
"""vLLM raises a smaller temperature to this, unless it is greedy."""
_GREEDY = 1e-5
"""Below this temperature vLLM takes the likeliest token."""
_MOST_BIAS = 100.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """What shaped the distribution of each token. The defaults leave it as the policy's own."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)"""
    allowed_token_ids: tuple[int, ...] = ()
    """The only tokens that may be drawn; () allows all."""

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Sampling:
        """From a request's fields, or from `Turn.sampling` with the engine's own settings in it.

        Raises RecordError for a value that vLLM would refuse.
        """
        given = {**_given(told.get(DEFAULTS) or {}), **_given(told)}
        read: dict[str, Any] = {}
        for name, value in given.items():
            try:
                read[name] = _READERS[name](value)
            except (TypeError, ValueError, AttributeError) as error:  # which may quote a text
                raise RecordError(f"the sampling setting {name} cannot be read") from error
        return cls(**read)

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest one. vLLM then ignores what only truncates."""
        return self.temperature < _GREEDY

    @property
    def divisor(self) -> float:
        """What the logits are divided by before they become probabilities.

        1 for a greedy turn: vLLM reports the log-probs of its tokens at temperature 1.
        """
        return 1.0 if self.is_greedy else max(self.temperature, _LEAST_TEMPERATURE)

    def sharper(self, temperature: float) -> Sampling:
        """The same settings with a temperature of at most this."""
        return replace(self, temperature=min(self.divisor, temperature))

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are left out."""
        shaped = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return shaped and not self.is_greedy

    @property
    def edits_logits(self) -> bool:
        """Whether single tokens' logits are changed, before the temperature."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias or self.allowed_token_ids)

    @property
    def is_plain(self) -> bool:
        """Whether the reported log-probs are those of the unchanged distribution."""
        return self.divisor == 1 and not self.truncates and not self.edits_logits


PLAIN = Sampling()
"""From the policy's own distribution."""
NAMES = tuple(field.name for field in fields(Sampling))
"""The fields of a request that `Sampling` holds."""


def _given(told: Mapping[str, Any]) -> dict[str, Any]:
    return {n: value for n, value in told.items() if n in _READERS and value is not None}


def _number(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{found} is not finite")
    return found


def _top_k(value: Any) -> int:
    return max(0, int(value))


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    told = cast("dict[str, Any]", value)
    read = {int(token): _number(bias) for token, bias in told.items()}
    return tuple((token, min(_MOST_BIAS, max(-_MOST_BIAS, bias))) for token, bias in read.items())


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(int(token) for token in value)


_READERS: Mapping[str, Any] = {
    **dict.fromkeys(NAMES, _number),
    "top_k": _top_k,
    "logit_bias": _biases,
    "allowed_token_ids": _ids,
}
