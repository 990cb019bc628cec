"""The average teacher: weights that follow the policy's slowly.

    average ← decay · average + (1 − decay) · policy        after every step

A teacher that moves more slowly than its student is steadier (arXiv 1703.01780). The two low-rank
factors are averaged each for itself, so that the average is an adapter of the same rank.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class AverageWeights:
    """A second set of values for the weights that train."""

    def __init__(self, weights: Sequence[torch.nn.Parameter], decay: float) -> None:
        self._weights = weights
        self._decay = decay
        self._values: list[Tensor] = []
        self.restart()

    def restart(self) -> None:
        """Begins as the weights are now."""
        self._values = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def follow(self) -> None:
        """Moves towards the weights: once after each update."""
        for value, weight in zip(self._values, self._weights, strict=True):
            value.lerp_(weight, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with these values for its weights."""
        trained = [weight.data for weight in self._weights]
        self._put(self._values)
        try:
            yield
        finally:
            self._put(trained)

    def state(self) -> list[Tensor]:
        """The values, for a checkpoint."""
        return self._values

    def load(self, state: Sequence[Tensor]) -> None:
        """Goes on from `state`; an empty one, of another teacher's checkpoint, changes nothing."""
        if state:
            for value, saved in zip(self._values, state, strict=True):
                value.copy_(saved)

    def _put(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.data = value
